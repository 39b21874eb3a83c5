"""What the routes share: the models, the index, and what is true of them together."""

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from starlette.requests import Request

from server.batcher import Row
from server.index import Hit, Index, Value
from server.model import Model, patiently
from server.registry import Registry
from server.settings import Settings

T = TypeVar("T")


class Services:
    """Models and at most one index, ready to be asked by many requests at once."""

    def __init__(self, settings: Settings, registry: Registry, index: Index | None = None) -> None:
        self.settings, self.registry, self.index = settings, registry, index
        self.draining = False
        """Whether the server is about to end; readiness says so at once, requests are still answered."""

    async def start(self) -> None:
        """Start every model."""
        await self.registry.start()

    async def stop(self) -> None:
        """End threads and close the index."""
        await self.registry.stop()
        if self.index is not None:
            self.index.close()

    def model(self, wanted: str | None = None) -> Model:
        """The model of that name, the default for none. Raises ApiError 400. Held until the answer is out."""
        return self.registry.get(wanted)

    async def unready(self) -> str | None:
        """Why requests cannot be answered now; None when every model has just answered a canary."""
        if self.draining:
            return "the server is stopping"
        for model in self.registry.all():
            if (reason := await model.unready()) is not None:
                return reason if len(self.registry.all()) == 1 else f"{model.name}: {reason}"
        return None

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Result of a function that blocks, within the time a request may take."""
        return await patiently(asyncio.to_thread(function), self.settings.limits.request_seconds)

    async def search(self, query: Row, limit: int, where: Mapping[str, Value], exact: bool) -> list[Hit]:
        """Best hits of the index."""
        index = self.index
        assert index is not None
        return await self.in_thread(lambda: index.search(query, limit, where, exact))


def services_of(request: Request) -> Services:
    """The services of the app that handles this request."""
    found = request.app.state.services
    assert isinstance(found, Services)
    return found
