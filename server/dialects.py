"""Errors in the words of whoever asks: each family of routes has its own shape of an error body, chosen by path.

Everything that turns an ApiError into an answer comes through `answer`, also what never reaches a route.
"""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.context import STATE
from server.errors import ApiError

Shape = Callable[[ApiError], tuple[int, dict[str, Any]]]
"""(status, body) of an error."""


def openai(error: ApiError) -> tuple[int, dict[str, Any]]:
    """OpenAI's object, with the top-level words that clients of TEI and Jina look for."""
    return error.status, {"error": error.content(), "message": error.message, "detail": error.message}


def tei(error: ApiError) -> tuple[int, dict[str, Any]]:
    """text-embeddings-inference: a wrong request is 422 Validation, an empty one 400 Empty."""
    if error.status == 400:
        if error.code == "empty_input":
            return 400, {"error": error.message, "error_type": "Empty"}
        return 422, {"error": error.message, "error_type": "Validation"}
    kinds = {401: "Unauthorized", 403: "Unauthorized", 429: "Overloaded", 503: "Unhealthy"}
    kind = kinds.get(error.status, "Backend" if error.status >= 500 else "Validation")
    return error.status, {"error": error.message, "error_type": kind}


def plain(error: ApiError) -> tuple[int, dict[str, Any]]:
    """Hugging Face's tasks and clip-retrieval: a word, and the machine-readable code beside it."""
    return error.status, {"error": error.message, "code": error.code, "param": error.param}


def cohere(error: ApiError) -> tuple[int, dict[str, Any]]:
    """Cohere's clients show `message`."""
    return error.status, {"message": error.message, "code": error.code, "param": error.param}


SHAPES: Mapping[str, Shape] = {
    "/embed": tei,
    "/info": tei,
    "/similarity": tei,
    "/v1/embed": cohere,
    "/v2/embed": cohere,
    "/": plain,
    "/zero-shot-image-classification": plain,
    "/zero-shot-object-detection": plain,
    "/feature-extraction": plain,
    "/image-classification": plain,
    "/knn-service": plain,
    "/metadata": plain,
    "/indices-list": plain,
}
PIPELINES = "/pipeline/"
"""Part of Hugging Face's paths with a model's name in them."""


def shape_of(path: str) -> Shape:
    """How errors of a route are written."""
    if PIPELINES in path:
        return plain
    return SHAPES.get(path, openai)


def answer(error: ApiError, path: str) -> Response:
    """The whole answer; the request's log line will name its code."""
    if (state := STATE.get()) is not None:
        state.code = error.code
    status, body = shape_of(path)(error)
    return JSONResponse(body, status, headers=error.headers())


async def on_api_error(request: Request, error: Exception) -> Response:
    """Handler for ApiError."""
    assert isinstance(error, ApiError)
    return answer(error, request.scope["path"])


async def on_http_error(request: Request, error: Exception) -> Response:
    """Handler for what the router itself refuses: unknown path, wrong method."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_")
    message = {
        404: f"no route {request.scope['path']!r}; see /docs or GET /v1/models",
        405: f"{request.method} is not possible here",
    }.get(error.status_code, phrase)
    refusal = answer(ApiError(error.status_code, message, code), request.scope["path"])
    refusal.headers.update(error.headers or {})
    return refusal
