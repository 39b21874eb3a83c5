"""/v1/collections: collections, their points, and searches in them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictInt, WithJsonSchema, model_validator

from data_pipelines.pictures import THUMBNAIL_SIDES
from server.index import FieldKind, as_id
from server.index.filters import BOUNDS
from server.index.keywords import Language
from server.index.rank import CANDIDATES
from server.schemas import Answer, Body, ErrorObject, GuardVerdict

FIELD_NAME = r'^[^"\\\x00-\x1f\[\]]{1,128}$'
FILTER = (
    "field -> what it has to be: a value, a list of which any may match, a range of gte, gt, lte and lt, "
    'or {"not": value or list}. All fields must match; fields have to be declared in the collection.'
)
SCALAR_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "boolean"}]}
MATCH_SCHEMA: dict[str, Any] = {"anyOf": [*SCALAR_SCHEMA["anyOf"], {"type": "array", "items": SCALAR_SCHEMA}]}
RANGE_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "number"} for name in BOUNDS},
    "minProperties": 1,
    "additionalProperties": False,
}
NOT_SCHEMA = {
    "type": "object", "properties": {"not": MATCH_SCHEMA}, "required": ["not"], "additionalProperties": False
}  # fmt: skip
FILTER_SCHEMA = {
    "type": "object",
    "additionalProperties": {"anyOf": [*MATCH_SCHEMA["anyOf"], RANGE_SCHEMA, NOT_SCHEMA]},
}

Id = Annotated[StrictInt | str, AfterValidator(as_id)]
"""Of a point: a whole number, or a UUID."""
FieldName = Annotated[str, Field(pattern=FIELD_NAME)]
Filter = Annotated[dict[str, Any], WithJsonSchema(FILTER_SCHEMA)]
"""Checked by `server.index.check_filter`, which gives better messages than a union type."""
Vector = Annotated[list[float], Field(min_length=1, max_length=65_536)]
Weight = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


class CreateCollection(Body):
    """A new, empty collection. Its fields cannot be changed later: the index is built around them."""

    name: str
    fields: dict[FieldName, FieldKind] = Field(
        default={}, max_length=64, description="Payload fields that searches may filter by. Payloads may hold others."
    )
    captions: str = Field(
        default="caption", max_length=128, description="Payload field keywords search; empty for none."
    )
    language: Language = Field(default="english", description="Of the captions: its stop words and word endings.")
    modality: Literal["image", "text"] = Field(default="image", description="What the vectors are of.")
    model: str | None = Field(default=None, description="Model of the vectors; the default model when absent.")
    thumbnails: StrictInt | None = Field(
        default=None, ge=THUMBNAIL_SIDES[0], le=THUMBNAIL_SIDES[1],
        description="Keep a JPEG of points given as pictures, so many pixels long; absent: none.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _captions_are_text(self) -> "CreateCollection":
        if self.captions and self.fields.get(self.captions, "keyword") != "keyword":
            raise ValueError(f"captions: field {self.captions!r} is declared {self.fields[self.captions]}, not keyword")
        return self


class CollectionInfo(Answer):
    """What a collection holds. `points` of one that is not in use may lag behind after a crash."""

    name: str
    default: bool
    """Whether it is meant when a request names none."""
    model: str
    dimensions: int
    modality: str
    fields: dict[str, FieldKind]
    captions: str | None
    language: str
    thumbnails: int | None
    """Longest side of the points' thumbnails in pixels; null where none are kept."""
    points: int


class CollectionList(Answer):
    """All collections, the default first."""

    object: Literal["list"] = "list"
    data: list[CollectionInfo]


class Dropped(Answer):
    """A collection that is gone."""

    name: str
    dropped: bool


class GivenPoint(Body):
    """One entry, with exactly one of text, image and vector."""

    id: Id | None = Field(default=None, description="A UUID is made when absent.")
    text: str | None = Field(default=None, min_length=1)
    image: Any = Field(default=None, description="base64, data URI, or an object as in /v1/embeddings")
    vector: Vector | None = None
    payload: dict[str, Any] = {}


class UpsertRequest(Body):
    """Points to insert; whole points of the same id are replaced."""

    points: list[GivenPoint] = Field(min_length=1)
    model: str | None = None


