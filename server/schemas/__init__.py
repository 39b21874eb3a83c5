"""Request and response bodies, one module per family of routes."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Body(BaseModel):
    """Base of all requests: unknown fields are accepted and ignored, because clients send extras; null is absent,
    because many of them send every field they know."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class Answer(BaseModel):
    """Base of all responses; they are documentation, the routes write plain JSON."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorObject(Answer):
    """What went wrong with a request or with one item of it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Answer):
    """Every answer that is not a success, of our own routes and OpenAI's."""

    error: ErrorObject
    message: str
    detail: str


class PlainError(Answer):
    """The same of Hugging Face's tasks and clip-retrieval's routes."""

    error: str
    code: str
    param: str | None


class CohereError(Answer):
    """The same of Cohere's routes."""

    message: str
    code: str
    param: str | None


class TeiError(Answer):
    """The same of text-embeddings-inference's routes."""

    error: str
    error_type: str


class GuardVerdict(Answer):
    """What the guard makes of a picture; there with `vlp serve --guard` alone."""

    score: float | None
    flagged: bool
    """Whether the score is above the guard's threshold."""


def body_of(model: type[BaseModel], **examples: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body itself; `app.openapi` collects the definitions."""
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}
