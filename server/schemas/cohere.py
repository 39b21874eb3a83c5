"""POST /v2/embed and /v1/embed, as Cohere defines them."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, model_validator

from server.errors import bad_request
from server.schemas import Answer, Body
from server.schemas.embeddings import Encoding
from server.schemas.items import CONTENT_SCHEMA, Entry, Item, check_fusion, check_items, read_content
from server.settings import Limits


class CohereRequest(Body):
    """Exactly one of `texts`, `images` and `inputs`. `input_type` is taken and changes nothing: CLIP knows no roles."""

    model: str | None = None
    input_type: str | None = None
    texts: list[str] | None = None
    images: list[str] | None = Field(default=None, description="data URIs")
    inputs: Annotated[list[Any] | None, WithJsonSchema({"type": "array", "items": CONTENT_SCHEMA})] = None
    embedding_types: list[Encoding] | None = Field(
        default=None, description="float when absent. int8: 127 is 1.0; uint8: 0 is -1.0 and 255 is 1.0."
    )
    output_dimension: int | None = Field(default=None, ge=0)
    truncate: Literal["END", "START", "NONE"] = "END"
    """NONE refuses texts that are longer than the model's context. Only the END can be cut."""
    fusion: Literal["mean"] | None = Field(
        default=None, description="How several parts of one input become one vector."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "CohereRequest":
        if sum(given is not None for given in (self.texts, self.images, self.inputs)) != 1:
            raise ValueError("give exactly one of texts, images and inputs")
        if self.truncate == "START":
            raise ValueError('truncate: this model reads the beginning of a text: "END" or "NONE"')
        return self


class CohereEmbeddings(Answer):
    """Only what was asked for is there."""

    float_: list[list[float | None]] | None = Field(default=None, alias="float")
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class CohereResponse(Answer):
    """Vectors in the order of the input. With /v1/embed and no embedding_types, `embeddings` is a list of vectors."""

    id: str
    response_type: Literal["embeddings_by_type", "embeddings_floats"]
    embeddings: CohereEmbeddings | list[list[float | None]]
    texts: list[str]
    meta: dict[str, Any]


def read_inputs(request: CohereRequest, limits: Limits) -> list[Entry]:
    """All inputs in order, one per vector. Raises ApiError 400."""
    if request.texts is not None:
        where = "texts"
        entries: list[Entry] = [(Item("text", text, f"texts[{n}]"),) for n, text in enumerate(request.texts)]
    elif request.images is not None:
        where = "images"
        entries = [(Item("image", image, f"images[{n}]"),) for n, image in enumerate(request.images)]
    else:
        assert request.inputs is not None
        where = "inputs"
        entries = [_content(given, f"inputs[{n}]") for n, given in enumerate(request.inputs)]
    if not entries:
        raise bad_request(f"{where} is an empty list", where, "empty_input")
    for entry in entries:
        if not entry[0].value:
            raise bad_request(f"{entry[0].param} is empty", entry[0].param, "empty_input")
    check_items([item for entry in entries for item in entry], limits, where)
    check_fusion(entries, request.fusion)
    return entries


def _content(given: Any, param: str) -> Entry:
    if not isinstance(given, dict) or "content" not in given:
        raise bad_request(f'{param}: expected {{"content": [...]}}', param, "invalid_item")
    return read_content(given["content"], f"{param}.content")