class Upserted(Answer):
    """One point: its id, or why it was left out."""

    index: int
    id: int | str
    error: ErrorObject | None
    thumbnail: bool | None = None
    """Whether it has one now; absent where the collection keeps none."""
    guard: GuardVerdict | None = None


class UpsertResponse(Answer):
    """Points in the order of the request. Those without an error are on the disk."""

    collection: str
    upserted: int
    data: list[Upserted]


class SelectRequest(Body):
    """Points by `ids`, or by `filter`, or all; in pages when not by ids."""

    ids: list[Id] | None = None
    filter: Filter | None = Field(default=None, description=FILTER)
    after: Id | None = Field(default=None, description="`next` of the page before.")
    limit: int | None = Field(default=None, ge=1, description="Points per page; 100 when absent.")
    vectors: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> "SelectRequest":
        if self.ids is not None and (self.filter is not None or self.after is not None):
            raise ValueError("ids: give ids, or filter and after, not both")
        return self


class DeleteRequest(Body):
    """Points by `ids` or by `filter`."""

    ids: list[Id] | None = None
    filter: Filter | None = Field(default=None, min_length=1, description=FILTER)

    @model_validator(mode="after")
    def _one_way(self) -> "DeleteRequest":
        if (self.ids is None) == (self.filter is None):
            raise ValueError('give either "ids" or "filter"')
        return self


class StoredPoint(Answer):
    """One entry."""

    id: int | str
    payload: dict[str, Any]
    vector: list[float] | None = None


class PointList(Answer):
    """Points; `next` goes into `after` for the page that follows."""

    data: list[StoredPoint]
    next: int | str | None


class Deleted(Answer):
    """How many points are gone that were there."""

    deleted: int


class Query(Body):
    """One thing to search for, with exactly one of text, image, vector and id."""

    text: str | None = Field(default=None, min_length=1)
    image: Any = Field(default=None, description="base64, data URI, or an object as in /v1/embeddings")
    vector: Vector | None = None
    id: Id | None = Field(default=None, description="A point of this collection.")
    weight: Weight = 1.0


class Mmr(Body):
    """Spread the results out: maximal marginal relevance."""

    diversity: float = Field(default=0.5, ge=0, le=1, description="0: by score alone; 1: by unlikeness alone.")


class SearchPointsRequest(Body):
    """What to search for: one of text, image, vector and id here, any number in `queries`, or keywords."""

    text: str | None = Field(default=None, min_length=1)
    image: Any = Field(default=None, description="base64, data URI, or an object as in /v1/embeddings")
    vector: Vector | None = None
    id: Id | None = Field(default=None, description="A point of this collection.")
    weight: Weight = Field(default=1.0, description="Of that one beside `queries`.")
    queries: list[Query] = Field(default=[], description="Added to one vector, each times its weight.")
    negative: list[Query] = Field(default=[], description="Subtracted from it: results lead away from these.")
    keywords: str | None = Field(default=None, min_length=1, description="BM25 over the captions, alone or fused in.")
    share: float = Field(default=0.5, ge=0, le=1, description="Weight of the vector beside keywords.")
    filter: Filter | None = Field(default=None, description=FILTER)
    limit: int = Field(default=10, ge=1)
    offset: int = Field(default=0, ge=0)
    threshold: float | None = Field(default=None, ge=-1, le=1, description="Least cosine of a result.")
    mmr: Mmr | None = None
    candidates: int = Field(default=CANDIDATES, ge=1, description="Results looked at before fusing and spreading.")
    exact: bool = Field(default=False, description="Scan every vector instead of using the graph.")
    vectors: bool = Field(default=False, description="Return the vectors of the results.")
    model: str | None = None


class PointHit(Answer):
    """One result. `score` orders the results: the cosine, or the fused rank when keywords are given."""

    id: int | str
    score: float | None
    cosine: float | None
    bm25: float | None = None
    payload: dict[str, Any]
    vector: list[float] | None = None


class SearchPointsResponse(Answer):
    """Results, best first; `next` is the offset of the page that follows, null on the last."""

    collection: str
    model: str | None
    hits: list[PointHit]
    next: int | None
