"""Reading a request: bytes counted while they arrive, time limited, JSON parsed whatever the Content-Type says."""

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from server.errors import ApiError, bad_request
from server.settings import Limits

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises ApiError 413 or 408 before more than `limits.body_bytes` are held."""
    try:
        return await asyncio.wait_for(_collect(request, limits.body_bytes), limits.read_seconds)
    except asyncio.TimeoutError as error:
        message = f"the body did not arrive within {limits.read_seconds:g} s"
        raise ApiError(408, message, "request_timeout") from error
    except ClientDisconnect as error:
        raise bad_request("the client went away before its body was complete", code="incomplete_body") from error


async def _collect(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    too_long = declared.isdecimal() and int(declared) > limit
    chunks: list[bytes] = []
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit:
            raise _too_large(limit)
        if not too_long:
            chunks.append(chunk)
        # An announced excess is read on, up to the limit, and thrown away: most clients only look for an answer once
        # they have sent everything, and would otherwise see a reset connection instead of the 413.
    if too_long:
        raise _too_large(limit)
    return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit} bytes: send fewer or smaller items", "body_too_large")


async def read_json(request: Request, model: type[M], limits: Limits) -> M:
    """The body as `model`. Raises ApiError 400 naming the field at fault."""
    return validated(model, parse_object(await read_body(request, limits)))


def parse_object(body: bytes) -> dict[str, Any]:
    """A body as a JSON object. Raises ApiError 400."""
    try:
        content: Any = json.loads(body.decode("utf-8-sig"))
        if b"\\ud" in body.lower():  # an escape that may leave half a character, which nothing behind this could write
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise bad_request("the body is not valid JSON in UTF-8", code="invalid_json") from error
    if not isinstance(content, dict):
        raise bad_request(f"the body must be a JSON object, not {type(content).__name__}", code="invalid_json")
    return content


def validated(model: type[M], content: dict[str, Any]) -> M:
    """A JSON object as `model`. Raises ApiError 400 naming the field at fault."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = _path(first["loc"])
        raise bad_request(f"{where}: {first['msg']}", where, first["type"]) from error


def _path(location: tuple[int | str, ...]) -> str:
    """`images[3]` for ("images", 3)."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
