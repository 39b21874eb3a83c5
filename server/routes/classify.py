"""Zero-shot classification."""

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from data_pipelines.errors import BadSample
from server.answers import json_answer
from server.batcher import Row
from server.errors import ApiError, bad_item, bad_request
from server.images import image_bytes
from server.limits import read_json
from server.schemas import ERRORS, body_of
from server.schemas.classify import ClassifyRequest, ClassifyResponse
from server.schemas.items import check_text
from server.services import services_of
from server.settings import Limits
from vlp.infer import make_prompts

router = APIRouter(tags=["native"])
BODIES = (ClassifyRequest,)

EXAMPLE = {"image": "iVBORw0KGgo...", "labels": ["cat", "dog"], "templates": ["a photo of a {}"], "top_k": 1}


@router.post(
    "/v1/classify",
    response_model=ClassifyResponse,
    responses=ERRORS,
    openapi_extra=body_of(ClassifyRequest, picture=EXAMPLE),
)
async def classify(request: Request) -> Response:
    """Which of the labels each picture shows. A picture that cannot be used fails alone; 400 when none can."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, ClassifyRequest, limits)
    model = services.model(wanted.model)
    prompts = _prompts(wanted, limits)
    inputs = wanted.inputs()
    if len(inputs) > limits.images:
        raise bad_request(f"images: {len(inputs)} pictures, at most {limits.images}", "images", "too_many_items")
    decoded = [_bytes_or_error(value, param) for param, value in inputs]
    good = [data for data in decoded if isinstance(data, bytes)]
    (prompt_rows, _), seen = await asyncio.gather(model.embed_texts(prompts), model.see_images(good))
    found = iter(seen)
    outcomes = [next(found) if isinstance(item, bytes) else item for item in decoded]
    named = [
        bad_item(outcome, param) if isinstance(outcome, BadSample) else outcome
        for outcome, (param, _) in zip(outcomes, inputs, strict=True)
    ]
    images = [outcome for outcome in named if not isinstance(outcome, ApiError)]
    if not images:
        raise next(outcome for outcome in named if isinstance(outcome, ApiError))
    probabilities_NL, cosines_NL = await model.classify(
        np.stack([image.row for image in images]), prompt_rows, len(wanted.labels)
    )
    scores = iter(zip(probabilities_NL, cosines_NL, strict=True))
    data = [
        {"index": index, "predictions": None, "error": outcome.content()}
        if isinstance(outcome, ApiError)
        else {"index": index, "predictions": _ranked(wanted, *next(scores)), "error": None, **outcome.guard()}
        for index, outcome in enumerate(named)
    ]
    return json_answer({"model": model.name, "data": data})


def _prompts(wanted: ClassifyRequest, limits: Limits) -> list[str]:
    count = len(wanted.labels) * len(wanted.templates)
    if count > limits.texts:
        message = f"labels x templates makes {count} prompts, at most {limits.texts} fit into one request"
        raise bad_request(message, "labels", "too_many_items")
    # looked at before they are multiplied, so that a long template cannot cost memory
    for name, texts in (("labels", wanted.labels), ("templates", wanted.templates)):
        for number, text in enumerate(texts):
            check_text(text, f"{name}[{number}]", limits)
    label = max(map(len, wanted.labels))
    longest = max(len(template) + template.count("{}") * label for template in wanted.templates)
    if longest > limits.text_bytes:
        raise bad_request(f"templates: a prompt would have {longest} characters", "templates", "text_too_long")
    return make_prompts(wanted.labels, wanted.templates)


def _bytes_or_error(value: str, param: str) -> bytes | ApiError:
    try:
        return image_bytes(value, param)
    except ApiError as error:
        return error


def _ranked(wanted: ClassifyRequest, probabilities_L: Row, cosines_L: Row) -> list[dict[str, Any]]:
    order = np.argsort(-cosines_L, kind="stable")[: wanted.top_k]
    return [
        {"label": wanted.labels[row], "probability": float(probabilities_L[row]), "cosine": float(cosines_L[row])}
        for row in order
    ]
