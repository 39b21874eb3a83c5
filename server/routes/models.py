"""Which models this server has."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.errors import ApiError
from server.schemas import ErrorBody
from server.schemas.operations import ModelCard, ModelList
from server.services import Services, services_of

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", response_model=ModelList)
@router.get("/models", include_in_schema=False)
async def list_models(request: Request) -> Response:
    """All models, as OpenAI lists them."""
    return json_answer({"object": "list", "data": [_card(services_of(request))]})


@router.get("/v1/models/{model}", response_model=ModelCard, responses={404: {"model": ErrorBody}})
@router.get("/models/{model}", include_in_schema=False)
async def get_model(request: Request) -> Response:
    """One model."""
    services = services_of(request)
    wanted = request.path_params["model"]
    if wanted != services.engine.name:
        raise ApiError(404, f"model {wanted!r} is not served here", "model_not_found", "model")
    return json_answer(_card(services))


def _card(services: Services) -> dict[str, Any]:
    engine = services.engine
    capabilities = ["embed", "image_embed", "classify", *(["search"] if services.index is not None else [])]
    guard = {} if services.guarding is None else {"guard": services.guarding.state()}
    return {
        **guard,
        "id": engine.name,
        "object": "model",
        "created": engine.created,
        "owned_by": "vlp",
        "capabilities": capabilities,
        "dimensions": engine.dim,
    }
