"""All samples of a recipe's training data under one numbering: folders, lists, brace lists, URLs and mixtures."""

import hashlib
import io
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]
from numpy.typing import NDArray

from data_pipelines.errors import BadSample, PipelineError, ShardError
from data_pipelines.keep import load_keys
from data_pipelines.parquet import read_columns
from data_pipelines.plan import Part
from data_pipelines.reader import Maps, Sample, Shard, open_shards
from data_pipelines.records import MANIFEST, ShardInfo, manifest_digest, parse_manifest
from data_pipelines.remote import PIPE, Absent, DiskCache, allow, download, is_remote
from data_pipelines.shard_files import COLUMNS, index_path

log = logging.getLogger(__name__)

Train = str | dict[str, float]
"""A folder, tars, or URLs (joined by `::`, with {a..b} and {a,b}); or such texts with their weights in a mixture."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample is stored, for records of what went wrong."""

    shard: str
    row: int
    key: str
    offset: int


class ShardSet:
    """Samples by their number. Holds the shards, and which of their rows are used."""

    def __init__(
        self,
        train: Train | Path,
        sources: Mapping[str, int] | None = None,
        keep: Path | None = None,
        cache: DiskCache | None = None,
        pipe: tuple[str, ...] = (),
    ) -> None:
        """`sources`: source -> how often its samples appear in an epoch; others are left out. None takes all once.

        `keep`: keep-list of keys. `pipe`: programs that `pipe:` locations may run.
        """
        opener = _Opener(cache or DiskCache(), pipe, Maps())
        weighted = train if isinstance(train, dict) else {str(train): 1.0}
        groups = {text: opener.open(text) for text in weighted}
        self.shards: list[Shard] = [shard for group, _ in groups.values() for shard in group]
        self.names = ["/".join(shard.path.parts[-2:]) for shard in self.shards]
        """File name of every shard, with its folder."""
        self.parts = [Part(len(groups[text][0]), weight) for text, weight in weighted.items()]
        self._part_ends = np.cumsum([part.shards for part in self.parts]).tolist()
        self.digest = _digest([groups[text][1] for text in weighted])
        keys = None if keep is None else load_keys(keep)
        self._rows = [_select(shard, sources, keys) for shard in self.shards]
        if (sources is not None or keys is not None) and not any(map(len, self._rows)):
            raise PipelineError(
                f"data.sources={dict(sources or {})}, data.keep={keep}: no sample of {list(weighted)} is selected"
            )
        self.sizes: NDArray[np.int64] = np.fromiter(map(len, self._rows), np.int64, len(self._rows))
        self._starts = np.concatenate([[0], self.sizes.cumsum()]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def original(self, sample_id: int) -> tuple[int, int]:
        """(shard, row) of a sample: equal for all its repetitions."""
        number = bisect_right(self._starts, sample_id) - 1
        return number, int(self._rows[number][sample_id - self._starts[number]])

    def read(self, sample_id: int) -> Sample:
        """The sample with this number. Raises BadSample, also where the shard turns out to be damaged."""
        number, row = self.original(sample_id)
        try:
            return self.shards[number].read(row)
        except ShardError as error:
            raise BadSample("damaged_shard", str(error)) from error

    def place(self, sample_id: int) -> Place:
        """Where a sample is stored; key and offset are unknown when its shard cannot be opened."""
        number, row = self.original(sample_id)
        try:
            return Place(self.names[number], row, self.shards[number].key(row), self.shards[number].offset(row))
        except ShardError:
            return Place(self.names[number], row, "", -1)

    def part(self, shard: int) -> int:
        """Number of the part of a mixture that a shard belongs to."""
        return bisect_right(self._part_ends, shard)

    def column(self, shard: int, name: str) -> list[Any]:
        """`key`, `labels`, `cls` or a json column of every selected sample of a shard; None where it is unreadable.

        Raises ShardError for a remote shard: it may be there for the other ranks.
        """
        rows = self._rows[shard]
        try:
            values = _column(self.shards[shard], name)
        except ShardError:
            if self.shards[shard].fetch is not None:
                raise
            return [None] * len(rows)
        return [values[row] for row in rows]

    def text_lengths(self, shard: int) -> NDArray[np.int64]:
        """Bytes of the caption of every selected sample of a shard."""
        lengths = self.shards[shard].text_bytes()
        rows = self._rows[shard]
        return lengths if isinstance(rows, range) else lengths[rows]


def _digest(digests: Sequence[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _select(shard: Shard, sources: Mapping[str, int] | None, keys: frozenset[str] | None) -> range | NDArray[np.int32]:
    """Rows of a shard that are used, in order, repeated as `sources` says."""
    if sources is None and keys is None:
        return range(len(shard))
    times = np.ones(len(shard), dtype=np.int32)
    if sources is not None:
        found = [sources.get(source or "", 0) for source in _column(shard, "source")]
        times *= np.array(found, dtype=np.int32)
    if keys is not None:
        times *= np.fromiter((key in keys for key in _column(shard, "key")), np.int32, len(shard))
    return np.repeat(np.arange(len(shard), dtype=np.int32), times)


def _column(shard: Shard, name: str) -> list[Any]:
    """A column of every sample: from the parquet beside the shard if it is one of ours and fits, else from the tar."""
    path = shard.path.with_suffix(".parquet")
    if name in COLUMNS and path.is_file() and name in pq.read_schema(path).names:
        table = read_columns(path, [name, "status"])
        found = [row[name] for row in table.to_pylist() if row["status"] == "success"]
        if len(found) == len(shard):
            return found
    return [_from_tar(shard, row, name) for row in range(len(shard))]


def _from_tar(shard: Shard, row: int, name: str) -> Any:
    """None where it cannot be read: such a sample belongs to no source, and a keep-list finds it by its key."""
    try:
        if name == "key":
            return shard.key(row)
        if name == "source":
            return shard.source(row)
        sample = shard.read(row)
    except BadSample:
        return None
    return {"cls": sample.cls, **sample.columns, "labels": sample.labels}.get(name)


@dataclass(frozen=True, slots=True)
class _Opener:
    """Turns the texts of `data.train` into shards."""

    cache: DiskCache
    pipe: tuple[str, ...]
    maps: Maps

    def open(self, text: str) -> tuple[list[Shard], str]:
        """(shards, digest) of one text: folders and URLs in its order, then single tars by folder and name."""
        try:
            items = [item for piece in text.split("::") for item in braceexpand(piece, escape=False)]
        except UnbalancedBracesError as error:
            raise PipelineError(f"data.train: {text!r}: {error}") from error
        shards: list[Shard] = []
        digests: list[str] = []
        tars: dict[Path, list[str]] = {}
        for item in items:
            if is_remote(item):
                allow(item, self.pipe)
                found, digest = self._remote(item)
            elif item.endswith(".tar"):
                tars.setdefault(Path(item).parent, []).append(Path(item).name)
                continue
            else:
                found = open_shards(Path(item), maps=self.maps)
                digest = _folder_digest(Path(item), found)
            shards += found
            digests.append(digest)
        for folder, names in tars.items():
            found = open_shards(folder, frozenset(names), self.maps)
            shards += found
            digests.append(",".join(_identity(shard) for shard in found))
        return shards, _digest(digests)

    def _remote(self, item: str) -> tuple[list[Shard], str]:
        """Shards of a remote folder with a manifest, or one remote tar."""
        if item.endswith(".tar") or item.startswith(PIPE):
            shard = self._remote_shard(item, None)
            return [shard], _identity(shard)
        location = f"{item.rstrip('/')}/{MANIFEST}"
        stream = io.BytesIO()
        try:
            download(location, stream, self.cache.options)
        except Absent as error:
            raise PipelineError(f"{error}; list the tars, as in {item.rstrip('/')}/{{00000..00099}}.tar") from error
        content = stream.getvalue()
        manifest = parse_manifest(content, location)
        shards = [self._remote_shard(f"{item.rstrip('/')}/{info.name}", info) for info in manifest.shards]
        return shards, hashlib.sha256(content).hexdigest()

    def _remote_shard(self, location: str, info: ShardInfo | None) -> Shard:
        sha256 = info.sha256 if info else ""
        path = self.cache.path(location, sha256)

        def fetch() -> None:
            self.cache.get(location, path, sha256)
            if not location.startswith(PIPE):
                self.cache.get(f"{location.removesuffix('.tar')}.index.npy", index_path(path), optional=True)

        return Shard(path, info, fetch, self.maps)


def _identity(shard: Shard) -> str:
    return shard.info.sha256 if shard.info else f"{shard.path.name}:{shard.path.stat().st_size}"


def _folder_digest(folder: Path, shards: Sequence[Shard]) -> str:
    """The manifest's sha256, else names and sizes of the shards."""
    return manifest_digest(folder) if (folder / MANIFEST).is_file() else ",".join(map(_identity, shards))
