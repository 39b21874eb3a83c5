"""Parquet files read whole, without the scanner of pyarrow, whose threads may abort a process at its exit."""

import io
from collections.abc import Sequence
from os import PathLike

import pyarrow as pa
import pyarrow.parquet as pq


def read_columns(source: str | PathLike[str] | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The named columns, or all, of a file or of a file's content. Raises OSError, pyarrow.ArrowInvalid."""
    with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        return file.read(columns=None if columns is None else list(columns))
