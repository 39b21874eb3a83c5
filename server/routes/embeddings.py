"""OpenAI's embeddings route for texts and pictures, infinity's for pictures, and Voyage's for lists of parts."""

import time
import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import ENCODINGS, json_answer
from server.batcher import Row
from server.inputs import check_dimensions, check_length, embed_entries
from server.limits import read_json
from server.schemas import body_of
from server.schemas.embeddings import (
    EmbeddingsRequest,
    EmbeddingsResponse,
    MultimodalRequest,
    MultimodalResponse,
    read_entries,
    read_inputs,
)
from server.services import services_of

router = APIRouter(tags=["OpenAI"])
BODIES = (EmbeddingsRequest, MultimodalRequest)

EXAMPLES: dict[str, dict[str, Any]] = {
    "texts": {"input": ["a red circle", "a cat"]},
    "picture": {"input": [{"image": "iVBORw0KGgo..."}]},
}


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingsResponse,
    openapi_extra=body_of(EmbeddingsRequest, **EXAMPLES),
)
@router.post("/embeddings", include_in_schema=False)
async def create_embeddings(request: Request) -> Response:
    """Embed texts and pictures into one space, in the order given."""
    wanted = await read_json(request, EmbeddingsRequest, services_of(request).settings.limits)
    return await _embed(request, wanted)


@router.post("/embeddings_image", include_in_schema=False)
@router.post("/v1/embeddings_image", include_in_schema=False)
async def create_image_embeddings(request: Request) -> Response:
    """The same, where every plain string is a picture."""
    wanted = await read_json(request, EmbeddingsRequest, services_of(request).settings.limits)
    return await _embed(request, wanted.model_copy(update={"modality": "image"}))


async def _embed(request: Request, wanted: EmbeddingsRequest) -> Response:
    services = services_of(request)
    model = services.model(wanted.model)
    check_dimensions(wanted.dimensions, model, "dimensions")
    rows, tokens, _ = await embed_entries(model, read_entries(wanted, services.settings.limits))
    return json_answer(
        {
            "object": "list",
            "data": _data(rows, wanted.encoding()),
            "model": model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "id": f"embd-{uuid.uuid4().hex}",
            "created": int(time.time()),
        }
    )


@router.post(
    "/v1/multimodalembeddings",
    response_model=MultimodalResponse,
    openapi_extra=body_of(MultimodalRequest, text={"inputs": [{"content": [{"type": "text", "text": "a cat"}]}]}),
    tags=["Voyage"],
)
@router.post("/multimodalembeddings", include_in_schema=False)
async def create_multimodal_embeddings(request: Request) -> Response:
    """Embed inputs that are lists of parts; several parts become one vector with `fusion` alone."""
    services = services_of(request)
    wanted = await read_json(request, MultimodalRequest, services.settings.limits)
    model = services.model(wanted.model)
    check_dimensions(wanted.output_dimension, model, "output_dimension")
    entries = read_inputs(wanted, services.settings.limits)
    if not wanted.truncation:
        await check_length(model, [item for entry in entries for item in entry])
    rows, tokens, _ = await embed_entries(model, entries)
    encoding = wanted.output_dtype or "float"
    if wanted.output_encoding is not None and encoding == "float":
        encoding = "base64"
    usage = {"text_tokens": tokens, "image_pixels": 0, "video_pixels": 0, "total_tokens": tokens}
    return json_answer({"object": "list", "data": _data(rows, encoding), "model": model.name, "usage": usage})


def _data(rows: list[Row], encoding: str) -> list[dict[str, Any]]:
    write = ENCODINGS[encoding]
    return [{"object": "embedding", "index": number, "embedding": write(row)} for number, row in enumerate(rows)]
