"""Embedding folders (clip-retrieval's layout) as points: vectors in steps, payloads with what a search shows.

A folder of clip-retrieval's faiss indices (image.index, text.index, metadata/) is read as well, with the faiss extra.
Suffixes: N rows, D vector width.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.errors import PipelineError
from data_pipelines.parquet import read_columns
from server.index import ALWAYS, FieldKind, IndexInfo, PointId, as_id
from vlp.embed_files import EMBEDDERS, find_parts, read_embed_info

Modality = Literal["image", "text"]
BATCH = 1000
PAYLOAD = ("key", "caption", "source", "labels")
CAPTION = "caption"
POINT_ID = "point_id"
"""Column of our own exports: the id a point had."""

Batch = tuple[list[PointId], NDArray[np.float32], list[dict[str, Any]]]
"""(ids, vectors_ND, payloads)."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that belong together: a metadata table, and where their vectors are."""

    table: Path
    array: Path
    """An .npy file, or a faiss index that holds the vectors of all parts one after another."""
    rows: int
    first: int
    """Row of all rows at which this part begins."""


def parts_of(folder: Path, modality: Modality) -> list[Part]:
    """Parts in name order. Raises PipelineError when there are none, or one is incomplete."""
    faiss_file = folder / f"{modality}.index"
    if faiss_file.exists():
        tables = sorted((folder / "metadata").glob("*.parquet"))
        if not tables:
            raise PipelineError(
                f"{folder / 'metadata'}: holds no .parquet, which would say what the rows of the index are"
            )
        pairs = [(faiss_file / "populated.index" if faiss_file.is_dir() else faiss_file, table) for table in tables]
    else:
        pairs = find_parts(folder, EMBEDDERS[modality])
    parts: list[Part] = []
    first = 0
    for array, table in pairs:
        rows = int(pq.read_metadata(table).num_rows)
        parts.append(Part(table, array, rows, first))
        first += rows
    return parts


def count_rows(folder: Path, modality: Modality) -> int:
    """Rows of an embedding folder, for a progress bar."""
    return sum(part.rows for part in parts_of(folder, modality))


def info_of(folder: Path, modality: Modality, fields: Sequence[str]) -> IndexInfo:
    """What an index of this folder would be. `fields`: further metadata columns to filter by. Raises PipelineError."""
    parts = parts_of(folder, modality)
    made_by = read_embed_info(folder)
    names = pq.read_schema(parts[0].table).names
    return IndexInfo(
        dim=_vectors(parts[0], 0, min(1, parts[0].rows)).shape[1],
        modality=modality,
        model=made_by.model if made_by else "",
        weights_sha256=made_by.weights_sha256 if made_by else "",
        fields={**ALWAYS, **{name: _kind(name, parts[0].table) for name in fields}},
        captions=CAPTION if CAPTION in names else "",
    )


def _kind(name: str, table: Path) -> FieldKind:
    schema = pq.read_schema(table)
    if name not in schema.names:
        raise PipelineError(f"--field {name}: no such column in the metadata; there are: {', '.join(schema.names)}")
    column = schema.field(name).type
    if pa.types.is_boolean(column):
        return "bool"
    if pa.types.is_list(column) and not pa.types.is_boolean(column.value_type):
        column = column.value_type
    if pa.types.is_integer(column):
        return "integer"
    if pa.types.is_floating(column):
        return "float"
    if pa.types.is_string(column) or pa.types.is_large_string(column):
        return "keyword"
    raise PipelineError(
        f"--field {name}: columns of type {column} cannot be filtered by; text, numbers and booleans can"
    )


def batches(folder: Path, modality: Modality, dim: int, fields: Sequence[str], start: int = 0) -> Iterator[Batch]:
    """All rows from row `start` on, BATCH at a time. Raises PipelineError for vectors that are none."""
    for part in parts_of(folder, modality):
        if part.first + part.rows <= start:
            continue
        ids, payloads = _metadata(part, fields)
        for at in range(max(0, start - part.first), part.rows, BATCH):
            some_ND = _vectors(part, at, min(BATCH, part.rows - at)).astype(np.float32)
            if some_ND.shape[1] != dim:
                raise PipelineError(f"{part.array}: vectors of width {some_ND.shape[1]}, but the others have {dim}")
            norms_N = np.linalg.norm(some_ND, axis=1)
            if not (np.isfinite(norms_N) & (norms_N > 0)).all():
                last = at + len(some_ND) - 1
                raise PipelineError(f"{part.array}: a row between {at} and {last} is zero or not finite")
            yield ids[at : at + BATCH], some_ND, payloads[at : at + BATCH]


def _vectors(part: Part, at: int, count: int) -> NDArray[np.floating[Any]]:
    """Rows `at` to `at + count` of a part."""
    if part.array.suffix == ".index":
        return _faiss_rows(part.array, part.first + at, count)
    vectors_ND: NDArray[np.floating[Any]] = np.load(part.array, mmap_mode="r", allow_pickle=False)
    if vectors_ND.ndim != 2 or len(vectors_ND) != part.rows:
        raise PipelineError(f"{part.array}: shape {vectors_ND.shape}, but {part.table.name} has {part.rows} rows")
    return vectors_ND[at : at + count]


def _faiss_rows(path: Path, first: int, count: int) -> NDArray[np.float32]:
    if importlib.util.find_spec("faiss") is None:
        raise PipelineError(f"{path} is a faiss index: pip install 'vlp[faiss]' to read it")
    index = _open_faiss(path)
    if index.ntotal < first + count:
        raise PipelineError(f"{path}: holds {index.ntotal} vectors, but the metadata has more rows")
    rows_ND: NDArray[np.float32] = index.reconstruct_n(first, count)
    return rows_ND


_FAISS: dict[tuple[Path, int, int], Any] = {}
"""The one faiss index that was read last; it may have gigabytes."""


def _open_faiss(path: Path) -> Any:
    import faiss

    known = (path, path.stat().st_mtime_ns, path.stat().st_size)
    if known not in _FAISS:
        _FAISS.clear()
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise PipelineError(f"{path}: faiss cannot read it ({str(error).splitlines()[-1]})") from error
        inner = faiss.extract_index_ivf(index) if hasattr(faiss, "extract_index_ivf") and _is_ivf(index) else None
        if inner is not None:
            inner.make_direct_map()  # without it an inverted file does not know where its rows are
        _FAISS[known] = index
    return _FAISS[known]


def _is_ivf(index: Any) -> bool:
    import faiss

    return faiss.try_extract_index_ivf(index) is not None


def _metadata(part: Part, fields: Sequence[str]) -> tuple[list[PointId], list[dict[str, Any]]]:
    """(ids, payloads) of a part: what a search shows and filters by, nothing else of the metadata.

    Ids are row positions over all parts in name order, as in clip-retrieval, or those an export wrote down.
    """
    table = read_columns(part.table)
    names = {"image_path": "key", **{name: name for name in (*PAYLOAD[1:], "url", *fields)}}
    present = {column: name for column, name in names.items() if column in table.column_names}
    payloads = [
        {present[column]: value for column, value in row.items() if value is not None}
        for row in table.select(list(present)).to_pylist()
    ]
    if not present:
        payloads = [{} for _ in range(part.rows)]
    if POINT_ID not in table.column_names:
        return list(range(part.first, part.first + part.rows)), payloads
    try:
        given = table.column(POINT_ID).to_pylist()
        return [as_id(int(id) if isinstance(id, str) and id.isdecimal() else id) for id in given], payloads
    except ValueError as error:
        raise PipelineError(f"{part.table}: column {POINT_ID}: {error}") from error
