"""Points of a collection: insert, read and delete them."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from data_pipelines.errors import BadSample
from data_pipelines.pictures import thumbnail
from server.answers import as_floats, json_answer, revalidated, tag_of
from server.errors import ApiError, bad_request
from server.index import Index, PayloadError, Point, PointId, as_id, check_filter, check_payload
from server.limits import read_json, validated
from server.queries import Resolved, require_one, resolve
from server.routes.collections import UNKNOWN
from server.schemas import body_of
from server.schemas.collections import (
    Deleted,
    DeleteRequest,
    GivenPoint,
    PointList,
    SelectRequest,
    StoredPoint,
    UpsertRequest,
    UpsertResponse,
)
from server.services import Services, services_of

router = APIRouter(tags=["collections"])
writing = APIRouter(tags=["collections"])
BODIES = (UpsertRequest, SelectRequest, DeleteRequest)

PATH = "/v1/collections/{collection}/points"
PAGE = 1000
"""Points per step of a deletion by filter."""
PAGE_SHOWN = 100
DEPTH = 32
"""How deep payloads may be nested."""
THUMBNAIL_HEADERS = {
    "Content-Type": "image/jpeg",
    "Cache-Control": "private, no-cache",  # asked for again each time, which costs 304: a deleted one is gone at once
    "Cross-Origin-Resource-Policy": "same-origin",
}
UPSERT = {"points": [{"id": 1, "image": "iVBORw0KGgo...", "payload": {"caption": "a red circle", "source": "me"}}]}


@writing.post(
    PATH, response_model=UpsertResponse, responses=UNKNOWN, openapi_extra=body_of(UpsertRequest, picture=UPSERT)
)
@writing.put(PATH, include_in_schema=False)
async def upsert_points(request: Request) -> Response:
    """Insert or replace points: texts, pictures or vectors, with a payload each. Answered when they are durable.

    A point that cannot be used fails alone; 400 when none can.
    """
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, UpsertRequest, limits)
    if len(wanted.points) > limits.points:
        message = f"points: {len(wanted.points)} points, at most {limits.points} per request"
        raise bad_request(message, "points", "too_many_items")
    name = request.path_params["collection"]
    index = await services.collections.get(name)
    errors: dict[int, ApiError] = {}
    for number, point in enumerate(wanted.points):
        try:
            _check(point, f"points[{number}]", index, limits.payload_bytes)
        except ApiError as error:
            errors[number] = error
    good = [(number, point) for number, point in enumerate(wanted.points) if number not in errors]
    resolved = await resolve(services, index.info, [(f"points[{n}]", p) for n, p in good], wanted.model)
    errors.update((n, row) for (n, _), row in zip(good, resolved.rows, strict=True) if isinstance(row, ApiError))
    ids = [str(uuid.uuid4()) if point.id is None else point.id for point in wanted.points]
    points = {
        number: Point(ids[number], {k: v for k, v in point.payload.items() if v is not None}, row)
        for (number, point), row in zip(good, resolved.rows, strict=True)
        if not isinstance(row, ApiError)
    }
    if not points:
        raise errors[min(errors)]
    pictures = {good[place][0]: data for place, data in resolved.pictures.items()}
    stored = await services.in_thread(lambda: _store(index, points, pictures, limits.pixels))
    services.collections.after_write(index)
    outcomes = _outcomes(ids, errors, good, resolved)
    if index.info.thumbnails:
        for number, outcome in enumerate(outcomes):
            outcome["thumbnail"] = number in stored and stored[number].thumbnail is not None
    return json_answer({"collection": name, "upserted": len(points), "data": outcomes})


def _store(index: Index, points: dict[int, Point], pictures: dict[int, bytes], pixels: int) -> dict[int, Point]:
    """Upsert points; what was stored, with thumbnails of those `pictures` of which the collection keeps them."""
    if side := index.info.thumbnails:
        points = {n: replace(point, thumbnail=_thumbnail(pictures.get(n), side, pixels)) for n, point in points.items()}
    index.upsert(list(points.values()))
    return points


def _thumbnail(data: bytes | None, side: int, pixels: int) -> bytes | None:
    try:
        return None if data is None else thumbnail(data, side, pixels)
    except BadSample:  # the model made something of it all the same; the answer says that there is no thumbnail
        return None


def _check(point: GivenPoint, param: str, index: Index, most: int) -> None:
    """Refuse a point that cannot be stored. Raises ApiError."""
    require_one(point, param)
    info = index.info
    if not _storable(point.payload):
        message = f"{param}.payload: whole numbers have up to 64 bits, and lists and objects {DEPTH} levels"
        raise bad_request(message, f"{param}.payload", "invalid_payload")
    try:
        check_payload(point.payload, info.fields, info.captions)
        length = len(json.dumps(point.payload, ensure_ascii=False, allow_nan=False).encode())
    except PayloadError as error:
        raise bad_request(f"{param}.payload: {error}", f"{param}.payload.{error.field}", "invalid_payload") from error
    except ValueError as error:
        raise bad_request(f"{param}.payload holds NaN or infinity", f"{param}.payload", "invalid_payload") from error
    if length > most:
        raise bad_request(f"{param}.payload: {length} bytes, at most {most}", f"{param}.payload", "payload_too_long")


def _storable(value: Any, depth: int = DEPTH) -> bool:
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_storable(part, depth - 1) for part in parts)
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _outcomes(
    ids: Sequence[PointId], errors: dict[int, ApiError], good: Sequence[tuple[int, GivenPoint]], resolved: Resolved
) -> list[dict[str, Any]]:
    guards = {number: resolved.guards.get(place, {}) for place, (number, _) in enumerate(good)}
    return [
        {"index": n, "id": id, "error": errors[n].content() if n in errors else None, **guards.get(n, {})}
        for n, id in enumerate(ids)
    ]


@router.get(PATH, response_model=PointList, responses=UNKNOWN)
async def list_points(
    request: Request, ids: str | None = None, after: str | None = None, limit: str | None = None, vectors: str = "false"
) -> Response:
    """Points by `ids` (comma-separated), or a page of all of them."""
    given: dict[str, Any] = {"limit": limit, "vectors": vectors}  # as strings, which the schema reads
    if ids is not None:
        given["ids"] = [_number(part.strip()) for part in ids.split(",") if part.strip()]
    if after is not None:
        given["after"] = _number(after)
    services = services_of(request)
    return await _select(request, services, validated(SelectRequest, given))


def _number(text: str) -> int | str:
    """An id out of a URL."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else text


