"""Hugging Face's inference tasks. Its clients post to the very address they are given, so each task has one of its own;
`/` and a model's name tell tasks apart by what is asked.
"""

from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.errors import ApiError, bad_item, bad_request
from server.images import image_bytes
from server.inputs import see_pictures
from server.limits import parse_object, read_body, validated
from server.model import Seen
from server.routes.classify import check_count
from server.routes.detect import SIDES, check_detection, detect_in
from server.routes.tei import compare, extract
from server.schemas import body_of
from server.schemas.huggingface import TEMPLATE, LabelBox, LabelScore, ZeroShotRequest
from server.schemas.tei import TeiRequest, TeiSimilarityRequest
from server.services import services_of

router = APIRouter(tags=["Hugging Face"])
BODIES = (ZeroShotRequest,)

EXAMPLE = {"inputs": "iVBORw0KGgo...", "parameters": {"candidate_labels": ["cat", "dog"]}}
DETECTION = ("threshold", "text_queries", "top_k")
"""Parameters by which a request at `/` is known to want boxes."""


@router.post(
    "/zero-shot-image-classification",
    response_model=list[LabelScore],
    openapi_extra=body_of(ZeroShotRequest, picture=EXAMPLE),
)
async def zero_shot_image_classification(request: Request) -> Response:
    """Probabilities of the candidate labels, best first."""
    return await _classify(request, await _content(request))


@router.post(
    "/zero-shot-object-detection",
    response_model=list[LabelBox] | list[list[LabelBox]],
    openapi_extra=body_of(ZeroShotRequest, picture=EXAMPLE),
)
async def zero_shot_object_detection(request: Request) -> Response:
    """Boxes of the candidate labels, best first; a list of pictures gives a list of lists."""
    return await _detect(request, await _content(request))


@router.post(
    "/feature-extraction",
    response_model=list[list[float] | str],
    openapi_extra=body_of(TeiRequest, text={"inputs": ["a cat"]}),
)
async def feature_extraction(request: Request) -> Response:
    """Vectors of texts; long texts are cut unless `truncate` is false."""
    return await extract(request, validated(TeiRequest, await _content(request)), cut=True)


@router.post(
    "/image-classification",
    response_model=list[LabelScore],
    openapi_extra={
        "parameters": [
            {"name": "label_set", "in": "query", "required": True, "schema": {"type": "string"}},
            {"name": "top_k", "in": "query", "schema": {"type": "integer", "minimum": 1}},
        ],
        "requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}},
    },
)
async def image_classification(request: Request) -> Response:
    """The labels of a label set, best first. The body is the picture's bytes, or JSON with it in `inputs`."""
    services = services_of(request)
    body = await read_body(request, services.settings.limits)
    name = request.query_params.get("label_set", "")
    if not name:
        raise bad_request("label_set: name a set in the address: ?label_set=NAME", "label_set", "missing")
    top_k: Any = request.query_params.get("top_k")
    data = body
    if body[:1] == b"{":
        content = parse_object(body)
        if not isinstance(content.get("inputs"), str):
            raise bad_request("inputs: expected a picture as base64", "inputs", "invalid_item")
        data = image_bytes(content["inputs"], "inputs")
        parameters = content.get("parameters")
        top_k = parameters.get("top_k", top_k) if isinstance(parameters, dict) else top_k
    found = await services.in_thread(lambda: services.label_sets.get(name))
    model = services.model()
    (seen,) = await model.see_images([data])
    if not isinstance(seen, Seen):
        raise bad_item(seen, "inputs")
    head_LD = await model.heads.get(found.labels, found.templates)
    probabilities_NL, _ = await model.classify(seen.row[None], head_LD, len(head_LD))
    return json_answer(_scores(found.labels, probabilities_NL[0])[: _count(top_k)])


@router.post("/", include_in_schema=False)
@router.post("/pipeline/feature-extraction/{model:path}", include_in_schema=False)
@router.post("/models/{model:path}", include_in_schema=False)
async def any_task(request: Request) -> Response:
    """What is asked decides: labels to look for or to choose from, sentences to compare, texts to embed."""
    content = await _content(request)
    if (name := request.path_params.get("model", "")) and not content.get("model"):
        content["model"] = name.removesuffix("/pipeline/feature-extraction").removesuffix(
            "/pipeline/sentence-similarity"
        )
    parameters = content.get("parameters")
    if isinstance(parameters, dict) and {"candidate_labels", "text_queries"} & parameters.keys():
        return await (_detect if set(DETECTION) & parameters.keys() else _classify)(request, content)
    if isinstance(content.get("inputs"), dict):
        wanted = validated(TeiSimilarityRequest, content)
        return await compare(request, wanted, True, services_of(request).settings.limits)
    return await extract(request, validated(TeiRequest, content), cut=True)


async def _content(request: Request) -> dict[str, Any]:
    return parse_object(await read_body(request, services_of(request).settings.limits))


async def _classify(request: Request, content: dict[str, Any]) -> Response:
    services = services_of(request)
    limits = services.settings.limits
    wanted = validated(ZeroShotRequest, content)
    model = services.model(wanted.model)
    labels = wanted.parameters.labels(limits, limits.texts)
    (seen,) = await see_pictures(model, [wanted.picture()])
    if isinstance(seen, ApiError):
        raise seen
    head_LD = await model.heads.get(labels, [wanted.parameters.hypothesis_template or TEMPLATE])
    probabilities_NL, _ = await model.classify(seen.row[None], head_LD, len(labels))
    return json_answer(_scores(labels, probabilities_NL[0]))


async def _detect(request: Request, content: dict[str, Any]) -> Response:
    services = services_of(request)
    limits = services.settings.limits
    wanted = validated(ZeroShotRequest, content)
    model = services.model(wanted.model)
    parameters = wanted.parameters
    labels = parameters.labels(limits, limits.detect_prompts)
    check_detection(len(labels), parameters.top_k, limits)
    inputs = wanted.pictures()
    check_count(inputs, limits)
    options: dict[str, Any] = {"threshold": parameters.threshold}
    if parameters.top_k is not None:
        options["top_k"] = parameters.top_k
    if parameters.hypothesis_template is not None:
        options["templates"] = (parameters.hypothesis_template,)
    outcomes, _ = await detect_in(services, model, inputs, labels, options)
    found: list[list[dict[str, Any]]] = []
    for outcome in outcomes:
        if isinstance(outcome, ApiError):
            raise outcome
        found.append([_boxed(one) for one in outcome.detections])
    return json_answer(found if isinstance(wanted.inputs, list) else found[0])


def _boxed(one: Any) -> dict[str, Any]:
    return {
        "label": one.label,
        "score": one.score,
        "box": {side: round(at) for side, at in zip(SIDES, one.box, strict=True)},
    }


def _scores(labels: Any, probabilities_L: Any) -> list[dict[str, Any]]:
    order = np.argsort(-probabilities_L, kind="stable")
    return [{"label": labels[row], "score": probabilities_L[row]} for row in order]


def _count(given: Any) -> int | None:
    """A number of results. Raises ApiError 400."""
    if given is None:
        return None
    try:
        count = int(given)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise bad_request("top_k: expected a whole number from 1 on", "top_k")
    return count
