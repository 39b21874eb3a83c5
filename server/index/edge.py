"""Qdrant Edge: the Qdrant engine in this process, one folder per collection.

Measured rules it follows (100,000 x 512): payload indexes exist before the first point, because one made afterwards
leaves filtered search fast and wrong (recall .03-.17); full_scan_threshold stays at 10,000; int8 vectors are rescored
with twice the candidates, which lifts recall from .967 to 1.000; small collections are scanned exactly.

Every call of the binding holds Python's lock to its end: half a second for `flush`, minutes for `optimize`. A server
therefore runs it in a process of its own (`remote`), and acknowledges a write once the write-ahead log is on the disk
instead of flushing.
"""

import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as qe
from pydantic import ValidationError

from data_pipelines.config import explain
from data_pipelines.errors import PipelineError
from data_pipelines.files import fsync_dir, write_atomic
from server.index import FieldKind, Floats, Hit, IndexInfo, Point, PointId, Row, Where, check_filter, needs_keywords
from server.index.filters import BOUNDS
from server.index.keywords import NAME, document_words, query_words
from server.index.thumbs import Thumbs

INFO = "index.json"
FORMAT = 2
DENSE = ""
EXACT_BELOW = 10_000
"""Collections up to this size are scanned exactly: about as fast as the graph, and nothing is lost."""
EF = 128
OVERSAMPLING = 2.0
FULL_SCAN_THRESHOLD = 10_000
STEP = 1000
"""Points per call of the engine."""
SHARD_NAME = re.compile(r"edge(-[0-9]+)?")
PLAIN_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")

SCHEMAS: Mapping[FieldKind, qe.PayloadSchemaType] = {
    "keyword": qe.PayloadSchemaType.Keyword,
    "integer": qe.PayloadSchemaType.Integer,
    "float": qe.PayloadSchemaType.Float,
    # The binding of 0.9.0 makes MatchValue(True) the integer 1, which matches no boolean: they are kept as 0 and 1.
    "bool": qe.PayloadSchemaType.Integer,
}


