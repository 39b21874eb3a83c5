"""The models of this server by name: chosen per request, exchanged while it runs.

A model that is replaced answers the requests it has begun, and ends when the last of them is done.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipelines.errors import PipelineError
from server.context import STATE
from server.errors import ApiError, bad_request
from server.metrics import Metrics
from server.model import Loaded, Model
from server.settings import Settings

log = logging.getLogger(__name__)

RETIRE_SECONDS = 60.0
"""A replaced model ends after this time even if a request still holds it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model, and how to load it again."""

    loaded: Loaded
    load: Callable[[], Loaded] | None = None
    """Run in a thread. Raises PipelineError with what is wrong. Without it the model cannot be reloaded."""


class Registry:
    """At least one model; the first answers requests that name none. Belongs to one event loop."""

    def __init__(self, settings: Settings, sources: Sequence[Source], metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._sources = {source.loaded.engine.name: source for source in sources}
        assert len(self._sources) == len(sources) > 0, "model names are different, and there is at least one"
        self._models: dict[str, Model] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._lock: asyncio.Lock | None = None

    async def start(self) -> None:
        """All models at work. A broken one stops the start."""
        self._lock = asyncio.Lock()
        for name, source in self._sources.items():
            self._models[name] = Model(source.loaded, self._settings, self._metrics)
            await self._models[name].start()

    async def stop(self) -> None:
        """All threads ended, those of replaced models too."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        for model in self._models.values():
            await model.stop()

    def all(self) -> list[Model]:
        """Every model, the default first."""
        return list(self._models.values())

    def get(self, wanted: str | None) -> Model:
        """The model of that name, the default for None or "". Raises ApiError 400.

        The request that asks holds it until its answer is out: a reload in between does not take it away.
        """
        if not wanted:
            model = next(iter(self._models.values()))
        elif (found := self._models.get(wanted)) is not None:
            model = found
        else:
            known = ", ".join(map(repr, self._models))
            message = f"model {wanted[:200]!r} is not served here; this server has {known}"
            raise bad_request(message, "model", "model_not_found")
        if (state := STATE.get()) is not None:
            state.model = model.name
            model.leases += 1
            state.releases.append(lambda: _let_go(model))
        return model

    async def reload(self, name: str) -> Model:
        """Load a model again from where it came from, and put it in place of the old one once it has answered.

        Raises ApiError 404, 409 when it has no source or its files are unusable; the old model stays then.
        """
        source = self._sources.get(name)
        if source is None:
            raise ApiError(404, f"model {name[:200]!r} is not served here", "model_not_found", "model")
        if source.load is None:
            raise ApiError(409, f"model {name!r} was not loaded from a folder", "not_reloadable", "model")
        assert self._lock is not None
        async with self._lock:
            began = time.monotonic()
            try:
                loaded = await asyncio.to_thread(source.load)
                fresh = Model(loaded, self._settings, self._metrics)
                await fresh.start()
            except Exception as error:
                log.exception("model %s was not reloaded; the old one stays", name)
                reason = str(error) if isinstance(error, PipelineError) and not _has_path(str(error)) else "see the log"
                message = f"model {name!r} was not reloaded, the old one stays: {reason}"
                raise ApiError(409, message, "reload_failed", "model") from error
            old, self._models[name] = self._models[name], fresh
            self._sources[name] = Source(loaded, source.load)
            self._metrics.add("vlp_model_reloads_total", model=name)
            log.info("model %s reloaded in %.1f s, weights %s", name, time.monotonic() - began, loaded.digest[:12])
            task = asyncio.create_task(_retire(old))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
            return fresh

    async def reload_all(self) -> None:
        """Every model that can be reloaded; failures are logged and leave the old one."""
        for name, source in list(self._sources.items()):
            if source.load is not None:
                try:
                    await self.reload(name)
                except ApiError as error:
                    log.error("%s", error.message)


def _let_go(model: Model) -> None:
    model.leases -= 1


def _has_path(text: str) -> bool:
    """Whether a message may hold a file name, which no client is told."""
    return "/" in text or "\\" in text


async def _retire(model: Model) -> None:
    deadline = time.monotonic() + RETIRE_SECONDS
    try:
        while model.leases and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
    finally:
        await model.stop()
