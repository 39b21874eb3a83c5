"""POST /v1/embeddings as OpenAI defines it, with the inputs of infinity, NV-CLIP, Jina, llama-index, vLLM, Voyage."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, model_validator

from server.errors import bad_request
from server.schemas import Answer, Body
from server.schemas.items import (
    CONTENT_SCHEMA,
    ITEM_SCHEMA,
    TOKEN_ADVICE,
    Entry,
    Modality,
    check_fusion,
    check_items,
    read_content,
    read_entry,
)
from server.settings import Limits

ENTRY_SCHEMA = {"anyOf": [*ITEM_SCHEMA["anyOf"], CONTENT_SCHEMA]}
INPUT_SCHEMA = {"anyOf": [*ENTRY_SCHEMA["anyOf"], {"type": "array", "items": ENTRY_SCHEMA, "minItems": 1}]}
Encoding = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]


class EmbeddingsRequest(Body):
    """What to embed: `input`, or the `messages` of vLLM for one vector. Fields that nobody here knows are ignored."""

    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)] = Field(default=None, description="One item or a list.")
    messages: Annotated[Any, WithJsonSchema({"type": "array", "items": CONTENT_SCHEMA})] = Field(
        default=None, description="Instead of input: the content of user messages, which gives one vector."
    )
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    embedding_type: Encoding | None = Field(default=None, description="Jina's word for encoding_format.")
    encoding_type: Encoding | None = Field(default=None, description="llama-index' word for encoding_format.")
    dimensions: int | None = Field(default=None, ge=0)
    modality: Modality = "text"
    """What a plain string is. A data:image/ URI is a picture in any case; `auto` takes addresses of pictures and
    base64 of them for pictures."""
    normalized: bool = True
    fusion: Literal["mean"] | None = Field(
        default=None, description="How several parts of one input become one vector."
    )
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "EmbeddingsRequest":
        given = {self.encoding_format, self.embedding_type, self.encoding_type} - {None}
        if len(given) > 1:
            raise ValueError(f"encoding_format, embedding_type and encoding_type disagree: {sorted(map(str, given))}")
        if not self.normalized:
            raise ValueError("normalized: vectors always have length 1 here; leave it out")
        return self

    def encoding(self) -> str:
        """How vectors are to be written."""
        return self.encoding_format or self.embedding_type or self.encoding_type or "float"


class MultimodalRequest(Body):
    """Voyage's: every input is a list of parts and gives one vector."""

    inputs: Annotated[list[Any], WithJsonSchema({"type": "array", "items": CONTENT_SCHEMA, "minItems": 1})]
    model: str | None = None
    truncation: bool = True
    """False refuses texts that are longer than the model's context, which are cut otherwise."""
    output_encoding: Literal["base64"] | None = None
    output_dtype: Encoding | None = None
    output_dimension: int | None = Field(default=None, ge=0)
    fusion: Literal["mean"] | None = Field(
        default=None, description="How several parts of one input become one vector."
    )


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


class VoyageUsage(Answer):
    """Text tokens; pixels are not counted and always 0."""

    text_tokens: int
    image_pixels: int = 0
    video_pixels: int = 0
    total_tokens: int


class MultimodalResponse(Answer):
    """Vectors in the order of the input."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: VoyageUsage


def read_entries(request: EmbeddingsRequest, limits: Limits) -> list[Entry]:
    """All inputs in order, one per vector. Raises ApiError 400 naming the one at fault."""
    given = request.input
    if given is None and request.messages is not None:
        entries, where = [_of_messages(request.messages)], "messages"
    elif given is None:
        raise bad_request("input is missing: send a text, a list of texts, or pictures", "input", "missing")
    elif isinstance(given, list):
        where = "input"
        if not given:
            raise bad_request("input is an empty list", "input", "empty_input")
        if all(isinstance(part, int) for part in given):
            raise bad_request(TOKEN_ADVICE, "input", "token_ids")
        entries = [read_entry(part, f"input[{number}]", request.modality) for number, part in enumerate(given)]
    else:
        entries, where = [read_entry(given, "input", request.modality)], "input"
    check_items([item for entry in entries for item in entry], limits, where)
    check_fusion(entries, request.fusion)
    return entries


def _of_messages(given: Any) -> Entry:
    """Everything that users say, as one input."""
    if not isinstance(given, list) or not given:
        raise bad_request("messages: expected a list of messages", "messages", "invalid_item")
    parts: Entry = ()
    for number, message in enumerate(given):
        param = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role", "user") != "user":
            raise bad_request(f"{param}: only messages of the user can be embedded", param, "invalid_item")
        parts += read_content(message.get("content"), f"{param}.content")
    return parts


def read_inputs(request: MultimodalRequest, limits: Limits) -> list[Entry]:
    """The inputs of Voyage's request. Raises ApiError 400."""
    if not request.inputs:
        raise bad_request("inputs is an empty list", "inputs", "empty_input")
    entries = [read_entry(part, f"inputs[{number}]") for number, part in enumerate(request.inputs)]
    check_items([item for entry in entries for item in entry], limits, "inputs")
    check_fusion(entries, request.fusion)
    return entries
