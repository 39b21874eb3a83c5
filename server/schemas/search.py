"""POST /v1/search: the index by text or picture."""

from pydantic import ConfigDict, Field, StrictBool, StrictInt, model_validator

from server.schemas import Answer, Body, GuardVerdict


class SearchRequest(Body):
    """One query and what to return for it."""

    text: str | None = None
    image: str | None = Field(default=None, description="base64 or data URI")
    limit: int = Field(default=10, ge=1)
    filter: dict[str, StrictBool | StrictInt | str | list[StrictInt] | list[str]] | None = Field(
        default=None, description="field -> value, or a list of which any may match; all fields must match"
    )
    exact: bool = Field(default=False, description="Scan every vector instead of using the graph.")
    model: str | None = None

    @model_validator(mode="after")
    def _one_query(self) -> "SearchRequest":
        if (self.text is None) == (self.image is None):
            raise ValueError('give either "text" or "image"')
        if self.text == "" or self.image == "":
            raise ValueError("the query is empty")
        return self


class SearchHit(Answer):
    """One result; what the index keeps beside a vector follows as further fields."""

    model_config = ConfigDict(extra="allow")

    id: int
    score: float | None = Field(description="cosine")
    key: str | None = None
    caption: str | None = None
    source: str | None = None
    labels: list[str] | None = None


class SearchResponse(Answer):
    """Hits, best first."""

    model: str
    hits: list[SearchHit]
    guard: GuardVerdict | None = None
    """Of the picture that was searched with."""
