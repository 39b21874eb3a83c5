"""Collections: make, list and drop them."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.index import IndexInfo
from server.limits import read_json
from server.schemas import ErrorBody, body_of
from server.schemas.collections import CollectionInfo, CollectionList, CreateCollection, Dropped
from server.services import services_of

router = APIRouter(tags=["collections"])
writing = APIRouter(tags=["collections"])
BODIES = (CreateCollection,)

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "No such collection."}}
TAKEN: dict[int | str, dict[str, Any]] = {409: {"model": ErrorBody, "description": "It cannot be made or dropped."}}
EXAMPLE = {"name": "photos", "fields": {"source": "keyword", "year": "integer"}, "captions": "caption"}


@router.get("/v1/collections", response_model=CollectionList)
async def list_collections(request: Request) -> Response:
    """All collections, the default first."""
    collections = services_of(request).collections
    default = await collections.default()
    infos = [_content(name, await collections.info(name), default) for name in await collections.names()]
    return json_answer({"object": "list", "data": infos})


@writing.post(
    "/v1/collections",
    status_code=201,
    response_model=CollectionInfo,
    responses=TAKEN,
    openapi_extra=body_of(CreateCollection, photos=EXAMPLE),
)
async def create_collection(request: Request) -> Response:
    """Make an empty collection for the vectors of one model, with the payload fields to filter by."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, CreateCollection, limits)
    model = services.model(wanted.model)
    info = IndexInfo(
        dim=model.dim,
        modality=wanted.modality,
        model=model.name,
        weights_sha256=model.digest,
        fields=wanted.fields,
        captions=wanted.captions,
        language=wanted.language,
        thumbnails=wanted.thumbnails or 0,
    )
    index = await services.collections.create(wanted.name, info, limits.collections)
    return json_answer(_content(wanted.name, index.info, await services.collections.default()), 201)


@router.get("/v1/collections/{collection}", response_model=CollectionInfo, responses=UNKNOWN)
async def get_collection(request: Request) -> Response:
    """One collection."""
    collections = services_of(request).collections
    name = request.path_params["collection"]
    index = await collections.get(name)
    return json_answer(_content(name, index.info, await collections.default()))


@writing.delete("/v1/collections/{collection}", response_model=Dropped, responses={**UNKNOWN, **TAKEN})
async def drop_collection(request: Request) -> Response:
    """Delete a collection and all its points."""
    name = request.path_params["collection"]
    await services_of(request).collections.drop(name)
    return json_answer({"name": name, "dropped": True})


def _content(name: str, info: IndexInfo, default: str | None) -> dict[str, Any]:
    return {
        "name": name,
        "default": name == default,
        "model": info.model,
        "dimensions": info.dim,
        "modality": info.modality,
        "fields": info.fields,
        "captions": info.captions or None,
        "language": info.language,
        "thumbnails": info.thumbnails or None,
        "points": info.points,
    }
