"""Embeddings of pictures for all of curation: computed once per model and shards, kept on disk, read in blocks.

Suffixes: N pictures, D embedding width.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.errors import ConfigError
from data_pipelines.files import cache_dir, sha256_file
from data_pipelines.parquet import read_columns
from data_pipelines.reader import open_shards
from data_pipelines.records import MANIFEST
from vlp.bundle import Bundle
from vlp.embed import embed_shards, weights_digest
from vlp.embed_files import find_parts

Advance = Callable[[int], None]
BLOCK = 8192
"""Pictures that are looked at together."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """The embedded pictures of some shard folders, in stored order; the arrays stay on disk."""

    parts: tuple[tuple[NDArray[Any], Path], ...]
    """(ND array, parquet with the key and columns of each row) of every shard."""
    skipped: int
    """Pictures that could not be used."""
    made_of: dict[str, Any]
    """Model and data, for the file that results."""
    texts: tuple[NDArray[Any], ...] = ()
    """ND of the first caption of each picture, part by part, where they were asked for."""

    def __len__(self) -> int:
        return sum(len(array) for array, _ in self.parts)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.parts[0][0].shape[1])

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Embeddings of some pictures, whose numbers ascend; float32 ND."""
        ends = np.cumsum([len(array) for array, _ in self.parts])
        cuts = np.searchsorted(rows, ends)
        found = [
            array[rows[first:last] - (end - len(array))]
            for (array, _), first, last, end in zip(self.parts, [0, *cuts[:-1]], cuts, ends, strict=True)
            if last > first
        ]
        return torch.from_numpy(np.concatenate(found).astype(np.float32))

    def blocks(self, rows: NDArray[np.int64] | None = None) -> Iterator[Tensor]:
        """Embeddings of all pictures, or of those numbered, BLOCK at a time."""
        for start in range(0, len(self) if rows is None else len(rows), BLOCK):
            yield self.take(np.arange(start, min(start + BLOCK, len(self))) if rows is None else rows[start:][:BLOCK])

    def keys(self) -> Iterator[list[str]]:
        """Keys of the pictures of every shard."""
        for _, table in self.parts:
            yield read_columns(table, ["image_path"]).column(0).to_pylist()


def embed_pictures(
    path: Path,
    bundle: Bundle,
    data: Sequence[Path],
    store: Path | None = None,
    advance: Advance = lambda step: None,
    captions: bool = False,
) -> Pictures:
    """Embeddings of all shards in the folders `data` by the bundle that was loaded from `path`.

    `captions`: of their first captions as well. `store`: where they are kept for the next time; default: a folder of
    the cache. Raises PipelineError, and ConfigError for two pictures of one key, under which a sidecar could hold only
    one of them.
    """
    weights = weights_digest(path)
    parts: list[tuple[NDArray[Any], Path]] = []
    texts: list[NDArray[Any]] = []
    skipped = 0
    digests = {}
    for folder in data:
        digests[str(folder)] = digest = _data_digest(folder)
        out = (store or cache_dir() / "embeddings") / f"{weights[:16] or bundle.name}-{digest[:16]}"
        result = embed_shards(bundle, weights, folder, out, progress=advance, captions=captions)
        skipped += sum(result.skipped.values())
        parts += [(np.load(array, mmap_mode="r"), table) for array, table in find_parts(out, "img_emb")]
        if captions:
            texts += [np.load(array, mmap_mode="r") for array, _ in find_parts(out, "text_emb")]
    made_of = {"model": bundle.name, "weights_sha256": weights, "data": digests}
    pictures = Pictures(tuple(parts), skipped, made_of, tuple(texts))
    _check_keys(pictures)
    return pictures


def _data_digest(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        return sha256_file(folder / MANIFEST)
    shards = [f"{shard.path.resolve()}:{shard.path.stat().st_size}" for shard in open_shards(folder)]
    return hashlib.sha256("\n".join(shards).encode()).hexdigest()


def _check_keys(pictures: Pictures) -> None:
    seen: set[bytes] = set()
    for keys in pictures.keys():  # noqa: SIM118 - no mapping
        for key in keys:
            digest = hashlib.blake2b(key.encode(), digest_size=10).digest()
            if digest in seen:
                raise ConfigError(f"--data: the key {key!r} occurs twice: label folders with equal keys one by one")
            seen.add(digest)
