"""A Qdrant server or cluster behind the same protocol, for replicas that share their collections.

What a collection is (IndexInfo) lies in its metadata, so that any replica can open it. Thumbnails lie in a second
collection without vectors, so that searches do not carry them. `:memory:` in place of a URL
takes the client's own in-memory mode, which scans everything: for tests and for trying out.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException

from data_pipelines.errors import PipelineError
from server.index import (
    FieldKind,
    Hit,
    IndexFailure,
    IndexInfo,
    Point,
    PointId,
    Row,
    Where,
    as_id,
    check_filter,
    needs_keywords,
)
from server.index.edge import DENSE, EF, FULL_SCAN_THRESHOLD, OVERSAMPLING, field_path
from server.index.filters import BOUNDS
from server.index.keywords import NAME, document_words, query_words

T = TypeVar("T")
METADATA = "vlp"
"""Key of the collection's metadata."""
THUMBNAILS = ".thumbnails"
"""Ends the name of a collection's second one; no collection of a user can have it."""
MEMORY = ":memory:"
STEP = 500
"""Points per request."""
TIMEOUT = 30
SCHEMAS: Mapping[FieldKind, models.PayloadSchemaType] = {
    "keyword": models.PayloadSchemaType.KEYWORD,
    "integer": models.PayloadSchemaType.INTEGER,
    "float": models.PayloadSchemaType.FLOAT,
    "bool": models.PayloadSchemaType.BOOL,
}


@contextmanager
def _failures() -> Iterator[None]:
    """What the client raises when the cluster refuses or is away, as IndexFailure."""
    try:
        yield
    except (ApiException, ResponseHandlingException) as error:
        raise IndexFailure(f"Qdrant: {type(error).__name__}: {error}") from error