@router.post(
    f"{PATH}/select",
    response_model=PointList,
    responses=UNKNOWN,
    openapi_extra=body_of(SelectRequest, ids={"ids": [1, 2]}, filter={"filter": {"year": {"gte": 2020}}}),
)
async def select_points(request: Request) -> Response:
    """Points by ids, or by filter in pages; the same as GET with more to ask for."""
    services = services_of(request)
    return await _select(request, services, await read_json(request, SelectRequest, services.settings.limits))


async def _select(request: Request, services: Services, wanted: SelectRequest) -> Response:
    most = services.settings.limits.points
    limit = wanted.limit or min(PAGE_SHOWN, most)
    if limit > most or len(wanted.ids or ()) > most:
        name = "limit" if limit > most else "ids"
        raise bad_request(f"{name}: at most {most} points per request", name, "too_many_items")
    index = await services.collections.get(request.path_params["collection"])
    following: PointId | None = None
    if wanted.ids is not None:
        ids = wanted.ids
        points = await services.in_thread(lambda: index.get(ids, vectors=wanted.vectors))
    else:
        points, following = await services.in_thread(
            lambda: index.scroll(wanted.after, limit, wanted.filter, vectors=wanted.vectors)
        )
    return json_answer({"data": [shown(point) for point in points], "next": following})


