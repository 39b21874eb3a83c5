"""Parquet files, read in the calling thread alone.

The threads of pyarrow's scanner and of its readers may abort a process at its exit ("terminate called without an
active exception"): of a thousand short commands on busy cores, two did. So nothing else here starts them.
"""

import io
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq


def read_columns(source: str | PathLike[str] | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The named columns, or all, of a file or of a file's content. Raises OSError, pyarrow.ArrowInvalid."""
    with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source, pre_buffer=False) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)


def read_batches(stream: IO[bytes], rows: int) -> Iterator[pa.RecordBatch]:
    """A file's rows, up to `rows` at a time. Raises OSError, pyarrow.ArrowInvalid."""
    yield from pq.ParquetFile(stream, pre_buffer=False).iter_batches(rows, use_threads=False)
