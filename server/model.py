"""One model at work: its engine behind two batchers and one thread, its guard, and the truth about its health."""

import asyncio
import base64
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_pipelines.errors import BadSample
from server.batcher import Batcher, Overloaded, Row, Worker, WorkerStopped
from server.context import STATE
from server.engine import Engine, Vectors
from server.errors import ApiError
from server.guarding import Guarding, Verdict
from server.heads import Heads
from server.metrics import ITEMS, Metrics
from server.results import Results
from server.settings import Settings

if TYPE_CHECKING:
    from vlp.detection.infer import Detector

log = logging.getLogger(__name__)

T = TypeVar("T")
CANARY_SECONDS = 5.0
"""A model that does not answer one word within this time is not ready."""
CANARY_REST = 1.0
"""Seconds a good answer is believed, so that probing costs next to nothing."""
DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
"""A PNG of one pixel, to warm up with."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, before it is at work."""

    engine: Engine
    guarding: Guarding | None = None
    digest: str = ""
    """sha256 of the weights, which indexes and collections remember; empty when it is not known."""
    folder: Path | None = None
    """The bundle's folder, for parts that are loaded when they are first needed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An embedded picture, and what the guard makes of it if there is one."""

    row: Row
    verdict: Verdict | None

    def guard(self) -> dict[str, Any]:
        """What a native answer says of it: nothing without a guard."""
        return {} if self.verdict is None else {"guard": self.verdict.content()}