def shown(point: Point) -> dict[str, Any]:
    """A point as clients see it."""
    vector = {} if point.vector is None else {"vector": as_floats(point.vector)}
    return {"id": point.id, "payload": point.payload, **vector}


@router.get(f"{PATH}/{{point}}", response_model=StoredPoint, responses=UNKNOWN)
async def get_point(request: Request) -> Response:
    """One point, with its vector."""
    services = services_of(request)
    id = _id_of(request)
    index = await services.collections.get(request.path_params["collection"])
    found = await services.in_thread(lambda: index.get([id], vectors=True))
    if not found:
        raise _missing(id)
    return json_answer(shown(found[0]))


def _id_of(request: Request) -> PointId:
    try:
        return as_id(_number(request.path_params["point"]))
    except ValueError as error:
        raise bad_request(f"the path's {error}", "id") from error


def _missing(id: PointId) -> ApiError:
    return ApiError(404, f"there is no point {id!r} in this collection", "point_not_found", "id")


@router.get(
    f"{PATH}/{{point}}/thumbnail",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {}}},
        304: {"description": "It is what `If-None-Match` names."},
        **UNKNOWN,
    },
)
async def get_thumbnail(request: Request) -> Response:
    """A small JPEG of a point's picture, in collections that keep them."""
    services = services_of(request)
    id = _id_of(request)
    index = await services.collections.get(request.path_params["collection"])
    if not index.info.thumbnails:
        raise ApiError(404, "this collection keeps no thumbnails: it was made without them", "no_thumbnails")
    jpeg = await services.in_thread(lambda: index.thumbnails([id]).get(id))
    if jpeg is None:
        if not await services.in_thread(lambda: index.get([id])):
            raise _missing(id)
        raise ApiError(404, f"point {id!r} has no thumbnail: it had no picture", "no_thumbnail", "id")
    return revalidated(request, jpeg, tag_of(jpeg), THUMBNAIL_HEADERS)


@writing.delete(f"{PATH}/{{point}}", response_model=Deleted, responses=UNKNOWN)
async def delete_point(request: Request) -> Response:
    """Delete one point."""
    services = services_of(request)
    id = _id_of(request)
    index = await services.collections.get(request.path_params["collection"])
    if not await services.in_thread(lambda: _delete(index, [id])):
        raise _missing(id)
    services.collections.after_write(index)
    return json_answer({"deleted": 1})


@writing.delete(PATH, response_model=Deleted, responses=UNKNOWN, openapi_extra=body_of(DeleteRequest))
@writing.post(f"{PATH}/delete", include_in_schema=False)
async def delete_points(request: Request) -> Response:
    """Delete points by ids or by filter. POST .../points/delete is the same, for proxies that drop a DELETE's body."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, DeleteRequest, limits)
    if len(wanted.ids or ()) > limits.points:
        raise bad_request(f"ids: at most {limits.points} points per request", "ids", "too_many_items")
    index = await services.collections.get(request.path_params["collection"])
    where, ids = wanted.filter, wanted.ids
    if where is not None:
        check_filter(where, index.info.fields)
        deleted = await services.in_thread(lambda: _delete_where(index, where))
    else:
        deleted = await services.in_thread(lambda: _delete(index, ids or []))
    services.collections.after_write(index)
    return json_answer({"deleted": deleted})


def _delete(index: Index, ids: Sequence[PointId]) -> int:
    present = [point.id for point in index.get(list(dict.fromkeys(ids)))]
    index.delete(present)
    return len(present)


def _delete_where(index: Index, where: dict[str, Any]) -> int:
    deleted = 0
    while True:
        points, _ = index.scroll(None, PAGE, where)
        if not points:
            return deleted
        index.delete([point.id for point in points])
        deleted += len(points)
