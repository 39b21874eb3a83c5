"""What exists before training: one Record per picture, and the Manifest that vouches for a folder of shards."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import ShardError
from data_pipelines.files import sha256_file

Box = tuple[float, float, float, float, str]
"""x0, y0, x1, y1 as fractions of the picture as people see it (upright, if EXIF turns it), and the category name."""
BOX_FIELDS = ("x0", "y0", "x1", "y1", "label")
"""Names of its parts in parquet and json."""

MANIFEST = "manifest.json"

FORMAT = 1
"""Version of the manifest and of the files it names."""

RESERVED = frozenset(
    ("url", "caption", "captions", "labels", "source", "boxes", "key", "status", "error_message", "width", "height",
     "original_width", "original_height", "sha256", "stored_sha256", "text_sha256")
)  # fmt: skip
"""Columns the writer computes; img2dataset's names where it has the column."""


@dataclass(frozen=True, slots=True)
class Record:
    """One picture with everything known about it, before it is written to a shard.

    `image` is the encoded bytes, or what they are read from later, so that millions of records cost little: a path,
    or a URL (http, https, or one that fsspec opens, such as s3://).
    The first caption is the picture's own; the others are alternatives for training.
    """

    image: bytes | Path | str
    captions: tuple[str, ...]
    source: str
    """Where the picture comes from (a vendor, a folder); a data recipe can select by it."""
    origin: str
    """Stable address of the picture inside its source: a relative path or a URL."""
    labels: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    split: str = ""
    """Sub-folder of the output this record belongs to; empty for a source without splits."""
    extra: Mapping[str, str | int | float | None] = field(default_factory=dict)
    """Passthrough columns, written to the parquet and the json member; none of RESERVED."""
    problem: str = ""
    """`reason: detail` when the source already knows that this row is no sample; the writer counts and records it."""


class ShardInfo(StrictModel):
    """One shard as the manifest knows it."""

    name: str
    samples: int
    bytes: int
    sha256: str


class Manifest(StrictModel):
    """What a finished shard folder holds. `digest` in resume states and bundles is the sha256 of this file."""

    format: int = FORMAT
    kind: str
    source_digest: str
    """sha256 over the origins and content hashes of all records, in order."""
    records: int
    """Rows seen, failures included."""
    samples: int
    failures: dict[str, int]
    """Reason -> rows that did not become samples."""
    sources: dict[str, int]
    """Record.source -> samples."""
    licences: dict[str, str]
    options: dict[str, str | int | float | bool | None]
    shards: tuple[ShardInfo, ...]


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Manifest from a file's content; `where` names it in errors. Raises ShardError as `load_manifest`."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ShardError(f"{where} is damaged: {explain(error)}") from error
    if manifest.format > FORMAT:
        raise ShardError(
            f"{where} has format {manifest.format}, this version reads up to {FORMAT}: install a newer vlp"
        )
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """Manifest of a finished shard folder. Raises ShardError when it is missing, damaged or newer than this version."""
    path = folder / MANIFEST
    if not path.is_file():
        below = sorted(found.parent.name for found in folder.glob(f"*/{MANIFEST}"))
        hint = (
            f"; its splits are folders: {', '.join(below)}"
            if below
            else "; write shards with `vlp shard SOURCE --out DIR`"
        )
        raise ShardError(f"{folder} holds no {MANIFEST}, so it is no finished shard folder{hint}")
    return parse_manifest(path.read_bytes(), str(path))


def manifest_digest(folder: Path) -> str:
    """Hex sha256 of a shard folder's manifest: the identity of the data in resume states and bundles."""
    path = folder / MANIFEST
    if not path.is_file():
        load_manifest(folder)  # says what is missing
    return sha256_file(path)
