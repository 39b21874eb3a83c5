"""create_app: settings, engine and index in, a FastAPI application out. Importing this module starts nothing."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import ModuleType

from fastapi import Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from server.auth import needs
from server.catalogue import DEFAULT, INDEX_ERRORS, Collections, on_index_error
from server.dialects import on_api_error, on_http_error
from server.document import completed
from server.engine import Engine
from server.errors import ApiError
from server.guarding import Guarding
from server.index import Index
from server.metrics import Metrics
from server.middleware import RequestContext
from server.model import Loaded
from server.registry import Registry, Source
from server.routes import (
    classify,
    clip_retrieval,
    cohere,
    collections,
    compare,
    detect,
    embeddings,
    health,
    huggingface,
    label_sets,
    models,
    operations,
    page,
    points,
    points_search,
    search,
    tei,
)
from server.services import Services
from server.settings import Settings

KEYED: tuple[ModuleType, ...] = (
    embeddings, classify, detect, compare, label_sets, search, collections, points, points_search, models, cohere,
    tei, huggingface, clip_retrieval,
)  # fmt: skip
"""Routes that need a key, in the order of the document. A module's BODIES are the requests that it parses itself;
its `writing` router, where there is one, holds those that change what is kept."""
SEEING = (embeddings, classify, detect, compare, search, points_search, cohere, tei, huggingface, clip_retrieval)
"""Those whose large bodies hold pictures, refused unread when there is no room for any."""


def create_app(
    settings: Settings, sources: Engine | Sequence[Source], index: Index | None = None,
    guarding: Guarding | None = None, kept: Collections | None = None,
) -> FastAPI:  # fmt: skip
    """The application. Threads start with its lifespan; collections are closed at its end.

    `sources`: one engine, or several models that can be reloaded; the first is the default. `guarding` goes with an
    engine and has to watch its own bundle; a Source has its own. `index` is a default collection without a store.
    """
    if not isinstance(sources, Sequence):
        sources = [Source(Loaded(sources, guarding))]
    metrics = Metrics()
    if kept is None:
        kept = Collections(None, {} if index is None else {DEFAULT: index})
    services = Services(settings, Registry(settings, sources, metrics), kept, metrics)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            await services.start()
            yield
        finally:
            await services.stop()

    app = FastAPI(
        title="vlp",
        summary="Embeddings, zero-shot classification and search with a vision-language model.",
        version="1",
        lifespan=lifespan,
        docs_url="/docs" if settings.docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
    )
    app.state.services = services
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    for kind in INDEX_ERRORS:
        app.add_exception_handler(kind, on_index_error)
    cors = partial(
        CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST", "PUT", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        expose_headers=["X-Request-Id", "X-Guard-Flagged", "X-Guard-Score", "Retry-After"],
    )  # fmt: skip
    seeing = [route for module in SEEING for route in module.router.routes]
    sharing = cors if settings.cors_origins else None
    app.add_middleware(RequestContext, services=services, seeing=seeing, sharing=sharing)
    app.include_router(page.router)
    app.include_router(health.router)
    app.include_router(operations.router)
    for module in KEYED:
        app.include_router(module.router, dependencies=[Depends(needs("read"))])
        if hasattr(module, "writing"):
            app.include_router(module.writing, dependencies=[Depends(needs("write"))])
    bodies = [body for module in KEYED for body in getattr(module, "BODIES", ())]
    app.openapi = completed(app, bodies)  # type: ignore[method-assign]  # FastAPI's way to extend the document
    return app