class ClusterIndex:
    """One collection of a cluster; see the protocol `Index`."""

    def __init__(self, client: QdrantClient, name: str, info: IndexInfo, memory: bool) -> None:
        """`memory`: whether the client scans everything itself, and search parameters have no meaning."""
        self._client, self._name, self._info, self._memory = client, name, info, memory

    @property
    def info(self) -> IndexInfo:
        """What it holds; `points` as of the last write or count from here."""
        return self._info

    def search(
        self, query: Row, limit: int, where: Where | None = None, exact: bool = False, *, vectors: bool = False
    ) -> list[Hit]:
        """Best hits by cosine."""
        quantisation = models.QuantizationSearchParams(ignore=exact, rescore=True, oversampling=OVERSAMPLING)
        params = models.SearchParams(hnsw_ef=max(EF, limit), exact=exact, quantization=quantisation)
        return self._query(query.tolist(), DENSE, limit, where, vectors, None if self._memory else params)

    def keywords(self, text: str, limit: int, where: Where | None = None, *, vectors: bool = False) -> list[Hit]:
        """Best captions by BM25."""
        needs_keywords(self._info)
        words = query_words(text, self._info.language)
        if words is None:
            check_filter(where or {}, self._info.fields)
            return []
        query = models.SparseVector(indices=words[0], values=words[1])
        return self._query(query, NAME, limit, where, vectors, None)

    def _query(
        self, query: Any, using: str, limit: int, where: Where | None, vectors: bool, params: models.SearchParams | None
    ) -> list[Hit]:
        check_filter(where or {}, self._info.fields)
        with _failures():
            found = self._client.query_points(
                self._name,
                query=query,
                using=using,
                limit=limit,
                query_filter=_conditions(where),
                with_payload=True,
                with_vectors=[DENSE] if vectors else False,
                search_params=params,
            ).points
        return [Hit(as_id(hit.id), float(hit.score), hit.payload or {}, _row(hit.vector)) for hit in found]

    def upsert(self, points: Sequence[Point]) -> None:
        """Insert or replace points; in the cluster's log when it returns."""
        with _failures():
            for at in range(0, len(points), STEP):
                self._illustrate(points[at : at + STEP])
                some = [self._stored(point) for point in points[at : at + STEP]]
                self._client.upsert(self._name, points=some, wait=True)
        self.count()

    def _illustrate(self, points: Sequence[Point]) -> None:
        """Store thumbnails, and delete those of points that have none now."""
        if not self._info.thumbnails:
            return
        shown = [
            models.PointStruct(id=p.id, vector={}, payload={"jpeg": base64.b64encode(p.thumbnail).decode()})
            for p in points
            if p.thumbnail
        ]
        bare = [point.id for point in points if not point.thumbnail]
        if shown:
            self._client.upsert(self._name + THUMBNAILS, points=shown, wait=True)
        if bare:
            self._client.delete(self._name + THUMBNAILS, models.PointIdsList(points=bare), wait=True)

    def thumbnails(self, ids: Sequence[PointId]) -> dict[PointId, bytes]:
        """JPEGs of points."""
        if not (ids and self._info.thumbnails):
            return {}
        with _failures():
            found = self._client.retrieve(self._name + THUMBNAILS, list(ids), with_payload=True)
        return {as_id(one.id): base64.b64decode((one.payload or {})["jpeg"]) for one in found}

    def _stored(self, point: Point) -> models.PointStruct:
        assert point.vector is not None
        vector: dict[str, Any] = {DENSE: point.vector.tolist()}
        if self._info.captions:
            words = document_words(point.payload.get(self._info.captions) or "", self._info.language)
            if words is not None:
                vector[NAME] = models.SparseVector(indices=words[0], values=words[1])
        return models.PointStruct(id=point.id, vector=vector, payload=point.payload)

    def delete(self, ids: Sequence[PointId]) -> None:
        """Remove points."""
        if ids:
            with _failures():
                self._illustrate([Point(id, {}) for id in ids])
                self._client.delete(self._name, points_selector=models.PointIdsList(points=list(ids)), wait=True)
            self.count()

    def get(self, ids: Sequence[PointId], *, vectors: bool = False) -> list[Point]:
        """Points by id."""
        if not ids:
            return []
        with _failures():
            records = self._client.retrieve(
                self._name, list(ids), with_payload=True, with_vectors=[DENSE] if vectors else False
            )
        found = {point.id: point for point in map(_point, records)}
        return [found[id] for id in ids if id in found]

    def scroll(
        self, after: PointId | None, limit: int, where: Where | None = None, *, vectors: bool = False
    ) -> tuple[list[Point], PointId | None]:
        """Points in the order of their ids."""
        check_filter(where or {}, self._info.fields)
        with _failures():
            records, following = self._client.scroll(
                self._name,
                scroll_filter=_conditions(where),
                limit=limit,
                offset=after,
                with_payload=True,
                with_vectors=[DENSE] if vectors else False,
            )
        return [_point(record) for record in records], None if following is None else as_id(following)

    def count(self, where: Where | None = None) -> int:
        """Points that fulfil `where`."""
        check_filter(where or {}, self._info.fields)
        with _failures():
            found = self._client.count(self._name, count_filter=_conditions(where), exact=True).count
        if not where:
            self._info = self._info.model_copy(update={"points": found})
        return found

    def close(self) -> None:
        """Nothing is held here; the client belongs to the store."""


def _point(record: models.Record) -> Point:
    return Point(as_id(record.id), record.payload or {}, _row(record.vector))


def _row(vector: Any) -> Row | None:
    dense = vector.get(DENSE) if isinstance(vector, dict) else vector
    return None if dense is None else np.asarray(dense, np.float32)


def _conditions(where: Where | None) -> models.Filter | None:
    if not where:
        return None
    must: list[Any] = []
    must_not: list[Any] = []
    for field, value in where.items():
        key = field_path(field)
        if isinstance(value, Mapping) and "not" in value:
            must_not.append(models.FieldCondition(key=key, match=_match(value["not"])))
        elif isinstance(value, Mapping):
            bounds = models.Range(**{name: float(value[name]) for name in BOUNDS if name in value})
            must.append(models.FieldCondition(key=key, range=bounds))
        else:
            must.append(models.FieldCondition(key=key, match=_match(value)))
    return models.Filter(must=must, must_not=must_not)


