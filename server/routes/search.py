"""Search in the index the server was started with."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from data_pipelines.errors import BadSample
from server.answers import json_answer
from server.batcher import Row
from server.errors import ApiError, bad_item, bad_request
from server.images import image_bytes
from server.index import FilterError
from server.limits import read_json
from server.model import Model, Seen
from server.schemas import ERRORS, ErrorBody, body_of
from server.schemas.items import check_text
from server.schemas.search import SearchRequest, SearchResponse
from server.services import services_of
from server.settings import Limits

router = APIRouter(tags=["native"])
BODIES = (SearchRequest,)

NO_INDEX = (
    "this server has no index: vlp embed BUNDLE --data SHARDS --out EMB; vlp index build EMB --out INDEX; "
    "vlp serve BUNDLE --index INDEX"
)


@router.post(
    "/v1/search",
    response_model=SearchResponse,
    responses={**ERRORS, 404: {"model": ErrorBody, "description": "The server was started without an index."}},
    openapi_extra=body_of(SearchRequest, text={"text": "a red circle", "limit": 5, "filter": {"source": "noto"}}),
)
async def search(request: Request) -> Response:
    """Nearest entries of the index to a text or a picture, optionally only where payload fields have given values."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, SearchRequest, limits)
    if services.index is None:
        raise ApiError(404, NO_INDEX, "no_index")
    model = services.model(wanted.model)
    if wanted.limit > limits.hits:
        raise bad_request(f"limit: {wanted.limit} hits, at most {limits.hits}", "limit")
    query = await _query(model, wanted, limits)
    row, guard = (query.row, query.guard()) if isinstance(query, Seen) else (query, {})
    try:
        hits = await services.search(row, wanted.limit, wanted.filter or {}, wanted.exact)
    except FilterError as error:
        raise bad_request(f"filter: {error}", f"filter.{error.field}", "invalid_filter") from error
    found = [{**hit.payload, "id": hit.id, "score": hit.score} for hit in hits]
    return json_answer({"model": model.name, "hits": found, **guard})


async def _query(model: Model, wanted: SearchRequest, limits: Limits) -> Row | Seen:
    if wanted.image is not None:
        (seen,) = await model.see_images([image_bytes(wanted.image, "image")])
        if isinstance(seen, BadSample):
            raise bad_item(seen, "image")
        return seen
    assert wanted.text is not None
    check_text(wanted.text, "text", limits)
    rows, _ = await model.embed_texts([wanted.text])
    found: Row = rows[0]
    return found
