"""Texts and pictures against each other. Suffixes: M left or query, N right or documents, D embedding width."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.batcher import Row
from server.engine import Vectors
from server.errors import ApiError
from server.inputs import embed_items
from server.limits import read_json
from server.schemas import body_of
from server.schemas.compare import RankRequest, RankResponse, SimilarityRequest, SimilarityResponse
from server.services import services_of

router = APIRouter(tags=["native"])
BODIES = (SimilarityRequest, RankRequest)


@router.post(
    "/v1/similarity",
    response_model=SimilarityResponse,
    openapi_extra=body_of(
        SimilarityRequest, mixed={"left": [{"image": "iVBORw0KGgo..."}], "right": ["a cat", "a dog"]}
    ),
)
async def similarity(request: Request) -> Response:
    """Cosines of every item of one list with every item of another. Items that cannot be used fail alone."""
    services = services_of(request)
    wanted = await read_json(request, SimilarityRequest, services.settings.limits)
    model = services.model(wanted.model)
    left, right = wanted.items(services.settings.limits)
    rows = (await embed_items(model, [*left, *right])).rows
    errors = _errors(rows)
    left_MD = _matrix(rows[: len(left)], model.dim)
    right_ND = _matrix(rows[len(left) :], model.dim) if right else left_MD
    return json_answer({"model": model.name, "cosines": left_MD @ right_ND.T, "errors": errors})


@router.post(
    "/v1/rank",
    response_model=RankResponse,
    openapi_extra=body_of(RankRequest, pictures={"query": "a red circle", "documents": [{"image": "iVBORw0KGgo..."}]}),
)
async def rank(request: Request) -> Response:
    """Documents in order of their likeness to a query. Those that cannot be used fail alone."""
    services = services_of(request)
    wanted = await read_json(request, RankRequest, services.settings.limits)
    model = services.model(wanted.model)
    query, documents = wanted.items(services.settings.limits)
    first, *rows = (await embed_items(model, [query, *documents])).rows
    if isinstance(first, ApiError):
        raise first
    errors = _errors(rows)
    cosines_N = _matrix(rows, model.dim) @ first
    usable = [number for number, row in enumerate(rows) if not isinstance(row, ApiError)]
    order = sorted(usable, key=lambda number: -np.nan_to_num(cosines_N[number], nan=-2.0))
    data = [{"index": number, "cosine": cosines_N[number]} for number in order[: wanted.top_k]]
    return json_answer({"model": model.name, "data": data, "errors": errors})


def _errors(rows: Sequence[Row | ApiError]) -> list[dict[str, Any]]:
    """What is wrong with which items. Raises the first ApiError when no item can be used."""
    errors = [row for row in rows if isinstance(row, ApiError)]
    if errors and len(errors) == len(rows):
        raise errors[0]
    return [error.content() for error in errors]


def _matrix(rows: Sequence[Row | ApiError], dim: int) -> Vectors:
    """ND; NaN where there is no vector, which answers write as null."""
    nothing = np.full(dim, np.nan, np.float32)
    return np.stack([nothing if isinstance(row, ApiError) else row for row in rows])
