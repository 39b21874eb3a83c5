"""create_app: settings, engine and index in, a FastAPI application out. Importing this module starts nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from server.auth import require_key
from server.engine import Engine
from server.errors import ApiError, on_api_error, on_http_error
from server.guarding import Guarding
from server.index import Index
from server.middleware import RequestContext
from server.routes import classify, embeddings, health, models, search
from server.schemas.classify import ClassifyRequest
from server.schemas.embeddings import EmbeddingsRequest
from server.schemas.search import SearchRequest
from server.services import Services
from server.settings import Settings

BODIES = (ClassifyRequest, EmbeddingsRequest, SearchRequest)
"""Requests that routes parse themselves, so that FastAPI does not know them."""


def create_app(
    settings: Settings, engine: Engine, index: Index | None = None, guarding: Guarding | None = None
) -> FastAPI:
    """The application. Threads start with its lifespan; the index is closed at its end.

    A guard has to watch the engine's own bundle.
    """
    services = Services(settings, engine, index, guarding)

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
    for module in (embeddings, classify, search, models):
        app.include_router(module.router, dependencies=[Depends(require_key)])
    _document_bodies(app)
    return app


def _document_bodies(app: FastAPI) -> None:
    """Add the schemas of self-parsed requests to the OpenAPI document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        _, definitions = models_json_schema(
            [(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}"
        )
        document["components"]["schemas"].update(definitions["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents for extending the document
