"""OpenAI's embeddings route, for texts and pictures."""

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from data_pipelines.errors import BadSample
from server.answers import as_base64, as_floats, json_answer
from server.errors import bad_item, bad_request
from server.images import image_bytes
from server.limits import read_json
from server.schemas import ERRORS, body_of
from server.schemas.embeddings import EmbeddingsRequest, EmbeddingsResponse, Item, read_items
from server.services import Services, services_of

router = APIRouter(tags=["OpenAI"])

EXAMPLES: dict[str, dict[str, Any]] = {
    "texts": {"input": ["a red circle", "a cat"]},
    "picture": {"input": [{"image": "iVBORw0KGgo..."}]},
}


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingsResponse,
    responses=ERRORS,
    openapi_extra=body_of(EmbeddingsRequest, **EXAMPLES),
)
@router.post("/embeddings", include_in_schema=False)
async def create_embeddings(request: Request) -> Response:
    """Embed texts and pictures into one space, in the order given."""
    services = services_of(request)
    wanted = await read_json(request, EmbeddingsRequest, services.settings.limits)
    services.check_model(wanted.model)
    if wanted.dimensions:
        message = f"dimensions: this model's vectors have {services.engine.dim} and cannot be shortened; leave it out"
        raise bad_request(message, "dimensions")
    items = read_items(wanted, services.settings.limits)
    rows, tokens = await _embed(services, items)
    write = as_base64 if wanted.encoding_format == "base64" else as_floats
    return json_answer(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": write(row)} for i, row in enumerate(rows)],
            "model": services.engine.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "id": f"embd-{uuid.uuid4().hex}",
            "created": int(time.time()),
        }
    )


async def _embed(services: Services, items: list[Item]) -> tuple[list[Any], int]:
    """(one row per item, text tokens). Raises ApiError naming a picture that cannot be used."""
    pictures = [item for item in items if item.kind == "image"]
    data = [image_bytes(item.value, item.param) for item in pictures]
    (text_rows, tokens), image_rows = await asyncio.gather(
        services.embed_texts([item.value for item in items if item.kind == "text"]), services.embed_images(data)
    )
    for item, row in zip(pictures, image_rows, strict=True):
        if isinstance(row, BadSample):
            raise bad_item(row, item.param)
    texts, images = iter(text_rows), iter(image_rows)
    return [next(texts) if item.kind == "text" else next(images) for item in items], tokens
