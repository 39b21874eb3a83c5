"""Bounded micro-batching: items are prepared in threads, gathered over requests, and run in one model thread.

A request's items enter together or not at all (`Overloaded`). An item that cannot be prepared comes back as its
BadSample; a step that fails is repeated item by item, so that only the guilty one fails.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample

log = logging.getLogger(__name__)

Raw = TypeVar("Raw")
Ready = TypeVar("Ready")
T = TypeVar("T")
Row = NDArray[np.float32]


class Overloaded(Exception):
    """The queue has no room for this request; `seconds` may be enough to wait."""

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__()
        self.seconds = seconds


class WorkerStopped(Exception):
    """The model thread has ended; nothing will be answered any more."""


class Worker:
    """One thread that runs model steps in order. Knows whether it is still alive."""

    def __init__(self, name: str = "vlp-model") -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        """Begin to take jobs."""
        self._open = True
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are still taken and run."""
        return self._open and self._thread.is_alive()

    async def run(self, function: Callable[[], T]) -> T:
        """Result of `function`, run in the thread after everything submitted before it."""
        future: Future[T] = Future()
        with self._lock:
            if not self.alive:
                raise WorkerStopped
            self._jobs.put((future, function))
        return await asyncio.wrap_future(future)

    def stop(self, timeout: float = 5.0) -> None:
        """Finish what was submitted, then end."""
        with self._lock:
            self._open = False
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _loop(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                future, function = job
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(function())
                except Exception as error:  # noqa: BLE001 - handed to whoever waits for the result
                    future.set_exception(error)
                except BaseException as error:  # noqa: BLE001 - SystemExit and the like end the thread, and readiness
                    log.critical("the model worker stops: %r", error)
                    future.set_exception(WorkerStopped())
                    return
        finally:
            with self._lock:
                self._open = False
            while not self._jobs.empty():
                if (left := self._jobs.get()) is not None and left[0].set_running_or_notify_cancel():
                    left[0].set_exception(WorkerStopped())


@dataclass(slots=True)
class _Job(Generic[Ready]):
    item: Ready
    future: "asyncio.Future[Row]"


class Batcher(Generic[Raw, Ready]):
    """One kind of item (pictures or texts) on its way through a worker. Belongs to one event loop."""

    def __init__(
        self,
        prepare: Callable[[Sequence[Raw]], Sequence[Ready | BadSample]],
        step: Callable[[Sequence[Ready]], NDArray[np.float32]],
        worker: Worker,
        *,
        limit: int,
        size: int,
        wait_ms: float,
        threads: int,
        chunk: int,
        patience: float = math.inf,
        observe: Callable[[int, float], None] = lambda _items, _seconds: None,
    ) -> None:
        """`limit`: items accepted at a time. `size`: items per step. `chunk`: items per call of `prepare`.

        `patience`: seconds that items accepted before may be expected to take. `observe`: told of every step.
        """
        self._patience, self._observe = patience, observe
        self._pace = 0.0
        self._idle_since = 0.0
        self._prepare, self._step, self._worker = prepare, step, worker
        self._limit, self._size, self._wait, self._chunk = limit, size, wait_ms / 1000, chunk
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vlp-prepare")
        self._ready: deque[_Job[Ready]] = deque()
        self._accepted = 0
        self._preparing = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to form batches; call inside the event loop."""
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End; whatever was accepted should have been answered before."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether batches are still being formed."""
        return self._task is not None and not self._task.done()

    @property
    def accepted(self) -> int:
        """Items that are waiting for their answer."""
        return self._accepted

    @property
    def full(self) -> bool:
        """Whether the next item would be refused."""
        return self._accepted >= self._limit

    @property
    def backlog(self) -> float:
        """Seconds until everything accepted is answered, at the pace of the last steps."""
        return self._accepted * self._pace

    def warmed(self) -> None:
        """Forget the pace of steps that were only a warm-up."""
        self._pace = 0.0

    @property
    def excess(self) -> float:
        """Seconds after which one more item would be accepted; 0 when it would be now."""
        if self._accepted < self._limit and self.backlog <= self._patience:
            return 0.0
        return max(self.backlog - self._patience, self._pace, 0.001)

    async def submit(self, items: Sequence[Raw]) -> list[Row | BadSample]:
        """One row or BadSample per item, in order. Raises Overloaded, WorkerStopped, or what the model raised."""
        if self._accepted + len(items) > self._limit or self.backlog > self._patience:
            raise Overloaded(self.excess)
        if not self.alive or not self._worker.alive:
            raise WorkerStopped
        if not self._accepted:
            self._idle_since = time.monotonic()
        self._accepted += len(items)
        try:
            chunks = [items[at : at + self._chunk] for at in range(0, len(items), self._chunk)]
            answers = await asyncio.gather(*(self._answer(chunk) for chunk in chunks))
        finally:
            self._accepted -= len(items)
        return [answer for part in answers for answer in part]

    async def _answer(self, items: Sequence[Raw]) -> list[Row | BadSample]:
        loop = asyncio.get_running_loop()
        self._preparing += len(items)
        try:
            prepared = await loop.run_in_executor(self._pool, self._prepare, items)
        finally:
            self._preparing -= len(items)
        jobs = [None if isinstance(item, BadSample) else _Job(item, loop.create_future()) for item in prepared]
        self._ready.extend(job for job in jobs if job is not None)
        self._wake.set()
        rows = iter(await asyncio.gather(*(job.future for job in jobs if job is not None)))
        return [item if isinstance(item, BadSample) else next(rows) for item in prepared]

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await self._gather_more()
            batch = self._take()
            if batch:
                await self._run_batch(batch)
            if not self._ready:
                self._wake.clear()

    async def _gather_more(self) -> None:
        """Wait a moment for items that are being prepared right now; a lone client never waits."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait
        while self._preparing and len(self._ready) < self._size and (left := deadline - loop.time()) > 0:
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), left)
            except asyncio.TimeoutError:
                return

    def _take(self) -> list[_Job[Ready]]:
        batch: list[_Job[Ready]] = []
        while self._ready and len(batch) < self._size:
            job = self._ready.popleft()
            if not job.future.done():  # its client has gone or timed out
                batch.append(job)
        return batch

    async def _run_batch(self, batch: list[_Job[Ready]]) -> None:
        began = time.monotonic()
        try:
            rows = await self._worker.run(partial(self._step, [job.item for job in batch]))
        except Exception as error:  # noqa: BLE001 - handed to the requests that wait for these items
            if len(batch) > 1 and not isinstance(error, WorkerStopped):
                for job in batch:
                    await self._run_batch([job])
                return
            for job in batch:
                if not job.future.done():
                    job.future.set_exception(error)
            return
        self._measure(len(batch), began)
        for job, row in zip(batch, rows, strict=True):
            if not job.future.done():
                job.future.set_result(row)

    def _measure(self, items: int, began: float) -> None:
        """Pace: time from the end of one step to the end of the next, preparation included, while there was work."""
        now = time.monotonic()
        seconds = (now - self._idle_since) / items
        self._pace = seconds if not self._pace else 0.8 * self._pace + 0.2 * seconds
        self._idle_since = now
        self._observe(items, now - began)
