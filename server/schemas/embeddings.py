"""POST /v1/embeddings, as OpenAI defines it, with the picture inputs of infinity, NV-CLIP and Jina."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from server.errors import bad_request
from server.images import is_data_uri
from server.schemas import Answer, Body
from server.settings import Limits

ITEM_SCHEMA = {
    "anyOf": [
        {"type": "string", "description": "Text, or a picture as data:image/...;base64,..."},
        {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        {
            "type": "object",
            "properties": {"image": {"type": "string", "description": "base64 or data URI"}},
            "required": ["image"],
        },
    ]
}
INPUT_SCHEMA = {"anyOf": [*ITEM_SCHEMA["anyOf"], {"type": "array", "items": ITEM_SCHEMA, "minItems": 1}]}
TOKEN_ADVICE = (
    "token ids cannot be read here, because this model has its own vocabulary: send text "
    "(in LangChain: check_embedding_ctx_length=False)"
)


class EmbeddingsRequest(Body):
    """What to embed. `input` is taken apart by `read_items`, which gives better messages than a union type."""

    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)] = Field(default=None, description="One item or a list.")
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    modality: Literal["text", "image", "auto"] = "text"
    """What a plain string is. A data:image/ URI is a picture in any case."""
    user: str | None = None


class Embedding(Answer):
    """One vector: L2-normalised floats, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float | None] | str


class Usage(Answer):
    """Text tokens; pictures count as 0."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Answer):
    """Vectors in the order of the input."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    id: str
    created: int


@dataclass(frozen=True, slots=True)
class Item:
    """One input: text, or a picture that is still base64."""

    kind: Literal["text", "image"]
    value: str
    param: str
    """Where it stands in the request."""


def read_items(request: EmbeddingsRequest, limits: Limits) -> list[Item]:
    """All inputs in order. Raises ApiError 400 naming the one at fault."""
    given = request.input
    if given is None:
        raise bad_request("input is missing: send a text, a list of texts, or pictures", "input", "missing")
    if isinstance(given, list):
        if not given:
            raise bad_request("input is an empty list", "input", "empty_input")
        if all(isinstance(part, int) for part in given):
            raise bad_request(TOKEN_ADVICE, "input", "token_ids")
        items = [_item(part, f"input[{number}]", request.modality) for number, part in enumerate(given)]
    else:
        items = [_item(given, "input", request.modality)]
    for kind, most in (("text", limits.texts), ("image", limits.images)):
        found = sum(item.kind == kind for item in items)
        if found > most:
            raise bad_request(f"input holds {found} {kind}s, a request may hold {most}", "input", "too_many_items")
    for item in items:
        if item.kind == "text":
            check_text(item.value, item.param, limits)
    return items


def _item(part: Any, param: str, modality: str) -> Item:
    if isinstance(part, str):
        picture = modality == "image" or is_data_uri(part)
        return _filled("image" if picture else "text", part, param)
    if isinstance(part, dict):
        given = [(kind, part[kind]) for kind in ("text", "image") if part.get(kind) is not None]
        if len(given) != 1 or not isinstance(given[0][1], str):
            raise bad_request(f'{param}: an object needs either "text" or "image", as a string', param, "invalid_item")
        return _filled("text" if given[0][0] == "text" else "image", given[0][1], param)
    if isinstance(part, list) and part and all(isinstance(number, int) for number in part):
        raise bad_request(f"{param}: {TOKEN_ADVICE}", param, "token_ids")
    raise bad_request(f'{param}: expected a string, {{"text": ...}} or {{"image": ...}}', param, "invalid_item")


def _filled(kind: Literal["text", "image"], value: str, param: str) -> Item:
    if not value:
        raise bad_request(f"{param} is empty", param, "empty_input")
    return Item(kind, value, param)


def check_text(text: str, param: str, limits: Limits) -> None:
    """Refuse a text that is too long. Raises ApiError 400."""
    if (length := len(text.encode())) > limits.text_bytes:
        raise bad_request(f"{param}: {length} bytes of text, limit {limits.text_bytes}", param, "text_too_long")
