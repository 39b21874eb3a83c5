"""Where the rows of an embedding folder have their pictures, for thumbnails: shards, or a folder of files.

Only what lies in the folder that was named is read: metadata made by others may point anywhere.
"""

import os
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipelines.errors import BadSample, PipelineError, ShardError
from data_pipelines.images import MAX_FILE_BYTES
from data_pipelines.pictures import thumbnail
from data_pipelines.reader import open_shards
from data_pipelines.records import MANIFEST
from server.index import PointId
from server.index.folders import POINT_ID, Modality, parts_of
from vlp.embed_files import read_embed_info

Read = Callable[[PointId, str], bytes]
"""Encoded picture of a row by its point's id and `image_path`. Raises BadSample, ShardError."""


class Thumbnailer:
    """Makes the thumbnails of rows, batch by batch, and counts those that get none."""

    def __init__(self, root: Path, embeddings: Path, modality: Modality, side: int) -> None:
        """`root`: shards, or the folder of the files that image_path names. `side`: of the longer one, pixels.

        Raises PipelineError when there is no such folder, or it holds other shards than were embedded.
        """
        if not root.is_dir():
            raise PipelineError(f"--pictures {root}: no such folder")
        shards = (root / MANIFEST).is_file() or any(root.glob("*.tar"))
        self._read = _Shards(root, embeddings, modality).read if shards else _files(root.resolve())
        self.root, self.side = root.resolve(), side
        self.made = 0
        self.lacking: Counter[str] = Counter()
        """Reason -> rows without a thumbnail."""

    def __call__(self, ids: Sequence[PointId], payloads: Sequence[Mapping[str, Any]]) -> list[bytes | None]:
        """JPEGs in order; None where there is no picture, or a damaged one."""
        keys = [str(payload.get("key", "")) for payload in payloads]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(self._one, ids, keys))
        self.lacking.update(jpeg for jpeg in found if isinstance(jpeg, str))
        made = [jpeg if isinstance(jpeg, bytes) else None for jpeg in found]
        self.made += len(made) - made.count(None)
        return made

    def _one(self, id: PointId, key: str) -> bytes | str:
        """The JPEG, or why there is none."""
        try:
            return thumbnail(self._read(id, key), self.side)
        except BadSample as error:
            return error.reason
        except ShardError:
            return "damaged_shard"


def _files(root: Path) -> Read:
    def read(_id: PointId, key: str) -> bytes:
        try:
            path = (root / key).resolve()
            if not path.is_relative_to(root):
                raise BadSample("outside_of_pictures", key)
            if path.stat().st_size > MAX_FILE_BYTES:
                raise BadSample("file_too_long", key)
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadSample("no_picture", key) from error

    return read


class _Shards:
    """Samples by key. Where `vlp embed` wrote down what it read, each part is looked up in its own shard alone."""

    def __init__(self, root: Path, embeddings: Path, modality: Modality) -> None:
        self._shards = open_shards(root)
        info = read_embed_info(embeddings)
        if info is not None and info.shards != {s.path.name: s.path.stat().st_size for s in self._shards}:
            raise PipelineError(f"--pictures {root}: holds other shards than those that {embeddings} was made of")
        parts = parts_of(embeddings, modality)
        by_row = info is not None and POINT_ID not in pq.read_schema(parts[0].table).names
        self._firsts = [part.first for part in parts] if by_row else None
        self._lock = threading.Lock()
        self._known: tuple[Sequence[int], dict[str, tuple[int, int]]] = ((), {})
        """Shards that were read last, and of their keys the (shard, row); a row of -1 where a key comes twice."""

    def read(self, id: PointId, key: str) -> bytes:
        """See Read."""
        if self._firsts is None or not isinstance(id, int):
            wanted: Sequence[int] = range(len(self._shards))
        else:
            wanted = (bisect_right(self._firsts, id) - 1,)
        shard, row = self._places(wanted).get(key, (0, None))
        if row is None:
            raise BadSample("no_picture", key)
        if row < 0:
            raise BadSample("ambiguous_key", key)
        return self._shards[shard].read(row).image

    def _places(self, shards: Sequence[int]) -> dict[str, tuple[int, int]]:
        with self._lock:
            if self._known[0] != shards:
                found: dict[str, tuple[int, int]] = {}
                for number in shards:
                    for row in range(len(self._shards[number])):
                        key = self._shards[number].key(row)
                        found[key] = (number, -1 if key in found else row)
                self._known = (shards, found)
            return self._known[1]
