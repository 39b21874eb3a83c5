"""Plain WebDataset tars, read by random access: one mmap per shard and an index of where each member lies.

The index comes from the sidecar file that our writer leaves, or from one walk over the tar's headers. The walk checks
every header, because Python's tarfile takes a damaged header for the end of the archive and loses the rest silently.
"""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample, PipelineError, ShardError
from data_pipelines.records import MANIFEST, load_manifest

BLOCK = 512
IMAGES = ("jpg", "png", "jpeg", "webp", "gif")

Members = dict[str, tuple[int, int]]
"""Extension -> (offset, size) inside the tar."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as stored: still encoded."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    source: str
    columns: dict[str, Any]
    """The whole json member."""


def walk_tar(data: mmap.mmap | bytes, name: str) -> list[tuple[str, Members]]:
    """(key, members) of every sample, in order. Raises ShardError where the archive is damaged."""
    samples: list[tuple[str, Members]] = []
    seen: set[str] = set()
    offset, long_name = 0, ""
    while True:
        header = data[offset : offset + BLOCK]
        if len(header) < BLOCK:
            raise ShardError(f"{name}: ends at byte {len(data)} without an end-of-archive mark: the file is cut short")
        if header.count(0) == BLOCK:
            return samples
        size, kind = _check_header(header, name, offset)
        start = offset + BLOCK
        if start + size > len(data):
            raise ShardError(f"{name}: member at byte {offset} needs {size} bytes, only {len(data) - start} are left")
        offset = start + -(-size // BLOCK) * BLOCK
        if kind in (b"x", b"L"):
            long_name = _long_name(data[start : start + size], kind)
            continue
        member = long_name or header[:100].split(b"\0")[0].decode("utf-8", "replace")
        long_name = ""
        if kind in (b"0", b"\0"):
            _add(samples, seen, member, (start, size), name)


def _check_header(header: bytes, name: str, offset: int) -> tuple[int, bytes]:
    """(size, type flag) of a header whose checksum holds."""
    try:
        stored = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
        size = int(header[124:136].split(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:
        raise ShardError(f"{name}: damaged tar header at byte {offset}") from error
    if stored != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ShardError(f"{name}: damaged tar header at byte {offset} (checksum)")
    return size, header[156:157]


def _long_name(content: bytes, kind: bytes) -> str:
    if kind == b"L":
        return content.split(b"\0")[0].decode("utf-8", "replace")
    for line in content.split(b"\n"):
        _, _, pair = line.partition(b" ")
        if pair.startswith(b"path="):
            return pair[5:].decode("utf-8", "replace")
    return ""


def _add(samples: list[tuple[str, Members]], seen: set[str], member: str, where: tuple[int, int], shard: str) -> None:
    folder, _, base = member.rpartition("/")
    stem, _, extension = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    if not samples or samples[-1][0] != key:
        if key in seen:
            raise ShardError(f"{shard}: members of {key!r} are apart; write the shard again with `vlp shard`")
        seen.add(key)
        samples.append((key, {}))
    if extension.lower() in samples[-1][1]:
        raise ShardError(f"{shard}: member {member!r} appears twice")
    samples[-1][1][extension.lower()] = where


class Shard:
    """One open tar: mapped into memory, members by random access."""

    def __init__(self, path: Path, expected_bytes: int | None = None) -> None:
        """`expected_bytes`: length by the manifest, if there is one."""
        self.path = path
        try:
            with path.open("rb") as handle:
                self._data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: cannot be opened ({error})") from error
        if expected_bytes is not None and len(self._data) != expected_bytes:
            raise ShardError(
                f"{path}: {len(self._data)} bytes, the manifest says {expected_bytes}: it is cut or was exchanged"
            )
        self._samples = walk_tar(self._data, str(path))

    def __len__(self) -> int:
        return len(self._samples)

    def source(self, row: int) -> str:
        """Source of the sample in position `row`, empty where its json does not say."""
        members = self._samples[row][1]
        return str(json.loads(self._bytes(members["json"])).get("source", "")) if "json" in members else ""

    def read(self, row: int) -> Sample:
        """The sample in position `row`. Raises BadSample when it has no image or its text cannot be read."""
        key, members = self._samples[row]
        kind = next((extension for extension in IMAGES if extension in members), None)
        if kind is None:
            raise BadSample("no_image", f"{self.path.name}: {key}")
        try:
            columns = json.loads(self._bytes(members["json"])) if "json" in members else {}
            text = self._bytes(members["txt"]).decode("utf-8") if "txt" in members else ""
        except ValueError as error:
            raise BadSample("bad_text", f"{self.path.name}: {key}: {error}") from error
        captions = columns.get("captions") or text.splitlines()
        return Sample(
            key=key,
            image=self._bytes(members[kind]),
            captions=tuple(caption for caption in captions if caption),
            labels=tuple(columns.get("labels") or ()),
            source=str(columns.get("source", "")),
            columns=columns,
        )

    def _bytes(self, where: tuple[int, int]) -> bytes:
        return self._data[where[0] : where[0] + where[1]]


def open_shards(folder: Path) -> list[Shard]:
    """All shards of a folder in name order, checked against the manifest where there is one."""
    if not folder.is_dir():
        raise PipelineError(f"{folder}: no such folder of shards; make one with `vlp shard SOURCE --out DIR`")
    if not (folder / MANIFEST).is_file():
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            below = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}")))
            hint = f"its splits are folders: {below}" if below else "make some with `vlp shard SOURCE --out DIR`"
            raise PipelineError(f"{folder}: holds no .tar shard; {hint}")
        return [Shard(path) for path in paths]
    return [Shard(folder / info.name, info.bytes) for info in load_manifest(folder).shards]
