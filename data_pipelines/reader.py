"""Plain WebDataset tars, read by random access: one map per shard, opened at first use.

Where the members lie comes from the sidecar index of our writer or from a walk over the headers (`tar.py`).
"""

import io
import json
import logging
import mmap
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.arrays import load_array
from data_pipelines.errors import BadSample, PipelineError, ShardError
from data_pipelines.files import sha256_file
from data_pipelines.records import MANIFEST, ShardInfo, load_manifest
from data_pipelines.shard_files import index_path
from data_pipelines.tar import KINDS, Contents, Data, contents, indexed, walk_tar

log = logging.getLogger(__name__)

OPEN_SHARDS = 64
"""Shards that are kept mapped; the one opened longest ago is closed first."""


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
    cls: int | None = None
    """Class number of a `cls` member."""
    array: Any = None
    """Numbers of an `npy` member beside a picture."""


@dataclass(frozen=True, slots=True)
class _Open:
    """A mapped tar and what it holds."""

    data: memoryview
    contents: Contents


class Maps:
    """The shards that are mapped at present; several folders can share one."""

    def __init__(self, limit: int = OPEN_SHARDS) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._used: dict[Shard, None] = {}

    def touch(self, shard: "Shard") -> None:
        """Note that a shard was opened; close what is too many. Views handed out stay valid."""
        with self._lock:
            self._used.pop(shard, None)
            self._used[shard] = None
            while len(self._used) > self._limit:
                oldest = next(iter(self._used))
                del self._used[oldest]
                oldest.close()


