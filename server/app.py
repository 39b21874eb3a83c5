"""create_app: settings, engine and index in, a FastAPI application out. Importing this module starts nothing."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

from fastapi import Depends, FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from server.auth import require_key
from server.dialects import on_api_error, on_http_error
from server.engine import Engine
from server.errors import ApiError
from server.guarding import Guarding
from server.index import Index
from server.middleware import RequestContext
from server.model import Loaded
from server.registry import Registry, Source
from server.routes import classify, cohere, embeddings, health, models, search, tei
from server.services import Services
from server.settings import Settings

KEYED: tuple[ModuleType, ...] = (embeddings, cohere, tei, classify, search, models)
"""Routes that need a key, in the order of the document. A module's BODIES are the requests that it parses itself."""


def create_app(
    settings: Settings, sources: Engine | Sequence[Source], index: Index | None = None, guarding: Guarding | None = None
) -> FastAPI:
    """The application. Threads start with its lifespan; the index is closed at its end.

    `sources`: one engine, or several models that can be reloaded; the first is the default. `guarding` goes with an
    engine and has to watch its own bundle; a Source has its own.
    """
    if not isinstance(sources, Sequence):
        sources = [Source(Loaded(sources, guarding))]
    services = Services(settings, Registry(settings, sources), index)

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
    app.add_middleware(RequestContext, most=settings.limits.requests)
    app.include_router(health.router)
    for module in KEYED:
        app.include_router(module.router, dependencies=[Depends(require_key)])
    _document_bodies(app)
    return app


def _document_bodies(app: FastAPI) -> None:
    """Add the schemas of self-parsed requests to the OpenAPI document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        bodies = [body for module in KEYED for body in getattr(module, "BODIES", ())]
        _, definitions = models_json_schema(
            [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
        )
        document["components"]["schemas"].update(definitions["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents for extending the document
