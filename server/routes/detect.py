"""Open-vocabulary detection."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.detecting import FoundIn
from server.errors import ApiError, bad_request
from server.inputs import read_pictures
from server.limits import read_json
from server.model import Model, Seen
from server.routes.classify import check_count, labels_of
from server.schemas import body_of
from server.schemas.classify import inputs_of
from server.schemas.detect import DetectRequest, DetectResponse
from server.services import Services, services_of
from server.settings import Limits

router = APIRouter(tags=["native"])
BODIES = (DetectRequest,)

OPTIONS = ("threshold", "top_k", "nms")
SIDES = ("xmin", "ymin", "xmax", "ymax")


@router.post(
    "/v1/detect",
    response_model=DetectResponse,
    openapi_extra=body_of(DetectRequest, picture={"image": "iVBORw0KGgo...", "labels": ["cat", "dog"], "top_k": 10}),
)
async def detect(request: Request) -> Response:
    """Where in each picture are things of these names. A picture that cannot be used fails alone; 400 when none can."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, DetectRequest, limits)
    model = services.model(wanted.model)
    labels, templates = await labels_of(
        services, wanted.labels, wanted.templates, wanted.label_set, limits.detect_prompts
    )
    check_detection(len(labels) * len(templates), wanted.top_k, limits)
    inputs = inputs_of(wanted.image, wanted.images)
    check_count(inputs, limits)
    options = {name: value for name in OPTIONS if (value := getattr(wanted, name)) is not None}
    if wanted.templates is not None or wanted.label_set is not None:
        options["templates"] = tuple(templates)
    outcomes, guards = await detect_in(services, model, inputs, labels, options)
    data = [
        {"index": n, "width": None, "height": None, "detections": None, "error": found.content()}
        if isinstance(found, ApiError)
        else {
            "index": n, "width": found.width, "height": found.height, "error": None,
            "detections": [_object(one) for one in found.detections], **guard,
        }
        for n, (found, guard) in enumerate(zip(outcomes, guards, strict=True))
    ]  # fmt: skip
    return json_answer({"model": model.name, "data": data})


async def detect_in(
    services: Services, model: Model, inputs: Sequence[tuple[str, str]], labels: Sequence[str], options: dict[str, Any]
) -> tuple[list[FoundIn | ApiError], list[dict[str, Any]]]:
    """(objects, what the guard says) of (parameter, picture) inputs. Raises ApiError when no picture can be used."""
    decoded = await read_pictures(inputs)
    pictures = [(param, data) for (param, _), data in zip(inputs, decoded, strict=True) if isinstance(data, bytes)]
    found, seen = await asyncio.gather(
        services.detecting.detect(model, pictures, labels, options),
        _guarded(model, [data for _, data in pictures]),
    )
    rest, guards = iter(found), iter(seen)
    outcomes = [next(rest) if isinstance(data, bytes) else data for data in decoded]
    if all(isinstance(outcome, ApiError) for outcome in outcomes):
        raise next(outcome for outcome in outcomes if isinstance(outcome, ApiError))
    return outcomes, [next(guards) if isinstance(data, bytes) else {} for data in decoded]


async def _guarded(model: Model, pictures: Sequence[bytes]) -> list[dict[str, Any]]:
    """What the guard says of every picture; without a guard nothing, and nothing is computed."""
    if model.guarding is None:
        return [{} for _ in pictures]
    return [item.guard() if isinstance(item, Seen) else {} for item in await model.see_images(pictures)]


def check_detection(prompts: int, top_k: int | None, limits: Limits) -> None:
    """Refuse more prompts or objects than a request may cost. Raises ApiError 400."""
    if prompts > limits.detect_prompts:
        message = f"labels x templates makes {prompts} prompts, at most {limits.detect_prompts} can be looked for"
        raise bad_request(message, "labels", "too_many_items")
    if top_k is not None and top_k > limits.detections:
        raise bad_request(f"top_k: {top_k} objects, at most {limits.detections}", "top_k")


def _object(one: Any) -> dict[str, Any]:
    return {"label": one.label, "score": one.score, "box": dict(zip(SIDES, one.box, strict=True))}
