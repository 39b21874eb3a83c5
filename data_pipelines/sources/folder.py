"""A folder of images, with captions beside them or class folders around them.

Captions beside: `dog.jpg` with `dog.txt` (one caption per line) and/or `dog.json` (`caption`/`captions`,
`label`/`labels`, other values become columns). Class folders: no such files anywhere; the name of a picture's own
folder is its label, and `template` makes the caption. Folders are searched to any depth, names in sorted order, hidden
ones left out. An .npy file is a picture, too, unless a picture of another kind has its name.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_pipelines import rows
from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, PipelineError
from data_pipelines.records import Record

READ = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".npy")
UNREAD = (".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg")
"""Pictures that are not decoded: they become counted failures, so that nobody misses them silently."""

MAX_SIDECAR_BYTES = 16 * 2**20
Layout = Literal["captions", "classes"]


class Config(StrictModel):
    """Where the pictures lie and how their text is found."""

    path: Path
    layout: Layout | None = None
    """None: `captions` if any picture has a .txt or .json beside it; else `classes` if all lie in sub-folders."""
    template: rows.Template | None = None
    """Caption of a picture that has a label only, such as "a photo of a {label}"."""


@dataclass(frozen=True)
class _Listing:
    """One pass over the names in the folder."""

    root: Path

    @cached_property
    def files(self) -> list[str]:
        """Relative paths of all files that are not hidden, sorted folder by folder."""
        found: list[str] = []
        for folder, below, names in os.walk(self.root):
            below[:] = sorted(name for name in below if not name.startswith("."))
            inside = os.path.relpath(folder, self.root)
            prefix = "" if inside == "." else inside + "/"
            found += (prefix + name for name in sorted(names) if not name.startswith("."))
        return found

    @cached_property
    def pictures(self) -> list[str]:
        found = [name for name in self.files if _suffix(name) in READ + UNREAD]
        encoded = {_stem(name) for name in found if _suffix(name) != ".npy"}
        return [name for name in found if _suffix(name) != ".npy" or _stem(name) not in encoded]

    @cached_property
    def sidecars(self) -> set[str]:
        stems = {_stem(name) for name in self.pictures}
        return {name for name in self.files if _suffix(name) in (".txt", ".json") and _stem(name) in stems}

    def layout(self) -> Layout:
        if not self.sidecars and all("/" in name for name in self.pictures):
            return "classes"
        return "captions"


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _list(config: Config) -> _Listing:
    if not config.path.is_dir():
        raise PipelineError(f"{config.path}: no such folder; give a folder of images")
    listing = _Listing(config.path)
    if not listing.pictures:
        raise PipelineError(
            f"{config.path}: no images among {len(listing.files)} files; looked in it and all folders below it for "
            f"{', '.join(READ)}"
        )
    return listing


def count(config: Config) -> int:
    """Number of records that `iter_records` yields."""
    return len(_list(config).pictures)


def fingerprint(config: Config) -> str:
    """Changes when a file of the folder is added, removed, renamed or written; reads no content."""
    digest = hashlib.sha256(_source(config).encode("utf-8", "replace"))
    for name in _list(config).files:
        status = (config.path / name).lstat()  # a dangling link is a file, too: one that fails later
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


def iter_records(config: Config) -> Iterator[Record]:
    """One record per picture; one without any caption or label carries the problem `no_caption`."""
    listing = _list(config)
    layout = config.layout or listing.layout()
    if config.template and layout == "captions" and not any(name.endswith(".json") for name in listing.sidecars):
        raise PipelineError(
            f"template {config.template!r} has no effect: {config.path} holds no labels, that is neither class folders "
            "nor a .json beside an image; leave it out"
        )
    source = _source(config)
    for name in listing.pictures:
        if layout == "classes":
            label = name.rpartition("/")[0].rpartition("/")[2]
            yield _record(config, source, name, (), (label,) if label else (), {}, "")
        else:
            yield _with_sidecars(config, source, name, listing.sidecars)


def _with_sidecars(config: Config, source: str, name: str, sidecars: set[str]) -> Record:
    stem = _stem(name)
    captions: list[str] = []
    labels: list[str] = []
    extra: rows.Extra = {}
    problem = ""
    try:
        if f"{stem}.txt" in sidecars:
            captions += (line.strip() for line in _read(config.path / f"{stem}.txt").splitlines())
        if f"{stem}.json" in sidecars:
            columns = _read_json(config.path / f"{stem}.json")
            captions += rows.gather(columns, ("caption", "captions"))
            labels += rows.gather(columns, rows.LABELS)
            extra = rows.passthrough(columns, rows.LABELS)
    except BadSample as error:
        problem = str(error)
    return _record(config, source, name, tuple(captions), tuple(labels), extra, problem)


def _source(config: Config) -> str:
    """The folder's own name, so that a recipe can choose among several sources."""
    return config.path.resolve().name or "folder"


def _record(
    config: Config,
    source: str,
    name: str,
    captions: tuple[str, ...],
    labels: tuple[str, ...],
    extra: rows.Extra,
    problem: str,
) -> Record:
    captions, labels = (tuple(dict.fromkeys(text for text in texts if text)) for texts in (captions, labels))
    captions = captions or rows.templated(config.template, labels)
    if not captions and not labels and not problem:
        problem = f"no_caption: no caption in {_stem(name.rpartition('/')[2])}.txt or .json beside it, no class folder"
    return Record(
        image=config.path / name,
        captions=captions,
        labels=labels,
        source=source,
        origin=name,
        extra=extra,
        problem=problem,
    )


def _read(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MAX_SIDECAR_BYTES:
            raise BadSample("bad_sidecar", f"{path.name} has {size} bytes, limit {MAX_SIDECAR_BYTES}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadSample("bad_sidecar", f"{path.name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadSample("bad_sidecar", f"{path.name} is not UTF-8: byte {error.start}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        columns = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_sidecar", f"{path.name} is not JSON: {error}") from error
    if not isinstance(columns, dict):
        raise BadSample("bad_sidecar", f"{path.name} holds a JSON {type(columns).__name__}, expected an object")
    return columns
