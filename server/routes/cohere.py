"""Cohere's embed routes, both versions."""

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import ENCODINGS, as_floats, json_answer
from server.batcher import Row
from server.inputs import check_dimensions, check_length, embed_entries
from server.limits import read_json
from server.schemas import body_of
from server.schemas.cohere import CohereRequest, CohereResponse, read_inputs
from server.services import services_of

router = APIRouter(tags=["Cohere"])
BODIES = (CohereRequest,)

EXAMPLES: dict[str, dict[str, Any]] = {
    "texts": {"texts": ["a red circle", "a cat"], "input_type": "search_query", "embedding_types": ["float", "int8"]},
    "picture": {"images": ["data:image/png;base64,iVBORw0KGgo..."], "input_type": "image"},
}


@router.post("/v2/embed", response_model=CohereResponse, openapi_extra=body_of(CohereRequest, **EXAMPLES))
async def embed(request: Request) -> Response:
    """Embed texts, pictures, or inputs of parts; each vector in all the encodings that are asked for."""
    wanted, rows, content = await _embedded(request, "2")
    types = wanted.embedding_types or ["float"]
    return json_answer({**content, "response_type": "embeddings_by_type", "embeddings": _by_type(rows, types)})


@router.post("/v1/embed", response_model=CohereResponse, openapi_extra=body_of(CohereRequest, **EXAMPLES))
async def embed_v1(request: Request) -> Response:
    """The same for older clients: without embedding_types a plain list of vectors."""
    wanted, rows, content = await _embedded(request, "1")
    if wanted.embedding_types is None:
        floats = [as_floats(row) for row in rows]
        return json_answer({**content, "response_type": "embeddings_floats", "embeddings": floats})
    by_type = _by_type(rows, wanted.embedding_types)
    return json_answer({**content, "response_type": "embeddings_by_type", "embeddings": by_type})


async def _embedded(request: Request, version: str) -> tuple[CohereRequest, list[Row], dict[str, Any]]:
    """(the request, its vectors, what both versions answer alike)."""
    services = services_of(request)
    wanted = await read_json(request, CohereRequest, services.settings.limits)
    model = services.model(wanted.model)
    check_dimensions(wanted.output_dimension, model, "output_dimension")
    entries = read_inputs(wanted, services.settings.limits)
    if wanted.truncate == "NONE":
        await check_length(model, [item for entry in entries for item in entry])
    rows, tokens, images = await embed_entries(model, entries)
    billed = {name: count for name, count in (("input_tokens", tokens), ("images", images)) if count}
    meta = {"api_version": {"version": version}, "billed_units": billed}
    return wanted, rows, {"id": f"embd-{uuid.uuid4().hex}", "texts": wanted.texts or [], "meta": meta}


def _by_type(rows: Sequence[Row], types: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [ENCODINGS[name](row) for row in rows] for name in types}
