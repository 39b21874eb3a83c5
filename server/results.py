"""Results shared between requests: an input that is being computed is not computed again, and the last ones are kept.

A popular query arrives in many requests at the same moment; all of them wait for one computation, which ends early only
when the last of them has gone.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from data_pipelines.errors import BadSample
from server.batcher import Row

K = TypeVar("K", bound=Hashable)
Answer = Row | BadSample


@dataclass(slots=True, eq=False)
class _Computing:
    """Items on their way through the model together."""

    task: "asyncio.Task[list[Answer]]"
    keys: tuple[Any, ...]
    waiting: int = 0


class Results(Generic[K]):
    """What was computed lately or is being computed now. Belongs to one event loop."""

    def __init__(
        self, submit: Callable[[Sequence[Any]], Awaitable[list[Answer]]], most: int,
        count: Callable[[str], None] = lambda _how: None,
    ) -> None:  # fmt: skip
        """`submit` computes items in order; `most`: rows kept, 0 keeps none; `count` is told how each item was had:
        `computed`, `joined` to another request's, or `kept`."""
        self._submit, self._most, self._count = submit, most, count
        self._kept: OrderedDict[K, Row] = OrderedDict()
        self._now: dict[K, tuple[_Computing, int]] = {}

    async def get(self, keys: Sequence[K], items: Sequence[Any]) -> list[Answer]:
        """One row or BadSample per item, in order; equal keys mean equal items. Raises what `submit` raises."""
        found: dict[K, Answer] = {}
        places: dict[K, tuple[_Computing, int]] = {}
        new: dict[K, Any] = {}
        for key, item in zip(keys, items, strict=True):
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
                self._count("kept")
            elif (place := self._now.get(key)) is not None:
                places[key] = place
                self._count("joined")
            else:
                self._count("joined" if key in new else "computed")
                new.setdefault(key, item)
        if new:
            places |= self._begin(new)
        if places:
            found |= await self._wait(places)
        return [found[key] for key in keys]

    def _begin(self, new: dict[K, Any]) -> dict[K, tuple[_Computing, int]]:
        computing = _Computing(asyncio.create_task(self._compute(new)), tuple(new))
        places = {key: (computing, at) for at, key in enumerate(new)}
        self._now |= places
        computing.task.add_done_callback(lambda _: self._end(computing, new))
        return places

    async def _compute(self, new: dict[K, Any]) -> list[Answer]:
        return await self._submit(list(new.values()))

    def _end(self, computing: _Computing, keys: dict[K, Any]) -> None:
        self._forget(computing)
        if computing.task.cancelled() or computing.task.exception() is not None:
            return
        for key, row in zip(keys, computing.task.result(), strict=True):
            if self._most and not isinstance(row, BadSample) and np.isfinite(row).all():
                self._kept[key] = row.copy()  # or one row would keep its whole batch in memory
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _forget(self, computing: _Computing) -> None:
        """From now on nobody joins."""
        for key in computing.keys:
            if self._now.get(key, (None, 0))[0] is computing:
                del self._now[key]

    async def _wait(self, places: dict[K, tuple[_Computing, int]]) -> dict[K, Answer]:
        computings = dict.fromkeys(computing for computing, _ in places.values())
        for computing in computings:
            computing.waiting += 1
        try:
            for computing in computings:
                await asyncio.shield(computing.task)
        finally:
            for computing in computings:
                computing.waiting -= 1
                if not computing.waiting and not computing.task.done():
                    self._forget(computing)
                    computing.task.cancel()
        return {key: computing.task.result()[at] for key, (computing, at) in places.items()}
