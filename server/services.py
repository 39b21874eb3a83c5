"""What the routes share: the model behind its batchers, the index, and the truth about their health."""

import asyncio
import base64
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from starlette.requests import Request
from torch import Tensor

from data_pipelines.errors import BadSample
from server.batcher import Batcher, Overloaded, Row, Worker, WorkerStopped
from server.engine import Engine, Vectors
from server.errors import ApiError, bad_request
from server.guarding import Guarding, Verdict
from server.index import Hit, Index, Value
from server.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
CANARY_SECONDS = 5.0
"""A model that does not answer one word within this time is not ready."""
CANARY_REST = 1.0
"""Seconds a good answer is believed, so that probing costs next to nothing."""
DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
"""A PNG of one pixel, to warm up with."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An embedded picture, and what the guard makes of it if there is one."""

    row: Row
    verdict: Verdict | None

    def guard(self) -> dict[str, Any]:
        """What a native answer says of it: nothing without a guard."""
        return {} if self.verdict is None else {"guard": self.verdict.content()}


class Services:
    """One model, at most one index and one guard, ready to be asked by many requests at once."""

    def __init__(
        self, settings: Settings, engine: Engine, index: Index | None = None, guarding: Guarding | None = None
    ) -> None:
        self.settings, self.engine, self.index, self.guarding = settings, engine, index, guarding
        self._worker = Worker()
        batching = settings.batching
        self._images: Batcher[bytes, Tensor] = Batcher(
            self._prepare_images,
            self._encode_images,
            self._worker,
            limit=max(batching.queue_images, settings.limits.images),
            size=batching.size,
            wait_ms=batching.wait_ms,
            threads=batching.threads,
            chunk=1,
        )
        self._texts: Batcher[Tensor, Tensor] = Batcher(
            lambda rows: rows,
            lambda rows: engine.encode_texts(torch.stack(list(rows))),
            self._worker,
            limit=max(batching.queue_texts, settings.limits.texts),
            size=batching.size,
            wait_ms=batching.wait_ms,
            threads=1,
            chunk=settings.limits.texts,
        )
        self._canary_at = -CANARY_REST

    async def start(self) -> None:
        """Start the threads and run both towers once: a broken model stops the start, and no client pays for it."""
        self._worker.start()
        self._images.start()
        self._texts.start()
        await self._worker.run(self._canary)
        (row,) = await self._images.submit([DOT])
        if isinstance(row, BadSample):
            raise row

    async def stop(self) -> None:
        """End threads and close the index."""
        await self._images.stop()
        await self._texts.stop()
        await asyncio.to_thread(self._worker.stop)
        if self.index is not None:
            self.index.close()

    async def unready(self) -> str | None:
        """Why requests cannot be answered now; None when the model has just answered a canary."""
        if not (self._worker.alive and self._images.alive and self._texts.alive):
            return "the model worker has stopped; restart the server"
        if self._images.full or self._texts.full:
            return "the queue is full"
        if time.monotonic() - self._canary_at < CANARY_REST:
            return None
        try:
            await asyncio.wait_for(self._worker.run(self._canary), CANARY_SECONDS)
        except asyncio.TimeoutError:
            return f"the model did not answer within {CANARY_SECONDS:g} s"
        except Exception:  # whatever the model raised, it is not ready
            log.exception("canary failed")
            return "the model does not answer"
        return None

    def _canary(self) -> None:
        rows = self.engine.encode_texts(self.engine.prepare_texts(["canary"]))
        if not np.isfinite(rows).all():
            raise ValueError("the model answers with NaN or infinity")
        self._canary_at = time.monotonic()

    def _encode_images(self, pixels: Sequence[Tensor]) -> Vectors:
        """ND, with a guard N(D+1)."""
        pixels_NCHW = torch.stack(list(pixels))
        if self.guarding is None:
            return self.engine.encode_images(pixels_NCHW)
        return self.guarding.encode(lambda: self.engine.encode_images(pixels_NCHW))

    def _prepare_images(self, images: Sequence[bytes]) -> list[Tensor | BadSample]:
        prepared: list[Tensor | BadSample] = []
        for data in images:
            try:
                prepared.append(self.engine.prepare_image(data))
            except BadSample as error:
                prepared.append(error)
        return prepared

    async def embed_images(self, images: Sequence[bytes]) -> list[Row | BadSample]:
        """One row or BadSample per encoded picture; the guard's verdicts go into headers."""
        return [item.row if isinstance(item, Seen) else item for item in await self.see_images(images)]

    async def see_images(self, images: Sequence[bytes]) -> list[Seen | BadSample]:
        """The same with the guard's verdicts, for answers that have a place for them."""
        rows = await self._patiently(self._images.submit(images)) if images else []
        return [row if isinstance(row, BadSample) else self._judged(row) for row in rows]

    def _judged(self, row: Row) -> Seen:
        if self.guarding is None:
            return Seen(row, None)
        return Seen(row[:-1], self.guarding.judge(float(row[-1])))

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """(ND, tokens without padding)."""
        if not texts:
            return np.empty((0, self.engine.dim), np.float32), 0
        tokens_NL = await asyncio.to_thread(self.engine.prepare_texts, texts)
        rows = await self._patiently(self._texts.submit(list(tokens_NL)))
        return np.stack([row for row in rows if not isinstance(row, BadSample)]), self.engine.count_tokens(tokens_NL)

    async def run(self, function: Callable[[], T]) -> T:
        """A short calculation with the model, in its thread."""
        return await self._patiently(self._worker.run(function))

    async def search(self, query: Row, limit: int, where: Mapping[str, Value], exact: bool) -> list[Hit]:
        """Best hits of the index."""
        index = self.index
        assert index is not None
        return await self._patiently(asyncio.to_thread(index.search, query, limit, where, exact))

    async def _patiently(self, waiting: Awaitable[T]) -> T:
        """Result within the time limit; refusals and failures as the answers clients should see."""
        seconds = self.settings.limits.request_seconds
        try:
            return await asyncio.wait_for(waiting, seconds)
        except Overloaded as error:
            raise ApiError(429, "too much is waiting already; try again", "overloaded", retry_after=1) from error
        except WorkerStopped as error:
            raise ApiError(503, "the model worker has stopped", "unavailable", retry_after=10) from error
        except asyncio.TimeoutError as error:
            message = f"no answer within {seconds:g} s; send fewer items per request, or try again"
            raise ApiError(503, message, "timeout", retry_after=1) from error

    def check_model(self, wanted: str | None) -> None:
        """Refuse a request for another model."""
        if wanted not in (None, "", self.engine.name):
            message = f"model {wanted!r} is not served here; this server has {self.engine.name!r}"
            raise bad_request(message, "model", "model_not_found")


def services_of(request: Request) -> Services:
    """The services of the app that handles this request."""
    found = request.app.state.services
    assert isinstance(found, Services)
    return found
