"""Health: /healthz says that the process runs, /readyz that the model answers. Neither needs a key."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.schemas.operations import Health
from server.services import services_of

router = APIRouter(tags=["operations"])


@router.get("/healthz", response_model=Health)
async def healthz() -> Response:
    """The process runs."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", response_model=Health, responses={503: {"model": Health}})
async def readyz(request: Request) -> Response:
    """The model has just answered a canary; 503 with the reason otherwise."""
    reason = await services_of(request).unready()
    if reason is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "reason": reason}, 503, headers={"Retry-After": "5"})
