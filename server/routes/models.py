"""Which models this server has."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.errors import ApiError
from server.model import Model
from server.schemas import ErrorBody
from server.schemas.operations import ModelCard, ModelList
from server.services import Services, services_of

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", response_model=ModelList)
@router.get("/models", include_in_schema=False)
async def list_models(request: Request) -> Response:
    """All models, as OpenAI lists them."""
    services = services_of(request)
    return json_answer({"object": "list", "data": [_card(services, model) for model in services.registry.all()]})


@router.get("/v1/models/{model}", response_model=ModelCard, responses={404: {"model": ErrorBody}})
@router.get("/models/{model}", include_in_schema=False)
async def get_model(request: Request) -> Response:
    """One model."""
    services = services_of(request)
    wanted = request.path_params["model"]
    found = [model for model in services.registry.all() if model.name == wanted]
    if not found:
        raise ApiError(404, f"model {wanted!r} is not served here", "model_not_found", "model")
    return json_answer(_card(services, found[0]))


def _card(services: Services, model: Model) -> dict[str, Any]:
    capabilities = ["embed", "image_embed", "classify", *(["search"] if services.collections.search_possible else [])]
    guard = {} if model.guarding is None else {"guard": model.guarding.state()}
    return {
        **guard,
        "id": model.name,
        "object": "model",
        "created": model.engine.created,
        "owned_by": "vlp",
        "capabilities": capabilities,
        "dimensions": model.dim,
    }
