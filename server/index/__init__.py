"""What the server asks of a vector index: `edge` is embedded, `cluster` a Qdrant server, `scan` exact and in memory."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.config import StrictModel
from server.index.filters import FieldKind, FilterError, PayloadError, Value, Where, check_filter, check_payload

__all__ = [
    "ALWAYS",
    "FieldKind",
    "FilterError",
    "Floats",
    "Hit",
    "Index",
    "IndexFailure",
    "IndexInfo",
    "NoKeywords",
    "PayloadError",
    "Point",
    "PointId",
    "Row",
    "Value",
    "Where",
    "as_id",
    "check_filter",
    "check_payload",
    "needs_keywords",
    "unit_rows",
]

Floats = NDArray[np.floating[Any]]
Row = NDArray[np.float32]
PointId = int | str
"""Unsigned 64-bit, or a UUID in its usual form."""

ALWAYS: Mapping[str, FieldKind] = {"key": "keyword", "source": "keyword", "labels": "keyword"}
"""Payload fields every index made from an embedding folder can be filtered by."""


class IndexInfo(StrictModel):
    """What an index holds; saved beside it as index.json."""

    format: int = 2
    dim: int
    modality: Literal["image", "text"] = "image"
    """Which embeddings were indexed."""
    model: str = ""
    """Name of the model that made the vectors; empty when the embedding folder did not say."""
    weights_sha256: str = ""
    fields: dict[str, FieldKind]
    """Payload fields that filters may name. Their indexes exist since before the first point."""
    captions: str = ""
    """Payload field whose words can be searched (BM25); empty for none."""
    language: str = "english"
    """Whose stop words and endings the keyword search knows; `none` takes words as they are."""
    thumbnails: int = 0
    """Longest side in pixels of the thumbnails kept beside the points; 0 keeps none."""
    points: int = 0
    indexed: int = 0
    """Points when the graph was built; those added since are scanned."""
    shard: str = "edge"
    """Folder of the engine's files beside index.json."""


@dataclass(frozen=True, slots=True)
class Point:
    """One entry; `vector` is None where it was not asked for."""

    id: PointId
    payload: dict[str, Any]
    vector: Row | None = None
    thumbnail: bytes | None = None
    """JPEG to be kept with it; reading gives it by `Index.thumbnails` alone."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One result; `score` is the cosine, or for keywords the BM25 score."""

    id: PointId
    score: float
    payload: dict[str, Any]
    vector: Row | None = None


class Index(Protocol):
    """A searchable collection. Methods block, and may be called from several threads."""

    @property
    def info(self) -> IndexInfo:
        """What it holds."""

    def search(
        self, query: Row, limit: int, where: Where | None = None, exact: bool = False, *, vectors: bool = False
    ) -> list[Hit]:
        """Best `limit` hits, best first, among the points whose payload fulfils all of `where`.

        Raises FilterError for a field or value it cannot filter by.
        """

    def keywords(self, text: str, limit: int, where: Where | None = None, *, vectors: bool = False) -> list[Hit]:
        """Best `limit` captions by BM25. Raises FilterError, and NoKeywords when captions were not declared."""

    def upsert(self, points: Sequence[Point]) -> None:
        """Insert or replace whole points; durable when it returns. Payloads were checked by `check_payload`.

        A point without a thumbnail loses the one it had.
        """

    def delete(self, ids: Sequence[PointId]) -> None:
        """Remove points; ids that are not there are no error. Durable when it returns."""

    def get(self, ids: Sequence[PointId], *, vectors: bool = False) -> list[Point]:
        """Points in the order of `ids`, without those that are not there."""

    def thumbnails(self, ids: Sequence[PointId]) -> dict[PointId, bytes]:
        """JPEGs of those points that have one."""

    def scroll(
        self, after: PointId | None, limit: int, where: Where | None = None, *, vectors: bool = False
    ) -> tuple[list[Point], PointId | None]:
        """(points from id `after` on in the order of ids, id to go on from); None begins, and says that this is all."""

    def count(self, where: Where | None = None) -> int:
        """Points that fulfil `where`."""

    def close(self) -> None:
        """Make everything durable and let go of the files."""


class IndexFailure(RuntimeError):
    """The engine refused or died; the message is for the log, not for clients."""


class NoKeywords(ValueError):
    """Keywords were asked of an index that has no caption field."""


def needs_keywords(info: IndexInfo) -> None:
    """Raises NoKeywords when an index has no captions to search in."""
    if not info.captions:
        raise NoKeywords("this collection was made without captions, so that keywords cannot be searched in it")


def as_id(value: Any) -> PointId:
    """A point id in its one form. Raises ValueError."""
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64:
        return value
    if isinstance(value, str) and len(value) <= 45:
        try:
            return str(uuid.UUID(value))
        except ValueError:
            pass
    raise ValueError(f"an id is a whole number from 0 to 2**64 - 1 or a UUID, not {str(value)[:40]!r}")


def unit_rows(points: Iterable[Point]) -> NDArray[np.float32]:
    """ND vectors of points that all have one, as float32 of length 1."""
    rows_ND = np.stack([np.asarray(point.vector, np.float32) for point in points])
    norms_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    if not (np.isfinite(norms_N1) & (norms_N1 > 0)).all():
        raise ValueError("a vector is zero or not finite")
    unit_ND: NDArray[np.float32] = rows_ND / norms_N1
    return unit_ND
