"""text-embeddings-inference: /embed, /similarity and /info."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import as_base64, as_floats, json_answer
from server.inputs import check_dimensions, check_length
from server.limits import read_json
from server.model import Model
from server.schemas import body_of
from server.schemas.items import Item
from server.schemas.tei import TeiInfo, TeiRequest, TeiSimilarityRequest, check_texts
from server.services import services_of
from server.settings import Limits
from vlp import __version__

router = APIRouter(tags=["text-embeddings-inference"])
BODIES = (TeiRequest, TeiSimilarityRequest)


@router.post(
    "/embed", response_model=list[list[float] | str], openapi_extra=body_of(TeiRequest, text={"inputs": "a cat"})
)
async def embed(request: Request) -> Response:
    """Embed texts: always a list of vectors. Without `truncate`, texts that do not fit are 422."""
    limits = services_of(request).settings.limits
    return await extract(request, await read_json(request, TeiRequest, limits), cut=False)


async def extract(request: Request, wanted: TeiRequest, cut: bool) -> Response:
    """Vectors of texts. `cut`: whether long texts are cut when the request does not say."""
    services = services_of(request)
    model = services.model(wanted.model)
    check_dimensions(wanted.dimensions, model, "dimensions")
    texts = wanted.texts(services.settings.limits)
    if not (cut if wanted.truncate is None else wanted.truncate):
        await _check_length(model, texts, "inputs")
    rows, _ = await model.embed_texts(texts)
    write = as_base64 if wanted.encoding_format == "base64" else as_floats
    return json_answer([write(row) for row in rows])


@router.post(
    "/similarity",
    response_model=list[float],
    openapi_extra=body_of(
        TeiSimilarityRequest, text={"inputs": {"source_sentence": "a cat", "sentences": ["a kitten", "a truck"]}}
    ),
)
async def similarity(request: Request) -> Response:
    """Cosines of one sentence with others, in their order."""
    limits = services_of(request).settings.limits
    wanted = await read_json(request, TeiSimilarityRequest, limits)
    cut = (wanted.parameters or {}).get("truncate", False) is True
    return await compare(request, wanted, cut, limits)


async def compare(request: Request, wanted: TeiSimilarityRequest, cut: bool, limits: Limits) -> Response:
    """The answer of similarity, TEI's and Hugging Face's."""
    model = services_of(request).model(wanted.model)
    texts = [wanted.inputs.source_sentence, *wanted.inputs.sentences]
    check_texts(wanted.inputs.sentences, "inputs.sentences", limits)
    check_texts(texts[:1], "inputs.source_sentence", limits)
    if not cut:
        await _check_length(model, texts, "inputs")
    rows_ND, _ = await model.embed_texts(texts)
    return json_answer(as_floats(rows_ND[1:] @ rows_ND[0]))


@router.get("/info", response_model=TeiInfo)
async def info(request: Request) -> Response:
    """The default model and the limits."""
    services = services_of(request)
    model, limits = services.model(), services.settings.limits
    batching = services.settings.batching
    return json_answer(
        {
            "model_id": model.name,
            "model_sha": model.digest or None,
            "model_dtype": "float32",
            "model_type": {"embedding": {"pooling": "cls"}},
            "max_concurrent_requests": limits.requests,
            "max_input_length": model.engine.context,
            "max_batch_tokens": batching.size * model.engine.context,
            "max_batch_requests": batching.size,
            "max_client_batch_size": limits.texts,
            "auto_truncate": False,
            "tokenization_workers": 1,
            "version": __version__,
            "sha": None,
            "docker_label": None,
        }
    )


async def _check_length(model: Model, texts: list[str], where: str) -> None:
    await check_length(model, [Item("text", text, f"{where}[{number}]") for number, text in enumerate(texts)])