class Model:
    """Ready to be asked by many requests at once. Belongs to one event loop."""

    def __init__(self, loaded: Loaded, settings: Settings, metrics: Metrics | None = None) -> None:
        self.engine, self.guarding = loaded.engine, loaded.guarding
        self.digest, self.folder = loaded.digest, loaded.folder
        self.name, self.dim = loaded.engine.name, loaded.engine.dim
        self.leases = 0
        """Requests that are using it; a replaced model ends when none is left."""
        self._seconds = settings.limits.request_seconds
        self._worker = Worker()
        self._metrics = metrics or Metrics()
        batching, limits = settings.batching, settings.limits
        self._images: Batcher[bytes, Tensor] = Batcher(
            self._prepare_images, self._encode_images, self._worker,
            limit=max(batching.queue_images, limits.images), size=batching.size, wait_ms=batching.wait_ms,
            threads=batching.threads, chunk=1, patience=batching.patience, observe=partial(self._observe, "image"),
        )  # fmt: skip
        self._texts: Batcher[str, Tensor] = Batcher(
            lambda texts: list(self.engine.prepare_texts(texts)), self._encode_texts, self._worker,
            limit=max(batching.queue_texts, limits.texts), size=batching.size, wait_ms=batching.wait_ms,
            threads=1, chunk=limits.texts, patience=batching.patience, observe=partial(self._observe, "text"),
        )  # fmt: skip
        self._image_results: Results[bytes] = Results(
            self._images.submit, batching.results, partial(self._count, "image")
        )
        self._text_results: Results[str] = Results(self._texts.submit, batching.results, partial(self._count, "text"))
        self.heads = Heads(self.embed_texts)
        self.detector: Detector | None = None
        """What `detecting` has loaded for it."""
        self._canary_at = -CANARY_REST

    async def start(self) -> None:
        """Start the threads and run both towers once: a broken model stops the start, and no client pays for it."""
        self._worker.start()
        self._images.start()
        self._texts.start()
        try:
            await self._worker.run(self._canary)
            (row,) = await self._images.submit([DOT])
            if isinstance(row, BadSample):
                raise row
            self._images.warmed()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the threads."""
        await self._images.stop()
        await self._texts.stop()
        await asyncio.to_thread(self._worker.stop)

    async def unready(self) -> str | None:
        """Why requests cannot be answered now; None when the model has just answered a canary."""
        if self.dead:
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

    @property
    def dead(self) -> bool:
        """Whether it will answer nothing any more."""
        return not (self._worker.alive and self._images.alive and self._texts.alive)

    @property
    def excess(self) -> float:
        """Seconds after which a picture would be accepted; 0 when it would be now."""
        return self._images.excess

    def gauge(self) -> None:
        """Set what is true of it now in the metrics."""
        for kind, batcher in (("image", self._images), ("text", self._texts)):
            self._metrics.gauge("vlp_items_waiting", batcher.accepted, model=self.name, kind=kind)
            self._metrics.gauge("vlp_backlog_seconds", batcher.backlog, model=self.name, kind=kind)

    def _count(self, kind: str, how: str) -> None:
        self._metrics.add("vlp_items_total", model=self.name, kind=kind, how=how)

    def _observe(self, kind: str, items: int, seconds: float) -> None:
        self._metrics.observe("vlp_batch_items", items, ITEMS, model=self.name, kind=kind)
        self._metrics.add("vlp_batch_seconds_total", seconds, model=self.name, kind=kind)

    async def embed_images(self, images: Sequence[bytes]) -> list[Row | BadSample]:
        """One row or BadSample per encoded picture; the guard's verdicts go into headers."""
        return [item.row if isinstance(item, Seen) else item for item in await self.see_images(images)]

    async def see_images(self, images: Sequence[bytes]) -> list[Seen | BadSample]:
        """The same with the guard's verdicts, for answers that have a place for them."""
        if not images:
            return []
        keys = [hashlib.sha256(data).digest() for data in images]
        rows = await self._patiently(self._image_results.get(keys, images))
        return [row if isinstance(row, BadSample) else self._judged(row) for row in rows]

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """(ND, tokens without padding)."""
        if not texts:
            return np.empty((0, self.dim), np.float32), 0
        rows = await self._patiently(self._text_results.get(texts, texts))
        counted_NC = np.stack([row for row in rows if not isinstance(row, BadSample)])
        return counted_NC[:, :-1], int(counted_NC[:, -1].sum())

    async def run(self, function: Callable[[], T]) -> T:
        """A short calculation with the model, in its thread."""
        return await self._patiently(self._worker.run(function))

    async def classify(self, images_ND: Vectors, prompts_PD: Vectors, labels: int) -> tuple[Vectors, Vectors]:
        """(probabilities_NL, cosines_NL) over labels whose prompts are averaged."""
        return await self.run(lambda: self.engine.classify(images_ND, prompts_PD, labels))

    def _canary(self) -> None:
        rows = self.engine.encode_texts(self.engine.prepare_texts(["canary"]))
        if not np.isfinite(rows).all():
            raise ValueError("the model answers with NaN or infinity")
        self._canary_at = time.monotonic()

    def _encode_texts(self, tokens: Sequence[Tensor]) -> Vectors:
        """N(D+1): embeddings, beside them the numbers of tokens."""
        tokens_NL = torch.stack(list(tokens))
        counts_N = self.engine.count_tokens(tokens_NL).astype(np.float32)
        return np.column_stack([self.engine.encode_texts(tokens_NL), counts_N])

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

    def _judged(self, row: Row) -> Seen:
        if self.guarding is None:
            return Seen(row, None)
        verdict = self.guarding.judge(float(row[-1]))
        self._metrics.add("vlp_guard_pictures_total", model=self.name, flagged=str(verdict.flagged).lower())
        if (state := STATE.get()) is not None:
            state.verdicts.append(verdict)
        return Seen(row[:-1], verdict)

    async def _patiently(self, waiting: Awaitable[T]) -> T:
        return await patiently(waiting, self._seconds)


async def patiently(waiting: Awaitable[T], seconds: float) -> T:
    """Result within the time limit; refusals and failures as the answers clients should see."""
    try:
        return await asyncio.wait_for(waiting, seconds)
    except Overloaded as error:
        raise overloaded(error.seconds) from error
    except WorkerStopped as error:
        raise ApiError(503, "the model worker has stopped", "unavailable", retry_after=10) from error
    except asyncio.TimeoutError as error:
        message = f"no answer within {seconds:g} s; send fewer items per request, or try again"
        raise ApiError(503, message, "timeout", retry_after=1) from error


def overloaded(seconds: float) -> ApiError:
    """429, with the time after which there may be room."""
    return ApiError(429, "too much is waiting already; try again", "overloaded", retry_after=seconds)
