"""From a folder of embeddings (clip-retrieval's layout) to an index."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.errors import PipelineError
from data_pipelines.files import fsync_dir
from server.index import ALWAYS, FieldKind, IndexInfo
from server.index.edge import INFO, create_index
from vlp.embed_files import EMBEDDERS, find_parts, read_embed_info

Modality = Literal["image", "text"]
BATCH = 1000
PAYLOAD = ("key", "caption", "source", "labels")


def build_index(
    embeddings: Path, out: Path, modality: Modality, fields: Sequence[str], advance: Callable[[int], None]
) -> IndexInfo:
    """Index every row of `embeddings` into `out`, whole or not at all; an existing index there is replaced.

    `fields`: further metadata columns to keep as payload and to filter by. `advance` is told the rows done.
    Point ids are row positions over all parts in name order, as in clip-retrieval.
    """
    out = out.absolute()
    if out.exists() and not (out / INFO).exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(f"{out} exists and is not an index: choose another --out")
    parts = find_parts(embeddings, EMBEDDERS[modality])
    made_by = read_embed_info(embeddings)
    first = np.load(parts[0][0], mmap_mode="r", allow_pickle=False)
    info = IndexInfo(
        dim=int(first.shape[1]),
        modality=modality,
        model=made_by.model if made_by else "",
        weights_sha256=made_by.weights_sha256 if made_by else "",
        fields={**ALWAYS, **{name: _kind(name, parts[0][1]) for name in fields}},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        temp = Path(scratch) / "index"
        index = create_index(temp, info)
        try:
            for start, vectors_ND, payloads in _batches(parts, info.dim, fields):
                index.add(range(start, start + len(payloads)), vectors_ND, payloads)
                advance(len(payloads))
            index.finish()
        finally:
            index.close()
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        temp.rename(out)
    fsync_dir(out.parent)
    return index.info


def count_rows(embeddings: Path, modality: Modality) -> int:
    """Rows of an embedding folder, for a progress bar."""
    return sum(pq.read_metadata(table).num_rows for _, table in find_parts(embeddings, EMBEDDERS[modality]))


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
    if pa.types.is_string(column) or pa.types.is_large_string(column):
        return "keyword"
    raise PipelineError(f"--field {name}: columns of type {column} cannot be filtered by; text, integer and bool can")


def _batches(
    parts: Sequence[tuple[Path, Path]], dim: int, fields: Sequence[str]
) -> Iterator[tuple[int, NDArray[np.floating[Any]], list[dict[str, Any]]]]:
    """(first id, ND vectors, payloads) in steps of BATCH."""
    start = 0
    for array, table in parts:
        vectors_ND = np.load(array, mmap_mode="r", allow_pickle=False)
        metadata = pq.read_table(table)
        if vectors_ND.shape != (metadata.num_rows, dim):
            wanted = (metadata.num_rows, dim)
            raise PipelineError(
                f"{array}: shape {vectors_ND.shape}, but {table.name} and the other parts want {wanted}"
            )
        payloads = _payloads(metadata, fields)
        for at in range(0, len(payloads), BATCH):
            some_ND = np.asarray(vectors_ND[at : at + BATCH])
            norms_N = np.linalg.norm(some_ND.astype(np.float32), axis=1)
            if not (np.isfinite(norms_N) & (norms_N > 0)).all():
                raise PipelineError(f"{array}: a row between {at} and {at + len(some_ND) - 1} is zero or not finite")
            yield start + at, some_ND, payloads[at : at + BATCH]
        start += len(payloads)


def _payloads(metadata: pa.Table, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Payload of each row: what a search shows and filters by, nothing else of the metadata."""
    names = {"image_path": "key", **{name: name for name in (*PAYLOAD[1:], *fields)}}
    present = {column: name for column, name in names.items() if column in metadata.column_names}
    rows = metadata.select(list(present)).to_pylist()
    return [{present[column]: value for column, value in row.items() if value is not None} for row in rows]
