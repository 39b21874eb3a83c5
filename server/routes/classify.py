"""Zero-shot classification. Suffixes: N pictures, L labels, U prompts for unknown, D embedding width."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.batcher import Row
from server.engine import Vectors
from server.errors import ApiError, bad_request
from server.inputs import see_pictures
from server.limits import read_json
from server.model import Model, Seen
from server.schemas import body_of
from server.schemas.classify import UNKNOWN, ClassifyRequest, ClassifyResponse, Unknown, inputs_of
from server.schemas.items import check_text
from server.schemas.label_sets import check_prompts
from server.services import Services, services_of
from server.settings import Limits

router = APIRouter(tags=["native"])
BODIES = (ClassifyRequest,)

EXAMPLES: dict[str, dict[str, Any]] = {
    "picture": {"image": "iVBORw0KGgo...", "labels": ["cat", "dog"], "templates": ["a photo of a {}"], "top_k": 1},
    "open": {"images": ["iVBORw0KGgo..."], "label_set": "animals", "unknown": {"prompts": ["sky"], "min_cosine": 0.2}},
}


@router.post(
    "/v1/classify",
    response_model=ClassifyResponse,
    openapi_extra=body_of(ClassifyRequest, **EXAMPLES),
)
async def classify(request: Request) -> Response:
    """Which of the labels each picture shows. A picture that cannot be used fails alone; 400 when none can."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, ClassifyRequest, limits)
    model = services.model(wanted.model)
    labels, templates = await labels_of(services, wanted.labels, wanted.templates, wanted.label_set)
    inputs = inputs_of(wanted.image, wanted.images)
    check_count(inputs, limits)
    others = wanted.unknown.prompts if wanted.unknown else []
    _check_unknown(wanted.unknown, labels, limits)
    seen, head_LD, others_UD = await asyncio.gather(
        see_pictures(model, inputs), model.heads.get(labels, templates), _prompts(model, others)
    )
    images = usable(seen)
    head_LD = np.concatenate([head_LD, others_UD]) if others else head_LD
    probabilities, cosines = await model.classify(np.stack([image.row for image in images]), head_LD, len(head_LD))
    scores = iter(zip(probabilities, cosines, strict=True))
    data = [
        {"index": index, "predictions": None, "error": outcome.content()}
        if isinstance(outcome, ApiError)
        else {"index": index, "error": None, **_judged(wanted, labels, *next(scores)), **outcome.guard()}
        for index, outcome in enumerate(seen)
    ]
    return json_answer({"model": model.name, "data": data})


async def labels_of(
    services: Services,
    labels: list[str] | None,
    templates: list[str] | None,
    label_set: str | None,
    most: int | None = None,
) -> tuple[list[str], list[str]]:
    """(labels, templates) of a request or of the set it names. Raises ApiError 400, 404.

    `most`: prompts that labels given in the request may make; default: as many texts as fit into one.
    """
    if label_set is not None:
        found = await services.in_thread(lambda: services.label_sets.get(label_set))
        return [*found.labels], [*found.templates]
    assert labels is not None
    limits = services.settings.limits
    check_prompts(labels, templates or ["{}"], limits, most or limits.texts)
    return labels, templates or ["{}"]


def check_count(inputs: Sequence[tuple[str, str]], limits: Limits) -> None:
    """Refuse too many pictures. Raises ApiError 400."""
    if len(inputs) > limits.images:
        raise bad_request(f"images: {len(inputs)} pictures, at most {limits.images}", "images", "too_many_items")


def usable(outcomes: Sequence[Seen | ApiError]) -> list[Seen]:
    """The pictures that can be used. Raises the first one's ApiError when none can."""
    good = [outcome for outcome in outcomes if isinstance(outcome, Seen)]
    if not good:
        raise next(outcome for outcome in outcomes if isinstance(outcome, ApiError))
    return good


def _check_unknown(unknown: Unknown | None, labels: Sequence[str], limits: Limits) -> None:
    if unknown is None:
        return
    if UNKNOWN in labels:
        raise bad_request(f"labels: {UNKNOWN!r} is what a picture is called that shows none of them", "labels")
    if len(unknown.prompts) > limits.texts:
        raise bad_request("unknown.prompts: too many", "unknown.prompts", "too_many_items")
    for number, text in enumerate(unknown.prompts):
        check_text(text, f"unknown.prompts[{number}]", limits)


async def _prompts(model: Model, texts: Sequence[str]) -> Vectors:
    return await model.heads.get(texts, ["{}"]) if texts else np.empty((0, model.dim), np.float32)


def _judged(wanted: ClassifyRequest, labels: Sequence[str], probabilities: Row, cosines: Row) -> dict[str, Any]:
    """What is said of one picture; scores of labels come first, then those of the prompts for unknown."""
    known = len(labels)
    order = np.argsort(-cosines[:known], kind="stable")
    predictions = [
        {"label": labels[row], "probability": probabilities[row], "cosine": cosines[row]}
        for row in order[: wanted.top_k]
    ]
    if wanted.unknown is None:
        return {"predictions": predictions}
    best = int(order[0])
    reason = _reason(wanted.unknown, probabilities[best], cosines[best], probabilities[known:])
    verdict = {
        "is_unknown": reason is not None,
        "reason": reason,
        "probability": float(probabilities[known:].sum()) if wanted.unknown.prompts else None,
    }
    return {"predictions": predictions, "label": labels[best] if reason is None else UNKNOWN, "unknown": verdict}


def _reason(unknown: Unknown, probability: float, cosine: float, others_U: Row) -> str | None:
    """Why a picture is unknown; NaN reaches no threshold."""
    if unknown.prompts and not probability >= others_U.max():
        return "prompts"
    if unknown.min_cosine is not None and not cosine >= unknown.min_cosine:
        return "min_cosine"
    if unknown.min_probability is not None and not probability >= unknown.min_probability:
        return "min_probability"
    return None