class Shard:
    """One tar. Its samples are read by their position; nothing is opened before the first is asked for."""

    def __init__(
        self,
        path: Path,
        info: ShardInfo | None = None,
        fetch: Callable[[], object] | None = None,
        maps: Maps | None = None,
    ) -> None:
        """`info`: the shard by its manifest. `fetch`: brings a remote shard to `path`, its index beside it.

        Without `info` it is opened at once, to know how many samples it holds.
        """
        self.path, self.info = path, info
        self.fetch, self._maps = fetch, maps or Maps()
        self._lock = threading.Lock()
        self._open: _Open | None = None
        self._broken: ShardError | None = None
        self._count = info.samples if info else len(self._opened().contents.table)

    def __len__(self) -> int:
        return self._count

    @property
    def ignored(self) -> Counter[str]:
        """Extension -> members that are never decoded."""
        return self._opened().contents.ignored

    def close(self) -> None:
        """Forget the map; the next read opens it again."""
        self._open = None

    def key(self, row: int) -> str:
        """Key of the sample in position `row`."""
        return self._opened().contents.keys[row]

    def offset(self, row: int) -> int:
        """Byte of the tar where the first member of a sample begins."""
        places = self._opened().contents.table[row, 0::2]
        return int(places[places > 0].min(initial=len(self._opened().data)))

    def source(self, row: int) -> str:
        """Source of the sample in position `row`, empty where its json does not say."""
        return str(_columns(self.raw(row).get("json"), self.path.name, self.key(row)).get("source", ""))

    def raw(self, row: int) -> dict[str, memoryview]:
        """Content of the members of a sample by kind (see tar.KINDS), uncopied. Raises BadSample."""
        opened = self._open or self._opened()
        if not opened.contents.good[row]:
            raise BadSample("damaged_header", f"{self.path.name}: sample {row}")
        places = opened.contents.table[row].tolist()
        return {
            kind: opened.data[places[2 * i] : places[2 * i] + places[2 * i + 1]]
            for i, kind in enumerate(KINDS)
            if places[2 * i] >= 0
        }

    def text_bytes(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Bytes of the caption member of every sample."""
        return self._opened().contents.table[:, 2 * KINDS.index("txt") + 1]

    def read(self, row: int) -> Sample:
        """The sample in position `row`. Raises BadSample when it has no image or its text cannot be read."""
        members, key = self.raw(row), self.key(row)
        if "image" not in members and "npy" in members:
            members["image"] = members.pop("npy")  # beside no other picture, an array is the picture itself
        image = members.get("image", b"")
        if not len(image):
            reason = "empty_image" if "image" in members else "no_image"
            raise BadSample(reason, f"{self.path.name}: {key}")
        columns = _columns(members.get("json"), self.path.name, key)
        try:
            text = str(members["txt"], "utf-8") if "txt" in members else ""
            captions = columns.get("captions") or text.splitlines()
            if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
                raise ValueError("`captions` is no list of texts")
            cls = int(str(members["cls"], "utf-8")) if "cls" in members else None
            array = load_array(io.BytesIO(members["npy"])) if "npy" in members else None
        except (ValueError, TypeError, EOFError) as error:
            raise BadSample("bad_text", f"{self.path.name}: {key}: {error}") from error
        return Sample(
            key=key,
            image=bytes(image),
            captions=tuple(caption for caption in captions if caption),
            labels=tuple(columns.get("labels") or ()),
            source=str(columns.get("source", "")),
            columns=columns,
            cls=cls,
            array=array,
        )

    def _opened(self) -> _Open:
        """The mapped tar, opened and checked if it is not."""
        opened = self._open
        if opened is None:
            with self._lock:
                if self._broken is not None:  # finding out again would cost as much for every sample
                    raise self._broken
                try:
                    opened = self._open or self._map()
                except ShardError as error:
                    self._broken = error
                    raise
                self._open = opened
            self._maps.touch(self)
        return opened

    def _map(self) -> _Open:
        try:
            if self.fetch is not None:
                self.fetch()
            with self.path.open("rb") as handle:
                data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ShardError(f"{self.path}: cannot be opened ({error})") from error
        check_length(self.path, len(data), self.info)
        found = self._contents(data)
        if self.info is not None and len(found.table) != self.info.samples:
            raise ShardError(
                f"{self.path}: {len(found.table)} samples, the manifest says {self.info.samples}: it was exchanged"
            )
        return _Open(memoryview(data), found)

    def _contents(self, data: Data) -> Contents:
        """By the index where it fits the tar, else by a walk."""
        try:
            index = load_array(index_path(self.path))
        except FileNotFoundError:
            return contents(walk_tar(data, str(self.path)))
        except (OSError, ValueError, EOFError) as error:
            log.warning("%s: the index cannot be read (%s); walking the tar", self.path, error)
            return contents(walk_tar(data, str(self.path)))
        plain = index.ndim == 2 and index.shape[1] == 6 and index.dtype == np.int64
        found = indexed(data, index) if plain else None
        if found is not None and found.good.all():
            return found
        try:
            walked = contents(walk_tar(data, str(self.path)))
        except ShardError as error:
            if found is None:
                raise
            log.warning("%s; %d samples are lost, its index finds the others", error, int((~found.good).sum()))
            return found
        if self.info is not None and sha256_file(self.path) != self.info.sha256:
            raise ShardError(f"{self.path}: neither its index nor the manifest fits it: it was exchanged or changed")
        log.warning("%s: its index does not fit it; walked the tar instead", self.path)
        return walked


def check_length(path: Path, length: int, info: ShardInfo | None) -> None:
    """Raise ShardError unless a shard has the length its manifest says."""
    if info is not None and length != info.bytes:
        raise ShardError(f"{path}: {length} bytes, the manifest says {info.bytes}: it is cut or was exchanged")


def _columns(member: memoryview | None, shard: str, key: str) -> dict[str, Any]:
    """The json member. Raises BadSample."""
    if member is None:
        return {}
    try:
        columns = json.loads(bytes(member))
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"{shard}: {key}: {error}") from error
    if not isinstance(columns, dict):
        raise BadSample("bad_json", f"{shard}: {key}: holds no object")
    return columns


def open_shards(folder: Path, names: frozenset[str] | None = None, maps: Maps | None = None) -> list[Shard]:
    """Shards of a folder (all, or those of these names) in name order, with lengths as in the manifest if there is one.

    Raises ShardError when a shard is missing or has another length, or is damaged and not vouched for by a manifest.
    """
    maps = maps or Maps()
    if not folder.is_dir():
        raise PipelineError(f"{folder}: no such folder of shards; make one with `vlp shard SOURCE --out DIR`")
    if not (folder / MANIFEST).is_file():
        paths = [path for path in sorted(folder.glob("*.tar")) if names is None or path.name in names]
        if names is not None and len(paths) < len(names):
            raise PipelineError(f"{folder}: holds no {min(names - {path.name for path in paths})}")
        if not paths:
            below = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}")))
            hint = f"its splits are folders: {below}" if below else "make some with `vlp shard SOURCE --out DIR`"
            raise PipelineError(f"{folder}: holds no .tar shard; {hint}")
        log.info("%s: no %s; what was lost before cannot be seen", folder, MANIFEST)
        return [Shard(path, maps=maps) for path in paths]
    infos = [info for info in load_manifest(folder).shards if names is None or info.name in names]
    if names is not None and len(infos) < len(names):
        raise PipelineError(f"{folder / MANIFEST}: knows no {min(names - {info.name for info in infos})}")
    shards = [Shard(folder / info.name, info, maps=maps) for info in infos]
    for shard in shards:
        try:
            check_length(shard.path, shard.path.stat().st_size, shard.info)
        except OSError as error:
            raise ShardError(f"{shard.path}: is missing, though the manifest names it ({error})") from error
    return shards
