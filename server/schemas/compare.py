"""/v1/similarity and /v1/rank: texts and pictures against each other."""

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, model_validator

from server.schemas import Answer, Body, ErrorObject
from server.schemas.items import ITEM_SCHEMA, Item, Modality, check_items, read_item
from server.settings import Limits

ITEMS_SCHEMA = {"type": "array", "items": ITEM_SCHEMA, "minItems": 1}


class SimilarityRequest(Body):
    """Two lists of texts and pictures; without `right`, `left` is compared with itself."""

    left: Annotated[list[Any], WithJsonSchema(ITEMS_SCHEMA)] = Field(min_length=1)
    right: Annotated[list[Any] | None, WithJsonSchema(ITEMS_SCHEMA)] = Field(default=None, min_length=1)
    modality: Modality = "text"
    """What a plain string is. A data:image/ URI is a picture in any case."""
    model: str | None = None

    def items(self, limits: Limits) -> tuple[list[Item], list[Item]]:
        """(left, right); right is empty when it is left out. Raises ApiError 400."""
        left = [read_item(given, f"left[{n}]", self.modality) for n, given in enumerate(self.left)]
        right = [read_item(given, f"right[{n}]", self.modality) for n, given in enumerate(self.right or [])]
        check_items([*left, *right], limits, "left and right" if right else "left")
        return left, right


class SimilarityResponse(Answer):
    """`cosines[i][j]` is left[i] with right[j]; null where one of the two could not be used."""

    model: str
    cosines: list[list[float | None]]
    errors: list[ErrorObject]
    """Why items could not be used; `param` names them."""


class RankRequest(Body):
    """A text or a picture, and what is to be put into order of likeness to it."""

    query: Annotated[Any, WithJsonSchema(ITEM_SCHEMA)]
    documents: Annotated[list[Any], WithJsonSchema(ITEMS_SCHEMA)] = Field(min_length=1)
    modality: Modality = "text"
    """What a plain string is. A data:image/ URI is a picture in any case."""
    top_k: int | None = Field(default=None, ge=1, description="Best documents to return; all when absent.")
    model: str | None = None

    @model_validator(mode="after")
    def _has_query(self) -> "RankRequest":
        if self.query is None:
            raise ValueError("query is missing")
        return self

    def items(self, limits: Limits) -> tuple[Item, list[Item]]:
        """(query, documents). Raises ApiError 400."""
        query = read_item(self.query, "query", self.modality)
        documents = [read_item(given, f"documents[{n}]", self.modality) for n, given in enumerate(self.documents)]
        check_items([query, *documents], limits, "query and documents")
        return query, documents


class Ranked(Answer):
    """One document: its place in the request, and its cosine with the query."""

    index: int
    cosine: float | None


class RankResponse(Answer):
    """Documents, best first; those of equal cosine in the order of the request."""

    model: str
    data: list[Ranked]
    errors: list[ErrorObject]
    """Why documents could not be used; `param` names them."""
