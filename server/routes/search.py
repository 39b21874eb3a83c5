"""Search in the default collection."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.batcher import Row
from server.catalogue import model_of
from server.errors import ApiError, bad_request
from server.inputs import see_pictures
from server.limits import read_json
from server.model import Model, Seen
from server.schemas import ErrorBody, body_of
from server.schemas.items import check_text
from server.schemas.search import SearchRequest, SearchResponse
from server.services import services_of
from server.settings import Limits

router = APIRouter(tags=["native"])
BODIES = (SearchRequest,)


@router.post(
    "/v1/search",
    response_model=SearchResponse,
    responses={404: {"model": ErrorBody, "description": "There is no default collection."}},
    openapi_extra=body_of(SearchRequest, text={"text": "a red circle", "limit": 5, "filter": {"source": "noto"}}),
)
async def search(request: Request) -> Response:
    """Nearest entries of the index to a text or a picture, optionally only where payload fields have given values."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, SearchRequest, limits)
    index = await services.collections.get()
    model = model_of(services.registry, index.info, wanted.model)
    if wanted.limit > limits.hits:
        raise bad_request(f"limit: {wanted.limit} hits, at most {limits.hits}", "limit")
    query = await _query(model, wanted, limits)
    row, guard = (query.row, query.guard()) if isinstance(query, Seen) else (query, {})
    hits = await services.in_thread(lambda: index.search(row, wanted.limit, wanted.filter, wanted.exact))
    found = [{**hit.payload, "id": hit.id, "score": hit.score} for hit in hits]
    return json_answer({"model": model.name, "hits": found, **guard})


async def _query(model: Model, wanted: SearchRequest, limits: Limits) -> Row | Seen:
    if wanted.image is not None:
        (seen,) = await see_pictures(model, [("image", wanted.image)])
        if isinstance(seen, ApiError):
            raise seen
        return seen
    assert wanted.text is not None
    check_text(wanted.text, "text", limits)
    rows, _ = await model.embed_texts([wanted.text])
    found: Row = rows[0]
    return found
