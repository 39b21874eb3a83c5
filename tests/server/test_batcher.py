"""The batcher and its worker thread: order, isolation, bounds, death."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines.errors import BadSample
from server.batcher import Batcher, Overloaded, Worker, WorkerStopped

Step = Callable[[Sequence[int]], NDArray[np.float32]]


def numbers(items: Sequence[int]) -> list[int | BadSample]:
    """Negative numbers cannot be prepared."""
    return [BadSample("negative", str(item)) if item < 0 else item for item in items]


def echo(items: Sequence[int]) -> NDArray[np.float32]:
    return np.array([[item] for item in items], np.float32)


def drive(scenario: Callable[[Batcher[int, int], Worker], Awaitable[Any]], step: Step = echo, **options: Any) -> Any:
    """Run a scenario on a started batcher."""

    async def main() -> Any:
        worker = Worker()
        worker.start()
        settings = {"limit": 64, "size": 8, "wait_ms": 2.0, "threads": 2, "chunk": 1, **options}
        batcher = Batcher(numbers, step, worker, **settings)
        batcher.start()
        try:
            return await asyncio.wait_for(scenario(batcher, worker), 20)
        finally:
            await batcher.stop()
            await asyncio.to_thread(worker.stop)

    return asyncio.run(main())


def test_order_is_kept_and_requests_share_steps() -> None:
    sizes: list[int] = []

    def step(items: Sequence[int]) -> NDArray[np.float32]:
        sizes.append(len(items))
        time.sleep(0.01)
        return echo(items)

    async def scenario(batcher: Batcher[int, int], _: Worker) -> Any:
        return await asyncio.gather(*(batcher.submit([n, n + 100]) for n in range(20)))

    answers = drive(scenario, step)
    assert [[row[0] for row in answer] for answer in answers] == [[n, n + 100] for n in range(20)]
    assert sum(sizes) == 40
    assert max(sizes) == 8
    assert len(sizes) < 20, "requests did not share steps"


def test_an_item_that_cannot_be_prepared_fails_alone() -> None:
    async def scenario(batcher: Batcher[int, int], _: Worker) -> Any:
        return await batcher.submit([1, -2, 3])

    first, second, third = drive(scenario)
    assert (first[0], third[0]) == (1, 3)
    assert isinstance(second, BadSample)


def test_an_item_that_breaks_the_step_fails_alone() -> None:
    def step(items: Sequence[int]) -> NDArray[np.float32]:
        time.sleep(0.02)
        if 13 in items:
            raise RuntimeError("thirteen")
        return echo(items)

    async def scenario(batcher: Batcher[int, int], _: Worker) -> Any:
        return await asyncio.gather(*(batcher.submit([n]) for n in (1, 13, 3, 4)), return_exceptions=True)

    good, bad, *others = drive(scenario, step)
    assert isinstance(bad, RuntimeError)
    assert [answer[0][0] for answer in (good, *others)] == [1, 3, 4]


def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    gate = threading.Event()

    def step(items: Sequence[int]) -> NDArray[np.float32]:
        gate.wait(10)
        return echo(items)

    async def scenario(batcher: Batcher[int, int], _: Worker) -> Any:
        waiting = asyncio.create_task(batcher.submit(list(range(60))))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        with pytest.raises(Overloaded):
            await batcher.submit(list(range(5)))
        refused = time.monotonic() - began
        gate.set()
        await waiting
        return refused, await batcher.submit(list(range(64)))

    refused, after = drive(scenario, step)
    assert refused < 0.05
    assert len(after) == 64


def test_work_of_a_client_that_left_is_not_done() -> None:
    done: list[int] = []
    gate = threading.Event()

    def step(items: Sequence[int]) -> NDArray[np.float32]:
        gate.wait(10)
        done.extend(items)
        return echo(items)

    async def scenario(batcher: Batcher[int, int], _: Worker) -> Any:
        first = asyncio.create_task(batcher.submit([1]))
        await asyncio.sleep(0.05)
        left = asyncio.create_task(batcher.submit([2]))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.wait([left])
        gate.set()
        await first
        return await batcher.submit([3])

    assert drive(scenario, step)[0][0] == 3
    assert done == [1, 3]


def test_a_dead_worker_answers_nobody_and_hangs_nobody() -> None:
    def step(items: Sequence[int]) -> NDArray[np.float32]:
        time.sleep(0.05)
        raise SystemExit

    async def scenario(batcher: Batcher[int, int], worker: Worker) -> Any:
        answers = await asyncio.gather(*(batcher.submit([n]) for n in range(20)), return_exceptions=True)
        with pytest.raises(WorkerStopped):
            await batcher.submit([1])
        with pytest.raises(WorkerStopped):
            await worker.run(lambda: 1)
        return answers, worker.alive

    answers, alive = drive(scenario, step, size=2)
    assert all(isinstance(answer, WorkerStopped) for answer in answers)
    assert not alive


def test_a_lone_client_does_not_wait_for_company() -> None:
    async def scenario(batcher: Batcher[int, int], _: Worker) -> float:
        began = time.monotonic()
        await batcher.submit([1])
        return time.monotonic() - began

    assert drive(scenario, wait_ms=5000.0) < 2
