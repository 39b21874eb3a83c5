"""Equal inputs are computed once: in flight, and afterwards from what is kept."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from data_pipelines.errors import BadSample
from server.results import Answer, Results


class Model:
    """Counts what it is asked; answers when its gate is open."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def submit(self, items: Sequence[str]) -> list[Answer]:
        self.asked.append(list(items))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if "fails" in items:
            raise RuntimeError("no")
        return [
            BadSample("corrupt_image", "x") if item == "bad" else np.full(2, len(item), np.float32) for item in items
        ]


def test_requests_share_what_is_in_flight_and_keep_their_order() -> None:
    async def main() -> None:
        model, counts = Model(), list[str]()
        results: Results[str] = Results(model.submit, 10, counts.append)
        model.gate.clear()
        first = asyncio.create_task(results.get(["a", "bb"], ["a", "bb"]))
        await asyncio.sleep(0)
        second = asyncio.create_task(results.get(["ccc", "bb", "ccc"], ["ccc", "bb", "ccc"]))
        await asyncio.sleep(0.01)
        model.gate.set()
        rows = [row[0] for row in await second if not isinstance(row, BadSample)]
        assert rows == [3, 2, 3]
        assert len(await first) == 2
        assert model.asked == [["a", "bb"], ["ccc"]]
        assert sorted(counts) == ["computed"] * 3 + ["joined"] * 2
        await results.get(["a"], ["a"])
        assert model.asked == [["a", "bb"], ["ccc"]]
        assert counts[-1] == "kept"

    asyncio.run(main())


def test_the_last_are_kept_and_bad_items_are_not() -> None:
    async def main() -> None:
        model = Model()
        results: Results[str] = Results(model.submit, 2)
        for key in ("a", "b", "a", "c", "bad", "bad"):
            await results.get([key], [key])
        assert model.asked == [["a"], ["b"], ["c"], ["bad"], ["bad"]]
        await results.get(["b"], ["b"])  # was used longest ago when c came
        await results.get(["c"], ["c"])
        assert model.asked[5:] == [["b"]]
        keeps_none: Results[str] = Results(model.submit, 0)
        await keeps_none.get(["z"], ["z"])
        await keeps_none.get(["z"], ["z"])
        assert model.asked[6:] == [["z"], ["z"]]

    asyncio.run(main())


def test_nan_is_not_kept() -> None:
    async def main() -> None:
        asked = 0

        async def submit(items: Sequence[str]) -> list[Answer]:
            nonlocal asked
            asked += 1
            return [np.full(2, np.nan, np.float32) for _ in items]

        results: Results[str] = Results(submit, 10)
        await results.get(["a"], ["a"])
        await results.get(["a"], ["a"])
        assert asked == 2

    asyncio.run(main())


def test_one_who_leaves_does_not_take_it_from_the_others() -> None:
    async def main() -> None:
        model = Model()
        results: Results[str] = Results(model.submit, 10)
        model.gate.clear()
        first = asyncio.create_task(results.get(["a"], ["a"]))
        second = asyncio.create_task(results.get(["a"], ["a"]))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        model.gate.set()
        assert len(await second) == 1
        assert (len(model.asked), model.cancelled) == (1, 0)

    asyncio.run(main())


def test_what_nobody_waits_for_is_ended_and_may_come_again() -> None:
    async def main() -> None:
        model = Model()
        results: Results[str] = Results(model.submit, 10)
        model.gate.clear()
        only = asyncio.create_task(results.get(["a"], ["a"]))
        await asyncio.sleep(0.01)
        only.cancel()
        await asyncio.sleep(0)
        model.gate.set()
        assert len(await results.get(["a"], ["a"])) == 1
        assert (len(model.asked), model.cancelled) == (2, 1)

    asyncio.run(main())


def test_failures_reach_all_who_wait_and_are_not_kept() -> None:
    async def main() -> None:
        model = Model()
        results: Results[str] = Results(model.submit, 10)
        failures = await asyncio.gather(
            results.get(["fails"], ["fails"]), results.get(["fails"], ["fails"]), return_exceptions=True
        )
        assert [str(failure) for failure in failures] == ["no", "no"]
        assert len(model.asked) == 1
        with pytest.raises(RuntimeError):
            await results.get(["fails"], ["fails"])
        assert len(model.asked) == 2

    asyncio.run(main())
