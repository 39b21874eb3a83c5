"""The files of one shard in img2dataset's layout: tar, offset index, parquet of every row, statistics.

Equal rows give equal bytes: mtime, owner, mode and member order are fixed. Only the statistics file holds times.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.records import BOX_FIELDS

INDEX_SUFFIX = ".index.npy"
INDEX_COLUMNS = ("image_offset", "image_size", "json_offset", "json_size", "txt_offset", "txt_size")
"""Columns of the (samples, 6) int64 index; offsets are of the content in the tar, size 0 = no such member."""

BLOCK = tarfile.BLOCKSIZE
BOX = pa.struct([(side, pa.float64()) for side in BOX_FIELDS[:4]] + [(BOX_FIELDS[4], pa.string())])
COLUMNS: Mapping[str, pa.DataType] = {
    "url": pa.string(),
    "caption": pa.string(),
    "captions": pa.list_(pa.string()),
    "labels": pa.list_(pa.string()),
    "source": pa.string(),
    "boxes": pa.list_(BOX),
    "key": pa.string(),
    "status": pa.string(),
    "error_message": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "sha256": pa.string(),
    "stored_sha256": pa.string(),
    "text_sha256": pa.string(),
}
"""Fixed columns of the parquet; passthrough columns follow. sha256 is of the original bytes, stored_sha256 of the image
member, text_sha256 of the json and txt members one after the other; the last two are null for a row that failed."""


def index_path(tar: Path) -> Path:
    """Sidecar offset index of a shard: 00000.tar -> 00000.index.npy."""
    return tar.with_name(tar.stem + INDEX_SUFFIX)


def key_digits(samples_per_shard: int) -> int:
    """ceil(log10(n)) without the floating point: digits a key needs for the index inside its shard."""
    return 0 if samples_per_shard == 1 else len(str(samples_per_shard - 1))


class TarWriter:
    """Samples into one tar stream; collects the offset index and the digest on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.bytes = 0
        self.index: list[tuple[int, ...]] = []
        self._digest = hashlib.sha256()

    def add(self, key: str, extension: str, image: bytes, text: bytes, caption: bytes | None) -> None:
        """One sample: image, json and, where there is a caption, txt; member extensions are in sorted order."""
        members = {extension: image, "json": text} | ({} if caption is None else {"txt": caption})
        place = {"json": (0, 0), "txt": (0, 0)}
        for suffix in sorted(members):
            content = members[suffix]
            self._write(_header(f"{key}.{suffix}", len(content)))
            place[suffix] = (self.bytes, len(content))
            self._write(content)
            self._write(bytes(-len(content) % BLOCK))
        self.index.append((*place[extension], *place["json"], *place["txt"]))

    def close(self) -> str:
        """End the archive as tarfile does (two zero blocks, padded to a record); returns the hex sha256 of it all."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.bytes % tarfile.RECORDSIZE))
        return self._digest.hexdigest()

    def index_file(self) -> bytes:
        """Content of the offset index that belongs beside the tar."""
        stream = io.BytesIO()
        np.save(stream, np.array(self.index, dtype=np.int64).reshape(len(self.index), len(INDEX_COLUMNS)))
        return stream.getvalue()

    def _write(self, content: bytes) -> None:
        self.stream.write(content)
        self._digest.update(content)
        self.bytes += len(content)


@cache
def _blank_header() -> tuple[bytes, int]:
    """A header without name, size and checksum, and the sum of its bytes with a blank checksum."""
    info = tarfile.TarInfo("")
    info.size, info.mode, info.mtime = 0, 0o444, 0
    info.uname = info.gname = "bigdata"  # as webdataset's own writer
    blank = info.tobuf(tarfile.USTAR_FORMAT)
    return blank, sum(blank[100:124]) + sum(blank[136:148]) + 8 * ord(" ") + sum(blank[156:])


def _header(name: str, size: int) -> bytes:
    """What tarfile makes of the same name and size, ten times faster: names and sizes are the only fields that vary."""
    encoded = name.encode()
    assert len(encoded) <= 100
    assert size < 8**11
    blank, rest = _blank_header()
    length = b"%011o\0" % size
    checksum = b"%06o\0 " % (rest + sum(encoded) + sum(length))
    return encoded.ljust(100, b"\0") + blank[100:124] + length + blank[136:148] + checksum + blank[156:]


UNKNOWN, INTEGER, FLOAT, STRING = range(4)
"""Column types in widening order; unknown (nothing but nulls so far) is stored as string."""


class Extras:
    """Types of the passthrough columns, which only become known row by row; kept from shard to shard of a folder."""

    def __init__(self, rank: Mapping[str, int] | None = None) -> None:
        """`rank`: the types so far, from another object's `rank`."""
        self.rank = dict(rank or {})

    def see(self, extra: Mapping[str, Any]) -> None:
        """Widen the columns' types so that they hold these values: integer, float, string."""
        for name, value in extra.items():
            self.rank[name] = max(_rank(value), self.rank.get(name, UNKNOWN))

    def columns(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
        """Passthrough columns by name; a row without one gets null."""
        return {name: self._column([row.get(name) for row in rows], self.rank[name]) for name in sorted(self.rank)}

    def _column(self, values: list[Any], rank: int) -> pa.Array:
        convert = {UNKNOWN: str, INTEGER: int, FLOAT: float, STRING: str}[rank]
        kind = {INTEGER: pa.int64(), FLOAT: pa.float64()}.get(rank, pa.string())
        return pa.array([None if value is None else convert(value) for value in values], kind)


def _rank(value: Any) -> int:
    if value is None:
        return UNKNOWN
    if isinstance(value, int):
        return INTEGER if -(2**63) <= value < 2**63 else STRING
    return FLOAT if isinstance(value, float) else STRING


def parquet_file(rows: Sequence[Mapping[str, Any]], extras: Extras) -> bytes:
    """Content of the parquet: every row of a shard, failures included."""
    columns = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in COLUMNS.items()}
    stream = io.BytesIO()
    pq.write_table(pa.table(columns | extras.columns(rows)), stream)
    return stream.getvalue()


def json_file(content: Mapping[str, Any]) -> bytes:
    """Content of a JSON file."""
    return (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()
