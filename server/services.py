"""What the routes share: the models, the collections, and what is true of them together."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from starlette.requests import Request

from server.catalogue import Collections
from server.detecting import Detecting
from server.fetching import Fetcher
from server.label_sets import LabelSets
from server.metrics import Metrics, write_state
from server.model import Model, patiently
from server.rates import Buckets
from server.registry import Registry
from server.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
SHARE_SECONDS = 1.0
"""How old another worker's numbers may be."""


class Services:
    """Models and collections, ready to be asked by many requests at once."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        collections: Collections | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.settings, self.registry, self.collections = settings, registry, collections or Collections()
        self.metrics = metrics or Metrics()
        self.keys = settings.keys
        """May be exchanged while the server runs."""
        self.fetcher = Fetcher(settings.fetch) if settings.fetch else None
        self.buckets = Buckets(1 / settings.workers)
        self.on_reload: Callable[[str], None] = lambda _name: None
        """Told the name of a model that was reloaded here, so that other workers can follow."""
        self._sharing: asyncio.Task[None] | None = None
        self.label_sets = LabelSets(settings.label_sets, settings.limits.label_sets)
        self.detecting = Detecting(settings)
        self.draining = False
        """Whether the server is about to end; readiness says so at once, requests are still answered."""

    async def start(self) -> None:
        """Start every model."""
        await self.registry.start()
        if self.settings.shared is not None:
            self._sharing = asyncio.create_task(self._share(self.settings.shared))

    async def stop(self) -> None:
        """End threads and close the collections."""
        if self._sharing is not None:
            self._sharing.cancel()
        if self.fetcher is not None:
            self.fetcher.close()
        await self.registry.stop()
        await self.collections.stop()

    def model(self, wanted: str | None = None) -> Model:
        """The model of that name, the default for none. Raises ApiError 400. Held until the answer is out."""
        return self.registry.get(wanted)

    def excess(self) -> float:
        """Seconds after which some model would take a picture; 0 when one would now."""
        return min(model.excess for model in self.registry.all())

    async def unready(self) -> str | None:
        """Why requests cannot be answered now; None when every model has just answered a canary."""
        if self.draining:
            return "the server is stopping"
        for model in self.registry.all():
            if (reason := await model.unready()) is not None:
                return reason if len(self.registry.all()) == 1 else f"{model.name}: {reason}"
        return None

    def measure(self) -> None:
        """Set the gauges to what is true now."""
        for model in self.registry.all():
            model.gauge()
        self.metrics.gauge("vlp_ready", int(not self.draining))
        self.metrics.process()

    async def _share(self, folder: Path) -> None:
        while True:
            self.measure()
            try:
                await asyncio.to_thread(write_state, folder, self.metrics)
            except OSError:
                log.exception("metrics are not shared with the other workers")
            await asyncio.sleep(SHARE_SECONDS)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Result of a function that blocks, within the time a request may take."""
        return await patiently(asyncio.to_thread(function), self.settings.limits.request_seconds)


def services_of(request: Request) -> Services:
    """The services of the app that handles this request."""
    found = request.app.state.services
    assert isinstance(found, Services)
    return found
