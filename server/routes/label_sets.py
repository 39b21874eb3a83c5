"""Named label sets: made once, used by name."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.errors import ApiError
from server.label_sets import LabelSet
from server.limits import read_json
from server.schemas import ErrorBody, body_of
from server.schemas.label_sets import (
    Deleted,
    LabelSetCard,
    LabelSetContent,
    LabelSetList,
    LabelSetRequest,
    check_prompts,
)
from server.services import services_of

router = APIRouter(tags=["native"])
writing = APIRouter(tags=["native"])
"""Routes that change what is kept."""
BODIES = (LabelSetRequest,)

MISSING: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "There is no such set."}}
EXAMPLE = {"name": "animals", "labels": ["cat", "dog"], "templates": ["a photo of a {}"]}


@writing.post(
    "/v1/label-sets",
    status_code=201,
    response_model=LabelSetCard,
    responses={
        200: {"model": LabelSetCard, "description": "A set of that name was replaced."},
        409: {"model": ErrorBody, "description": "A set of that name exists, or there are too many."},
    },
    openapi_extra=body_of(LabelSetRequest, animals=EXAMPLE),
)
async def create(request: Request) -> Response:
    """Keep a list of labels under a name, and embed its texts."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, LabelSetRequest, limits)
    model = services.model(wanted.model)
    check_prompts(wanted.labels, wanted.templates, limits, limits.set_prompts)
    if services.settings.workers > 1 and services.settings.label_sets is None:
        message = "the workers of this server keep no label sets together: start it with --label-sets FOLDER"
        raise ApiError(409, message, "label_sets_not_kept")
    fresh = LabelSet(
        name=wanted.name, labels=tuple(wanted.labels), templates=tuple(wanted.templates), created=int(time.time())
    )
    await model.heads.get(wanted.labels, wanted.templates)
    new = await services.in_thread(lambda: services.label_sets.put(fresh, wanted.replace))
    return json_answer(_card(fresh), 201 if new else 200)


@router.get("/v1/label-sets", response_model=LabelSetList)
async def list_all(request: Request) -> Response:
    """All sets, without their labels."""
    services = services_of(request)
    found = await services.in_thread(services.label_sets.all)
    return json_answer({"object": "list", "data": [_card(one) for one in found]})


@router.get("/v1/label-sets/{name}", response_model=LabelSetContent, responses=MISSING)
async def get(request: Request) -> Response:
    """One set."""
    services = services_of(request)
    name = request.path_params["name"]
    found = await services.in_thread(lambda: services.label_sets.get(name))
    return json_answer({**_card(found), "labels": found.labels})


@writing.delete("/v1/label-sets/{name}", response_model=Deleted, responses=MISSING)
async def delete(request: Request) -> Response:
    """Forget a set."""
    services = services_of(request)
    name = request.path_params["name"]
    await services.in_thread(lambda: services.label_sets.delete(name))
    return json_answer({"name": name, "deleted": True})


def _card(one: LabelSet) -> dict[str, Any]:
    return {
        "name": one.name, "object": "label_set", "count": len(one.labels), "templates": one.templates,
        "created": one.created,
    }  # fmt: skip