class EdgeIndex:
    """One collection. Holds the engine's lock on its folder until `close`. Calls must not overlap."""

    def __init__(self, folder: Path, info: IndexInfo, shard: qe.EdgeShard) -> None:
        self._folder, self._info, self._shard = folder, info, shard
        self._bools = frozenset(field for field, kind in info.fields.items() if kind == "bool")
        self._points: int | None = None
        self.thumbs = Thumbs(folder, info)
        """For `upsert` and `delete`; whoever calls `add` and `remove` sees to them."""

    @property
    def info(self) -> IndexInfo:
        """What it holds."""
        if self._points is None:
            self._points = int(self._shard.info().points_count)
        return self._info.model_copy(update={"points": self._points})

    def add(self, ids: Sequence[PointId], vectors_ND: Floats, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Insert or replace points; durable after `sync` or `finish`."""
        rows = vectors_ND.astype(np.float32, copy=False)
        for at in range(0, len(ids), STEP):
            some = zip(ids[at : at + STEP], rows[at : at + STEP].tolist(), payloads[at : at + STEP], strict=True)
            self._shard.update(qe.UpdateOperation.upsert_points([self._stored(*point) for point in some]))
        self._points = None

    def _stored(self, id: PointId, vector: list[float], payload: Mapping[str, Any]) -> qe.Point:
        kept = {name: int(v) if name in self._bools and v is not None else v for name, v in payload.items()}
        dense: qe.Vector = vector
        if self._info.captions:
            words = document_words(payload.get(self._info.captions) or "", self._info.language)
            if words is not None:
                dense = {DENSE: vector, NAME: qe.SparseVector(*words)}
        return qe.Point(uuid.UUID(id) if isinstance(id, str) else id, dense, kept)

    def upsert(self, points: Sequence[Point]) -> None:
        """Insert or replace points; see the protocol."""
        if points:
            self.thumbs.put((point.id, point.thumbnail) for point in points)
            vectors_ND = np.stack([np.asarray(point.vector, np.float32) for point in points])
            self.add([point.id for point in points], vectors_ND, [point.payload for point in points])
            self.sync()

    def delete(self, ids: Sequence[PointId]) -> None:
        """Remove points; see the protocol."""
        self.thumbs.put((id, None) for id in ids)
        self.remove(ids)

    def remove(self, ids: Sequence[PointId]) -> None:
        """Remove points, durably."""
        if ids:
            self._shard.update(qe.UpdateOperation.delete_points(_native(ids)))
            self._points = None
            self.sync()

    def sync(self) -> None:
        """Put the write-ahead log on the disk: the engine does so only now and then. Opening replays it."""
        for path in (self._folder / self._info.shard / "wal").glob("open-*"):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def finish(self) -> None:
        """Build the graph, make everything durable and say so in index.json."""
        self.optimize()
        self._info = self.info.model_copy(update={"indexed": self.info.points})
        write_info(self._folder, self._info)

    def optimize(self) -> None:
        """Build the graph and empty the write-ahead log."""
        self._shard.optimize()
        self._shard.flush()
        self._points = None

    def search(
        self, query: Row, limit: int, where: Where | None = None, exact: bool = False, *, vectors: bool = False
    ) -> list[Hit]:
        """Best hits by cosine; see the protocol."""
        check_filter(where or {}, self._info.fields)
        exact = exact or self.info.points <= EXACT_BELOW
        quantisation = qe.QuantizationSearchParams(ignore=exact, rescore=True, oversampling=OVERSAMPLING)
        params = qe.SearchParams(hnsw_ef=max(EF, limit), exact=exact, quantization=quantisation)
        return self._query(qe.Query.Nearest(query.tolist()), limit, where, vectors, params)

    def keywords(self, text: str, limit: int, where: Where | None = None, *, vectors: bool = False) -> list[Hit]:
        """Best captions; see the protocol."""
        needs_keywords(self._info)
        check_filter(where or {}, self._info.fields)
        words = query_words(text, self._info.language)
        if words is None:
            return []
        return self._query(qe.Query.Nearest(qe.SparseVector(*words), using=NAME), limit, where, vectors, None)

    def _query(
        self, query: qe.Query, limit: int, where: Where | None, vectors: bool, params: qe.SearchParams | None
    ) -> list[Hit]:
        found = self._shard.query(
            qe.QueryRequest(
                limit=limit,
                query=query,
                filter=_conditions(where),
                with_payload=True,
                with_vector=[DENSE] if vectors else False,
                params=params,
            )
        )
        return [Hit(_id(p.id), float(p.score), self._shown(p.payload), _row(p.vector)) for p in found]

    def get(self, ids: Sequence[PointId], *, vectors: bool = False) -> list[Point]:
        """Points by id; see the protocol."""
        found = {point.id: point for point in map(self._point, self._retrieve(ids, vectors))}
        return [found[id] for id in ids if id in found]

    def _retrieve(self, ids: Sequence[PointId], vectors: bool) -> list[qe.Record]:
        return self._shard.retrieve(_native(ids), True, [DENSE] if vectors else False) if ids else []

    def thumbnails(self, ids: Sequence[PointId]) -> dict[PointId, bytes]:
        """JPEGs of points; see the protocol."""
        return self.thumbs.get(ids)

    def scroll(
        self, after: PointId | None, limit: int, where: Where | None = None, *, vectors: bool = False
    ) -> tuple[list[Point], PointId | None]:
        """Points in the order of their ids; see the protocol."""
        check_filter(where or {}, self._info.fields)
        found, following = self._shard.scroll(
            qe.ScrollRequest(
                offset=None if after is None else _native([after])[0],
                limit=limit,
                filter=_conditions(where),
                with_payload=True,
                with_vector=[DENSE] if vectors else False,
            )
        )
        return [self._point(point) for point in found], None if following is None else _id(following)

    def count(self, where: Where | None = None) -> int:
        """Points that fulfil `where`."""
        check_filter(where or {}, self._info.fields)
        return int(self._shard.count(qe.CountRequest(filter=_conditions(where), exact=True)))

    def _point(self, record: qe.Record) -> Point:
        return Point(_id(record.id), self._shown(record.payload), _row(record.vector))

    def _shown(self, payload: dict[str, Any] | None) -> dict[str, Any]:
        shown = payload or {}
        return {n: bool(v) if n in self._bools and v is not None else v for n, v in shown.items()}

    def close(self) -> None:
        """Flush and unlock."""
        self.thumbs.close()
        self._shard.close()


def _native(ids: Sequence[PointId]) -> "list[qe.PointId]":
    return [uuid.UUID(id) if isinstance(id, str) else id for id in ids]


def _id(id: "qe.PointId") -> PointId:
    return id if isinstance(id, int) else str(id)


def _row(vector: Any) -> Row | None:
    dense = vector.get(DENSE) if isinstance(vector, dict) else vector
    return None if dense is None else np.asarray(dense, np.float32)


def _conditions(where: Where | None) -> qe.Filter | None:
    if not where:
        return None
    must: list[qe.ConditionType] = []
    must_not: list[qe.ConditionType] = []
    for field, value in where.items():
        key = field_path(field)
        if isinstance(value, Mapping) and "not" in value:
            must_not.append(qe.FieldCondition(key, match=_match(value["not"])))
        elif isinstance(value, Mapping):
            bounds = {name: float(value[name]) for name in BOUNDS if name in value}
            must.append(qe.FieldCondition(key, range=qe.RangeFloat(**bounds)))
        else:
            must.append(qe.FieldCondition(key, match=_match(value)))
    return qe.Filter(must=must, must_not=must_not)


def _match(value: Any) -> "qe.MatchType":
    if isinstance(value, str | int):  # check_filter has seen to it that a list holds either words or numbers
        return qe.MatchValue(int(value) if isinstance(value, bool) else value)
    return qe.MatchAny(list(value))


def field_path(field: str) -> str:
    """A payload field as the engine names it: a dot would lead into an object unless the name stands in quotes."""
    return field if PLAIN_FIELD.fullmatch(field) else f'"{field}"'


def create_index(folder: Path, info: IndexInfo) -> EdgeIndex:
    """An empty collection in a new or empty folder, with the payload indexes of `info.fields`."""
    words = {NAME: qe.EdgeSparseVectorParams(modifier=qe.Modifier.Idf)} if info.captions else None
    config = qe.EdgeConfig(
        vectors={DENSE: qe.EdgeVectorParams(size=info.dim, distance=qe.Distance.Cosine)},
        sparse_vectors=words,
        hnsw_config=qe.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=FULL_SCAN_THRESHOLD),
        quantization_config=qe.ScalarQuantizationConfig(type=qe.ScalarType.Int8, memory=qe.Memory.Pinned),
    )
    path = folder / info.shard
    path.mkdir(parents=True)
    shard = qe.EdgeShard.create(str(path), config)
    for field, kind in info.fields.items():
        shard.update(qe.UpdateOperation.create_field_index(field_path(field), SCHEMAS[kind]))
    index = EdgeIndex(folder, info, shard)
    index.sync()
    for made in (path / "wal", path, folder):
        fsync_dir(made)
    return index


def open_index(folder: Path, patience: float = 0.0) -> EdgeIndex:
    """The collection in `folder`. Raises PipelineError saying what is wrong with it.

    `patience`: seconds to wait for a process that has it open: one whose server was killed is about to end.
    """
    info = read_info(folder)
    deadline = time.monotonic() + patience
    try:
        shard = qe.EdgeShard.load(str(folder / info.shard))
    except Exception as error:  # the engine raises nothing narrower
        if "WouldBlock" in str(error):
            if (left := deadline - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))
                return open_index(folder, deadline - time.monotonic())
            raise PipelineError(f"{folder}: another process has this index open; stop it, or serve a copy") from error
        raise PipelineError(f"{folder}: the index is damaged ({error}); build it again") from error
    return EdgeIndex(folder, info, shard)


def write_info(folder: Path, info: IndexInfo) -> None:
    """Publish index.json."""
    content = info.model_dump_json(indent=2).encode()
    write_atomic(folder / INFO, lambda stream: stream.write(content))


def read_info(folder: Path) -> IndexInfo:
    """index.json of an index folder. Raises PipelineError."""
    path = folder / INFO
    if not path.is_file():
        raise PipelineError(f"{folder}: no index here ({INFO} is missing); `vlp index build` makes one")
    try:
        info = IndexInfo.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise PipelineError(f"{path}: {explain(error)}") from error
    if info.format > FORMAT:
        raise PipelineError(f"{path}: format {info.format} was written by a newer vlp; this one reads up to {FORMAT}")
    if not SHARD_NAME.fullmatch(info.shard):
        raise PipelineError(f"{path}: shard {info.shard!r} is no folder of this index")
    return info
