"""Sidecar files: a parquet of lists by sample key that curation writes and streaming joins; shards are never edited.

Column `key`, and one column or more with a number, a text, or a list of either for each sample. What the file is about
(how many clusters there are, which model made them) stands as JSON in the parquet's metadata under `vlp`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.errors import ConfigError
from data_pipelines.files import write_atomic
from data_pipelines.parquet import read_columns

Ids = NDArray[np.int64]
CLUSTERS = "cluster_ids"
"""Column of cluster or entity numbers, the closest first."""
INFO = b"vlp"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One column of a sidecar file by sample key, in little memory: 10 million short keys take about 300 MB."""

    path: Path
    column: str
    keys: NDArray[np.bytes_]
    """Sorted."""
    starts: Ids
    """Where the list of each key begins, and the end."""
    values: NDArray[np.int32]
    """Numbers; of texts their place in `texts`."""
    texts: tuple[str, ...]
    """Distinct texts, sorted; empty for a column of numbers."""
    info: dict[str, Any]

    @property
    def width(self) -> int:
        """Length of the longest list, at least 1."""
        return max(1, int(np.diff(self.starts).max(initial=0)))

    @property
    def clusters(self) -> int:
        """How many numbers there are: as the file says, else one more than the highest."""
        return int(self.info.get("clusters", self.values.max(initial=-1) + 1))

    def rows(self, keys: Sequence[str]) -> Ids:
        """Row of each key, -1 where the file lacks it."""
        wanted = np.array([key.encode() for key in keys], dtype=np.bytes_)
        found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[found] == wanted, found, -1)

    def find(self, keys: Sequence[str]) -> list[NDArray[np.int32]]:
        """The list of each key, empty where the file lacks it."""
        return [
            self.values[self.starts[row] : self.starts[row + 1]] if row >= 0 else self.values[:0]
            for row in self.rows(keys).tolist()
        ]

    def find_texts(self, key: str) -> tuple[str, ...]:
        """The texts of one key; of numbers their digits."""
        numbers = self.find([key])[0].tolist()
        return tuple(self.texts[number] if self.texts else str(number) for number in numbers)

    def check_known(self, keys: Iterable[Sequence[str]], setting: str) -> None:
        """Raise ConfigError unless the file has one of the keys, which come in batches."""
        if not any((self.rows(some) >= 0).any() for some in keys if len(some)):
            raise ConfigError(f"{setting}: {self.path} has not one key of data.train: it belongs to other shards")


def load_sidecar(path: Path, column: str) -> Sidecar:
    """One column of a sidecar. Raises ConfigError for a file, a key or a value that cannot be used."""
    try:
        names = pq.read_schema(path).names
        missing = {"key", column}.difference(names)
        table = None if missing else read_columns(path, ["key", column]).combine_chunks()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"{path}: cannot be read as parquet ({error})") from error
    if table is None:
        raise ConfigError(f"{path}: lacks the column(s) {', '.join(sorted(missing))}; it has {', '.join(names)}")
    if not len(table):
        raise ConfigError(f"{path}: holds no row")
    keys = np.array([str(key).encode() for key in table.column("key").to_pylist()], dtype=np.bytes_)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if len(twice := keys[1:][keys[1:] == keys[:-1]]):
        raise ConfigError(f"{path}: key {twice[0].decode()!r} occurs twice: give every sample one row")
    lengths, values, texts = _lists(table.column(column), path, column)
    starts = np.concatenate([[0], lengths.cumsum()])
    picked = np.concatenate([[0], lengths[order].cumsum()])
    places = np.repeat(starts[:-1][order] - picked[:-1], lengths[order]) + np.arange(len(values))
    info = json.loads((table.schema.metadata or {}).get(INFO, b"{}"))
    return Sidecar(path, column, keys, picked, values[places], texts, info)


def _lists(column: pa.ChunkedArray, path: Path, name: str) -> tuple[Ids, NDArray[np.int32], tuple[str, ...]]:
    """(length of each list, values of all, distinct texts) of a column of lists or of single values."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0)
        values = pc.list_flatten(column)
    else:
        lengths = pc.cast(pc.is_valid(column), pa.int64())
        values = pc.drop_null(column)
    lengths = lengths.to_numpy().astype(np.int64)
    kind = values.type
    if values.null_count:
        raise ConfigError(f"{path}: a list of column {name!r} holds an empty value")
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        numbers = values.to_numpy().astype(np.int64)
        if numbers.min(initial=0) < 0 or numbers.max(initial=0) >= 2**31:
            raise ConfigError(f"{path}: column {name!r} holds a number outside 0 to 2^31 - 1")
        return lengths, numbers.astype(np.int32), ()
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ConfigError(f"{path}: column {name!r} is of {kind}: expected numbers, texts, or lists of them")
    texts = tuple(sorted(pc.unique(values).to_pylist()))
    numbers = pc.index_in(values, value_set=pa.array(texts, kind)).to_numpy()
    return lengths, numbers.astype(np.int32), texts


def write_sidecar(path: Path, tables: Iterable[pa.Table], info: dict[str, Any]) -> None:
    """Write tables of equal columns, one after the other, whole or not at all. Raises ValueError for none."""
    tables = iter(tables)
    first = next(tables, None)
    if first is None:
        raise ValueError(f"{path}: nothing to write")
    schema = first.schema.with_metadata({INFO: json.dumps(info, ensure_ascii=False).encode()})

    def write(stream: Any) -> None:
        with pq.ParquetWriter(stream, schema) as writer:
            for table in (first, *tables):
                writer.write_table(table.replace_schema_metadata(schema.metadata))

    write_atomic(path, write)
