"""The back end of clip-retrieval, for ClipClient and clip-front, over our collections.

`image` is a JPEG in base64, as there: the thumbnail where a collection keeps them.

Suffixes: N hits, D embedding width.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from server.answers import json_answer
from server.batcher import Row
from server.catalogue import model_of
from server.errors import ApiError, bad_request
from server.index import Hit, Index, Point, PointId, as_id
from server.inputs import see_pictures
from server.limits import read_json
from server.schemas import body_of
from server.schemas.clip_retrieval import KnnHit, KnnRequest, Metadata, MetadataRequest
from server.schemas.items import check_text
from server.services import Services, services_of

router = APIRouter(tags=["clip-retrieval"])
BODIES = (KnnRequest, MetadataRequest)

SAME = 0.94
"""Cosine from which clip-retrieval takes two pictures for one."""


@router.get("/indices-list", response_model=list[str])
async def indices_list(request: Request) -> Response:
    """Names of all collections; the first is the default."""
    return json_answer(await services_of(request).collections.names())


@router.post(
    "/knn-service",
    response_model=list[KnnHit],
    openapi_extra=body_of(KnnRequest, text={"text": "a red circle", "modality": "image", "num_images": 10}),
)
async def knn_service(request: Request) -> Response:
    """Nearest entries to a text, a picture or a vector."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, KnnRequest, limits)
    index = await _index(services, wanted.indice_name)
    if wanted.modality != index.info.modality:
        message = f"modality: this index was made of {index.info.modality} vectors, not of {wanted.modality} ones"
        raise bad_request(message, "modality")
    query = await _query(services, index, wanted)
    shown = min(wanted.num_images, limits.hits)
    count = min(wanted.num_images if wanted.num_result_ids is None else wanted.num_result_ids, limits.hits)
    if not count:
        return json_answer([])
    hits = await services.in_thread(lambda: index.search(query, count, vectors=wanted.deduplicate))
    if wanted.deduplicate:
        hits = _distinct(hits)
    images = await _images(services, index, [hit.id for hit in hits[:shown]])
    return json_answer(
        [
            {**(_columns(hit, images) if number < shown else {}), "id": hit.id, "similarity": hit.score}
            for number, hit in enumerate(hits)
        ]
    )


@router.post(
    "/metadata",
    response_model=list[Metadata],
    openapi_extra=body_of(MetadataRequest, two={"indice_name": "images", "ids": [1, 2]}),
)
async def metadata(request: Request) -> Response:
    """What is kept beside the vectors of entries, in the order asked for; unknown ids are left out."""
    services = services_of(request)
    limits = services.settings.limits
    wanted = await read_json(request, MetadataRequest, limits)
    index = await _index(services, wanted.indice_name)
    if len(wanted.ids) > limits.hits:
        raise bad_request(f"ids: {len(wanted.ids)} ids, at most {limits.hits}", "ids", "too_many_items")
    try:
        ids = [as_id(given) for given in wanted.ids]
    except ValueError as error:
        raise bad_request(f"ids: {error}", "ids") from error
    points = await services.in_thread(lambda: index.get(ids)) if ids else []
    images = await _images(services, index, [point.id for point in points])
    return json_answer([{"id": point.id, "metadata": _columns(point, images)} for point in points])


async def _index(services: Services, name: str | None) -> Index:
    """The index of that name, the first for none. Raises ApiError 404."""
    names = [] if name else await services.collections.names()
    return await services.collections.get(name or next(iter(names), None))


async def _query(services: Services, index: Index, wanted: KnnRequest) -> Row:
    """The vector to search with. Raises ApiError."""
    if not (wanted.text or wanted.image or wanted.image_url) and wanted.embedding_input is not None:
        return _given(wanted.embedding_input, index.info.dim)
    model = model_of(services.registry, index.info)
    if wanted.text:
        check_text(wanted.text, "text", services.settings.limits)
        rows_ND, _ = await model.embed_texts([wanted.text])
        row: Row = rows_ND[0]
        return row
    name = "image" if wanted.image else "image_url"
    value = wanted.image or wanted.image_url
    if not value:
        raise bad_request("give one of text, image, image_url and embedding_input", "text", "missing")
    (seen,) = await see_pictures(model, [(name, value)])
    if isinstance(seen, ApiError):
        raise seen
    return seen.row


def _given(numbers: Sequence[float], dim: int) -> Row:
    """A client's own vector, made length 1. Raises ApiError 400."""
    name = "embedding_input"
    if len(numbers) != dim:
        raise bad_request(f"{name}: {len(numbers)} numbers, the index has vectors of {dim}", name)
    vector_D = np.array(numbers, np.float64)
    largest = float(np.abs(vector_D).max())
    if not np.isfinite(largest) or largest == 0:
        raise bad_request(f"{name}: the vector is zero or not finite", name)
    vector_D /= largest  # so that squares neither overflow nor vanish
    unit_D: Row = (vector_D / np.linalg.norm(vector_D)).astype(np.float32)
    return unit_D


async def _images(services: Services, index: Index, ids: Sequence[PointId]) -> dict[PointId, dict[str, str]]:
    if not index.info.thumbnails:
        return {}
    jpegs = await services.in_thread(lambda: index.thumbnails(ids))
    return {id: {"image": base64.b64encode(jpeg).decode()} for id, jpeg in jpegs.items()}


def _columns(found: Hit | Point, images: Mapping[PointId, dict[str, str]]) -> dict[str, Any]:
    """The payload with clip-retrieval's words: `image_path` for the key of a sample, `image` for its thumbnail."""
    path = {"image_path": found.payload["key"]} if "key" in found.payload else {}
    return {**path, **images.get(found.id, {}), **found.payload}


def _distinct(hits: Sequence[Hit]) -> list[Hit]:
    """The best hit of every group that hangs together by cosines of SAME and more."""
    if not hits:
        return []
    vectors_ND = np.stack([hit.vector for hit in hits if hit.vector is not None])
    alike_NN: NDArray[np.bool_] = vectors_ND @ vectors_ND.T >= SAME
    kept: list[Hit] = []
    seen_N = np.zeros(len(hits), bool)
    for number, hit in enumerate(hits):
        if seen_N[number]:
            continue
        kept.append(hit)
        group_N = alike_NN[number].copy()
        group_N[number] = True
        edge_N = group_N
        while edge_N.any():
            edge_N = alike_NN[edge_N].any(0) & ~group_N
            group_N |= edge_N
        seen_N |= group_N
    return kept
