"""Steering and watching the server: metrics, and exchanging a model."""

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from server.answers import json_answer
from server.auth import needs
from server.metrics import others, text
from server.schemas import ErrorBody
from server.schemas.operations import Reloaded
from server.services import services_of

router = APIRouter(tags=["operations"])

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/metrics", dependencies=[Depends(needs("read"))], response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus' text format; the sum over all workers, the others' numbers at most a second old."""
    services = services_of(request)
    services.measure()
    states = [services.metrics.state()]
    if (folder := services.settings.shared) is not None:
        states += await services.in_thread(lambda: others(folder))
    return Response(text(states), media_type=PROMETHEUS)


@router.post(
    "/v1/models/{model}/reload",
    dependencies=[Depends(needs("admin"))],
    response_model=Reloaded,
    responses={404: {"model": ErrorBody}, 409: {"model": ErrorBody, "description": "The old model stays."}},
)
async def reload_model(request: Request) -> Response:
    """Load a model again from its folder. Requests that have begun are answered by the old one, no request waits."""
    services = services_of(request)
    model = await services.registry.reload(request.path_params["model"])
    services.on_reload(model.name)
    return json_answer({"model": model.name, "weights_sha256": model.digest, "dimensions": model.dim})
