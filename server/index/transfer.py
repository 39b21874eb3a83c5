"""Points from one place to another: an embedding folder into a collection, a collection to a cluster or to a folder.

Everything can be interrupted and called again: what has arrived is recognised and left out.
Suffixes: N rows, D vector width.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.errors import PipelineError
from data_pipelines.files import write_atomic
from data_pipelines.parquet import read_columns
from server.index import Index, PayloadError, Point, PointId, as_id, check_payload
from server.index.folders import POINT_ID, Batch
from vlp.embed_files import EMBEDDERS

Advance = Callable[[int], None]
Illustrate = Callable[[Sequence[PointId], Sequence[Mapping[str, Any]]], Sequence[bytes | None]]
"""Thumbnails of points by their ids and payloads, in order."""
PAGE = 1000
PART_ROWS = 100_000
PART = re.compile(r"metadata_([0-9]+)\.parquet")


def pages(index: Index) -> Iterator[Batch]:
    """All points of an index."""
    after: PointId | None = None
    while True:
        points, after = index.scroll(after, PAGE, vectors=True)
        if points:
            yield [p.id for p in points], _rows(points), [p.payload for p in points]
        if after is None:
            return


def _rows(points: Sequence[Point]) -> NDArray[np.float32]:
    return np.stack([point.vector for point in points if point.vector is not None])


def put(
    batches: Iterable[Batch], index: Index, advance: Advance, overwrite: bool = False,
    illustrate: Illustrate | None = None,
) -> int:  # fmt: skip
    """Write points into an index; returns how many were not there before, or were written again.

    Without `overwrite` a point whose id and payload are there already is left alone, without `illustrate` no point gets
    a thumbnail. Raises PipelineError for a payload that does not fit the fields of the index.
    """
    written = 0
    info = index.info
    for ids, vectors_ND, payloads in batches:
        there = {} if overwrite else {point.id: point.payload for point in index.get(ids)}
        fresh = []
        for id, vector_D, payload in zip(ids, vectors_ND, payloads, strict=True):
            try:
                check_payload(payload, info.fields, info.captions)
            except PayloadError as error:
                raise PipelineError(f"point {id}: {error}") from error
            if there.get(id) != payload:
                fresh.append(Point(id, payload, vector_D))
        if illustrate is not None and fresh:
            jpegs = illustrate([point.id for point in fresh], [point.payload for point in fresh])
            fresh = [replace(point, thumbnail=jpeg) for point, jpeg in zip(fresh, jpegs, strict=True)]
        index.upsert(fresh)
        written += len(fresh)
        advance(len(ids))
    return written


def export(index: Index, out: Path, advance: Advance, part_rows: int = PART_ROWS) -> int:
    """Write an index as an embedding folder in clip-retrieval's layout; returns the number of parts.

    Parts that are there already are kept: a part's metadata is written last. Raises PipelineError for a folder that
    holds something else.
    """
    stem = EMBEDDERS[index.info.modality]
    number, after, more = _resume(out, index, advance)
    while more:
        gathered: list[Batch] = []
        rows = 0
        while more and rows < part_rows:
            points, after = index.scroll(after, min(PAGE, part_rows - rows), vectors=True)
            more = after is not None
            if points:
                gathered.append(([p.id for p in points], _rows(points), [p.payload for p in points]))
                rows += len(points)
                advance(len(points))
        if gathered:
            _write_part(out, stem, number, gathered)
            number += 1
    return number


def _write_part(out: Path, stem: str, number: int, gathered: Sequence[Batch]) -> None:
    vectors_ND = np.concatenate([batch[1] for batch in gathered])
    ids = [str(id) for batch in gathered for id in batch[0]]
    payloads = [payload for batch in gathered for payload in batch[2]]
    array = out / stem / f"{stem}_{number:06d}.npy"
    write_atomic(array, lambda stream: np.save(stream, vectors_ND, allow_pickle=False))
    table = _table(ids, payloads)
    write_atomic(out / "metadata" / f"metadata_{number:06d}.parquet", lambda stream: pq.write_table(table, stream))


def _table(ids: Sequence[str], payloads: Sequence[dict[str, Any]]) -> pa.Table:
    """image_path (the key), caption, the id, then the other payload fields; what has no common type becomes text."""
    names = dict.fromkeys(name for payload in payloads for name in payload if name not in ("key", "caption"))
    columns: dict[str, Any] = {
        "image_path": pa.array([str(p.get("key", id)) for id, p in zip(ids, payloads, strict=True)], pa.string()),
        "caption": pa.array([str(payload.get("caption", "")) for payload in payloads], pa.string()),
        POINT_ID: pa.array(ids, pa.string()),
    }
    for name in names:
        values = [payload.get(name) for payload in payloads]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            texts = [None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]
            columns[name] = pa.array(texts, pa.string())
    return pa.table(columns)


def _resume(out: Path, index: Index, advance: Advance) -> tuple[int, PointId | None, bool]:
    """(number of the next part, id at which it begins, whether there is anything left)."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "metadata").is_dir())):
        raise PipelineError(f"{out} exists and is no embedding folder: choose another --out")
    done = sorted(path for path in (out / "metadata").glob("*.parquet") if PART.fullmatch(path.name))
    if not done:
        return 0, None, True
    last = read_columns(done[-1])
    if POINT_ID not in last.column_names:
        raise PipelineError(f"{out} was not written by `vlp index export`: choose another --out")
    advance(sum(int(pq.read_metadata(path).num_rows) for path in done))
    text = last.column(POINT_ID).to_pylist()[-1]
    written = as_id(int(text) if text.isdecimal() else text)
    points, following = index.scroll(written, 1)
    if points and points[0].id != written:  # that point was deleted since
        return len(done), points[0].id, True
    return len(done), following, following is not None
