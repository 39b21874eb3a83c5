"""Search in a collection: texts, pictures, vectors and points combined, keywords, filters, diversity, pages."""

from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import as_floats, json_answer
from server.batcher import Row
from server.errors import ApiError, bad_request
from server.index import Index, check_filter, needs_keywords
from server.index.rank import Ask, Ranked, combine, rank
from server.limits import read_json
from server.queries import require_one, resolve, stored_rows
from server.routes.collections import UNKNOWN
from server.schemas import body_of
from server.schemas.collections import Query, SearchPointsRequest, SearchPointsResponse
from server.schemas.items import check_text
from server.services import Services, services_of
from server.settings import Limits

router = APIRouter(tags=["collections"])
BODIES = (SearchPointsRequest,)

EXAMPLES: dict[str, dict[str, Any]] = {
    "text": {"text": "a red circle", "limit": 5, "filter": {"year": {"gte": 2020}}},
    "combined": {
        "queries": [{"image": "iVBORw0KGgo..."}, {"text": "at night", "weight": 0.7}],
        "negative": [{"text": "people"}],
        "mmr": {"diversity": 0.3},
    },
    "hybrid": {"text": "a red circle", "keywords": "circle", "share": 0.6},
}


@router.post(
    "/v1/collections/{collection}/search",
    response_model=SearchPointsResponse,
    responses=UNKNOWN,
    openapi_extra=body_of(SearchPointsRequest, **EXAMPLES),
)
async def search_points(request: Request) -> Response:
    """Nearest points to what the queries together say, or those whose captions match keywords, or both fused."""
    services = services_of(request)
    wanted = await read_json(request, SearchPointsRequest, services.settings.limits)
    name = request.path_params["collection"]
    index = await services.collections.get(name)
    _check(wanted, index, services.settings.limits)
    query, model = await _vector(services, index, wanted)
    ask = Ask(
        limit=wanted.limit + 1,  # one more, to know whether there is another page
        offset=wanted.offset,
        query=query,
        keywords=wanted.keywords,
        share=wanted.share,
        where=wanted.filter,
        exact=wanted.exact,
        threshold=wanted.threshold,
        diversity=wanted.mmr.diversity if wanted.mmr else 0.0,
        candidates=wanted.candidates,
        vectors=wanted.vectors,
    )
    found = await services.in_thread(lambda: rank(index, ask))
    more = len(found) > wanted.limit
    return json_answer(
        {
            "collection": name,
            "model": model,
            "hits": [_shown(item, wanted.vectors) for item in found[: wanted.limit]],
            "next": wanted.offset + wanted.limit if more else None,
        }
    )


def _check(wanted: SearchPointsRequest, index: Index, limits: Limits) -> None:
    """Refuse what costs too much or cannot be. Raises ApiError, FilterError, NoKeywords."""
    if wanted.offset + wanted.limit > limits.hits:
        raise bad_request(f"offset + limit: at most {limits.hits} results can be reached", "limit")
    if wanted.candidates > limits.hits:
        raise bad_request(f"candidates: at most {limits.hits}", "candidates")
    queries = _queries(wanted)
    if not queries and wanted.keywords is None:
        raise bad_request("give text, image, vector, id, queries or keywords", "", "missing")
    if len(queries) > limits.queries:
        raise bad_request(f"{len(queries)} queries, at most {limits.queries}", "queries", "too_many_items")
    if queries and all(weight < 0 for _, _, weight in queries):
        raise bad_request("negative: leads away from something; say what to search for as well", "negative")
    for param, query, _ in queries:
        require_one(query, param, query.id)
    if not queries and wanted.threshold is not None:
        raise bad_request("threshold: keywords alone have no cosine", "threshold")
    check_filter(wanted.filter or {}, index.info.fields)
    if wanted.keywords is not None:
        needs_keywords(index.info)
        check_text(wanted.keywords, "keywords", limits)


def _queries(wanted: SearchPointsRequest) -> list[tuple[str, Query | SearchPointsRequest, float]]:
    """(parameter, query, signed weight) of everything to search for; the short form has no parameter of its own."""
    short = [form for form in (wanted.text, wanted.image, wanted.vector, wanted.id) if form is not None]
    found: list[tuple[str, Query | SearchPointsRequest, float]] = []
    if short:
        found.append(("", wanted, wanted.weight))
    found += [(f"queries[{n}]", query, query.weight) for n, query in enumerate(wanted.queries)]
    found += [(f"negative[{n}]", query, -query.weight) for n, query in enumerate(wanted.negative)]
    return found


async def _vector(services: Services, index: Index, wanted: SearchPointsRequest) -> tuple[Row | None, str | None]:
    """(unit vector of all queries, model that was asked). Raises the ApiError of the first that cannot be used."""
    queries = _queries(wanted)
    if not queries:
        return None, None
    stored = await stored_rows(services, index, [query.id for _, query, _ in queries if query.id is not None])
    others = [(param, query) for param, query, _ in queries if query.id is None]
    resolved = await resolve(services, index.info, others, wanted.model)
    embedded = iter(resolved.rows)
    rows: list[Row] = []
    for _, query, _ in queries:
        row = stored[query.id] if query.id is not None else next(embedded)
        if isinstance(row, ApiError):
            raise row
        rows.append(row)
    try:
        return combine(rows, [weight for _, _, weight in queries]), resolved.model
    except ValueError as error:
        raise bad_request(f"negative: {error}", "negative", "queries_cancel") from error


def _shown(item: Ranked, vectors: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": item.hit.id, "score": item.score, "cosine": item.cosine}
    if item.bm25 is not None:
        shown["bm25"] = item.bm25
    shown["payload"] = item.hit.payload
    if vectors and item.hit.vector is not None:
        shown["vector"] = as_floats(np.asarray(item.hit.vector))
    return shown