def _match(value: Any) -> models.Match:
    if isinstance(value, str | int):
        return models.MatchValue(value=value)
    return models.MatchAny(any=list(value))


class ClusterStore:
    """The collections of a cluster that vlp made; others there are left alone."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises PipelineError when nothing answers at `url`."""
        self._memory = url == MEMORY
        place: dict[str, Any] = {"location": MEMORY} if self._memory else {"url": url, "api_key": api_key}
        self._client = QdrantClient(**place, timeout=TIMEOUT, check_compatibility=False)
        self._shown = url
        self.names()

    def names(self) -> list[str]:
        """Collections made by vlp, sorted."""
        all_names = [found.name for found in self._asked(self._client.get_collections).collections]
        return sorted(name for name in all_names if self._info(name) is not None)

    def _asked(self, function: Callable[[], T]) -> T:
        try:
            with _failures():
                return function()
        except IndexFailure as error:
            raise PipelineError(f"{self._shown}: no Qdrant server answers there ({error.__cause__})") from error

    def _info(self, name: str) -> IndexInfo | None:
        kept = (self._asked(lambda: self._client.get_collection(name)).config.metadata or {}).get(METADATA)
        if kept is None:
            return None
        try:
            return IndexInfo.model_validate_json(kept)
        except ValidationError as error:
            raise PipelineError(f"{self._shown}: collection {name!r} was made by another version of vlp") from error

    def info(self, name: str) -> IndexInfo:
        """What a collection holds. Raises PipelineError."""
        return self.open(name).info

    def open(self, name: str) -> ClusterIndex:
        """A collection. Raises PipelineError."""
        info = self._info(name) if self._asked(lambda: self._client.collection_exists(name)) else None
        if info is None:
            raise PipelineError(f"{self._shown}: has no collection {name!r} made by vlp")
        index = ClusterIndex(self._client, name, info, self._memory)
        index.count()
        return index

    def create(self, name: str, info: IndexInfo) -> ClusterIndex:
        """A new collection, with its payload indexes. Raises FileExistsError."""
        if self._asked(lambda: self._client.collection_exists(name)):
            raise FileExistsError(name)
        int8 = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
        words = {NAME: models.SparseVectorParams(modifier=models.Modifier.IDF)} if info.captions else None
        if info.thumbnails:  # first: a collection that is there is whole
            self._drop_thumbnails(name)
            self._asked(lambda: self._client.create_collection(name + THUMBNAILS, vectors_config={}))
        self._asked(
            lambda: self._client.create_collection(
                name,
                vectors_config={DENSE: models.VectorParams(size=info.dim, distance=models.Distance.COSINE)},
                sparse_vectors_config=words,
                hnsw_config=models.HnswConfigDiff(m=16, ef_construct=100, full_scan_threshold=FULL_SCAN_THRESHOLD),
                quantization_config=models.ScalarQuantization(scalar=int8),
                metadata={METADATA: info.model_dump_json()},
            )
        )
        if not self._memory:  # where payload indexes have no effect, and the client says so on standard error
            for field, kind in info.fields.items():
                self._create_payload_index(name, field, kind)
        return ClusterIndex(self._client, name, info, self._memory)

    def _create_payload_index(self, name: str, field: str, kind: FieldKind) -> None:
        path, schema = field_path(field), SCHEMAS[kind]
        self._asked(lambda: self._client.create_payload_index(name, path, field_schema=schema, wait=True))

    def drop(self, name: str) -> None:
        """Delete a collection and its points."""
        self._asked(lambda: self._client.delete_collection(name))
        self._drop_thumbnails(name)

    def _drop_thumbnails(self, name: str) -> None:
        if self._asked(lambda: self._client.collection_exists(name + THUMBNAILS)):
            self._asked(lambda: self._client.delete_collection(name + THUMBNAILS))

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()
