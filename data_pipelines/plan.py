"""Which samples make up global step k: pure arithmetic on (shard sizes, seed, step).

Shards are permuted, then samples inside windows of consecutive shards; a window is computed when a step needs it. The
order of an epoch is cut into `partitions` equal runs of which every step takes an equal share, so a rank that owns some
rows of the batch reads only the shards of their partitions. Nothing of the order is state: any number of ranks sees the
same global batches, and resuming at step k costs the same as starting.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import ConfigError
from data_pipelines.sampler import Sampler

Ids = NDArray[np.int64]
Key = TypeVar("Key")
Value = TypeVar("Value")

CYCLE = 4096
"""Rows after which the pattern of a mixture repeats; weights are rounded to multiples of 1 / CYCLE."""
SUBSTITUTES = 15
"""Purpose of the random numbers that replace an unusable sample."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of consecutive shards that is shuffled by itself; a mixture has several."""

    shards: int
    weight: float = 1.0


class Plan:
    """The order of one data set. Sample ids number the samples of all shards through. Holds the last windows."""

    def __init__(
        self,
        sizes: Sequence[int] | Ids,
        batch_size: int,
        seed: int = 0,
        window: int = 16,
        partitions: int = 1,
        parts: Sequence[Part] = (),
        lengths: Callable[[int], Ids] | None = None,
        group: int = 0,
        sampler: Sampler | None = None,
    ) -> None:
        """`sizes`: samples per shard. `batch_size`: rows of a global step, over all ranks.

        `window`: shards whose samples are mixed with each other; at most this many are read at a time per partition.
        `parts`: components of a mixture, in the order of the shards; none = one data set.
        `lengths(shard)`: text length of each of its samples; with `group` > 0, so many batches are sorted by length and
        cut into batches of similar length, whose order is drawn again. `sampler`: arranges each window by classes.
        """
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.batch_size, self.seed, self.window, self.partitions = batch_size, seed, window, partitions
        self._firsts = np.concatenate([[0], self.sizes.cumsum()]).astype(np.int64)
        parts = parts or (Part(len(self.sizes)),)
        ends = np.cumsum([part.shards for part in parts])
        self._parts = [
            _Order(self, number, int(end) - part.shards, int(end))
            for number, (part, end) in enumerate(zip(parts, ends, strict=True))
        ]
        self._lengths, self._group, self._sampler = lengths, group, sampler
        self._check()
        self._pattern = _pattern([part.weight for part in parts]) if len(parts) > 1 else None

    def _check(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"data.batch_size={self.batch_size} must be at least 1")
        if self.partitions < 1 or self.batch_size % self.partitions:
            raise ConfigError(f"data.partitions={self.partitions} must divide data.batch_size={self.batch_size}")
        if self.samples < 1:
            raise ConfigError("the data set holds no sample")
        if len(self._parts) == 1 and self.steps < 1:
            raise ConfigError(
                f"data.batch_size={self.batch_size} in {self.partitions} partition(s) exceeds the {self.samples} "
                "samples of the data set: use less"
            )
        for number, part in enumerate(self._parts):
            if part.samples < self.partitions:
                raise ConfigError(
                    f"part {number} of data.train holds {part.samples} samples: use fewer data.partitions"
                )
        if self._group and len(self._parts) > 1:
            raise ConfigError("data.group_by_length needs one data set, not a mixture")
        if self._sampler is not None:
            self._check_sampler(self._sampler.config.k)

    def _check_sampler(self, k: int) -> None:
        if len(self._parts) > 1:
            raise ConfigError("data.sampler needs one data set, not a mixture: join the folders by `::`")
        if self._group:
            raise ConfigError(f"data.sampler and data.group_by_length={self._group} exclude each other: leave one out")
        if self.share % k:
            raise ConfigError(
                f"data.sampler.k={k} must divide the {self.share} rows of a step that each partition provides"
            )

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return int(self._firsts[-1])

    @property
    def steps(self) -> int:
        """Global steps per epoch; in a mixture, steps in which as many rows are drawn as there are samples."""
        steps = self.samples // self.partitions // self.share
        return steps if len(self._parts) == 1 else max(1, steps)

    @property
    def share(self) -> int:
        """Rows of a step that each partition provides."""
        return self.batch_size // self.partitions

    def batch(self, step: int, rows: slice | None = None) -> Ids:
        """Sample ids of some rows (default all) of global step `step` (0-based, running over epochs), in order."""
        first, last = (0, self.batch_size) if rows is None else (rows.start, rows.stop)
        found = [np.empty(0, dtype=np.int64)]
        for partition in range(first // self.share, -(-last // self.share)):
            skip = partition * self.share
            start, stop = max(first - skip, 0), min(last - skip, self.share)
            found.append(self._run(partition, step * self.share + start, step * self.share + stop))
        return np.concatenate(found)

    def substitute(self, step: int, row: int, attempt: int) -> int:
        """A sample id to take in place of an unusable one: another of the same window, the same for any rank count."""
        partition, inside = divmod(row, self.share)
        at = step * self.share + inside
        number = 0 if self._pattern is None else int(self._pattern.which[at % CYCLE])
        part = self._parts[number]
        epoch, position = self._locate(
            part, partition, at if self._pattern is None else self._pattern.before(number, at)
        )
        ids = part.window_at(epoch, position)
        return int(ids[np.random.default_rng([self.seed, 7, SUBSTITUTES, step, row, attempt]).integers(len(ids))])

    def shards(self, step: int, rows: slice | None = None) -> list[int]:
        """Numbers of the shards that these rows of a step are read from."""
        numbers: list[int] = np.unique(np.searchsorted(self._firsts, self.batch(step, rows), "right") - 1).tolist()
        return numbers

    def generator(self, step: int, purpose: int) -> np.random.Generator:
        """Random numbers of one global step, the same for every rank; `purpose` keeps independent draws apart."""
        return np.random.default_rng([self.seed, 7, purpose, step])

    def _run(self, partition: int, start: int, stop: int) -> Ids:
        """Sample ids of rows [start, stop) of a partition's endless sequence; they lie within one step."""
        if self._pattern is None:
            return self._take(self._parts[0], partition, start, stop)
        which = self._pattern.which[np.arange(start, stop) % CYCLE]
        ids = np.empty(stop - start, dtype=np.int64)
        for number in np.unique(which).tolist():
            span = (self._pattern.before(number, at) for at in (start, stop))
            ids[which == number] = self._take(self._parts[number], partition, *span)
        return ids

    def _take(self, part: "_Order", partition: int, start: int, stop: int) -> Ids:
        """Samples [start, stop) of the endless sequence that a partition draws from one part."""
        found = []
        while start < stop:
            epoch, position = self._locate(part, partition, start)
            count = min(stop - start, self._usable(part) - start % self._usable(part))
            found.append(part.ids(epoch, position, position + count))
            start += count
        return np.concatenate(found)

    def _usable(self, part: "_Order") -> int:
        """Samples of a part that each partition uses per epoch."""
        return self.steps * self.share if len(self._parts) == 1 else part.samples // self.partitions

    def _locate(self, part: "_Order", partition: int, index: int) -> tuple[int, int]:
        """(epoch, position in the epoch's order) of sample `index` of what a partition draws from a part."""
        epoch, inside = divmod(index, self._usable(part))
        return epoch, self.partition_start(part.samples, partition) + inside

    def partition_start(self, samples: int, partition: int) -> int:
        """First position of a partition in the order of so many samples."""
        return partition * samples // self.partitions

    def shuffle(self, shards: Ids, rng: np.random.Generator, start: int) -> Ids:
        """Permuted sample ids of a window whose first position is `start`."""
        ids = np.concatenate([np.arange(self._firsts[s], self._firsts[s + 1], dtype=np.int64) for s in shards])
        starts = [self.partition_start(self.samples, partition) for partition in range(self.partitions)]
        if self._sampler is not None:
            first = bisect_right(starts, start) - 1
            cuts = [at - start for at in starts[first:] if at < start + len(ids)]
            return ids[self._sampler.arrange(shards.tolist(), cuts, rng)]
        order = rng.permutation(len(ids))
        if self._lengths is None or not self._group:
            return ids[order]
        lengths = np.concatenate([self._lengths(int(shard)) for shard in shards])[order]
        lead = (starts[bisect_right(starts, start) - 1] - start) % self.share
        grouped = _group_by_length(lengths[lead:], self.share, self._group, rng) + lead
        grouped = np.concatenate([np.arange(min(lead, len(ids))), grouped])
        return ids[order[grouped]]


class _Order:
    """Endless order of one part of a plan: epochs of windows of shards. Holds the windows computed last."""

    def __init__(self, plan: Plan, number: int, first: int, last: int) -> None:
        self._plan, self._shards = plan, range(first, last)
        self._sizes = plan.sizes[first:last]
        self.samples = int(self._sizes.sum())
        self._salt = [number] if number else []
        self._epochs: dict[int, tuple[list[Ids], list[int]]] = {}
        self._windows: dict[tuple[int, int], Ids] = {}

    def ids(self, epoch: int, start: int, stop: int) -> Ids:
        """Sample ids at positions [start, stop) of an epoch."""
        starts = self._groups(epoch)[1]
        first, last = bisect_right(starts, start) - 1, bisect_right(starts, stop - 1) - 1
        return np.concatenate([
            self._window(epoch, number)[max(start - starts[number], 0) : stop - starts[number]]
            for number in range(first, last + 1)
        ])  # fmt: skip

    def window_at(self, epoch: int, position: int) -> Ids:
        """All sample ids of the window that covers a position."""
        return self._window(epoch, bisect_right(self._groups(epoch)[1], position) - 1)

    def _groups(self, epoch: int) -> tuple[list[Ids], list[int]]:
        """(shards of each window, first position of each window in the epoch)."""

        def compute() -> tuple[list[Ids], list[int]]:
            order = np.random.default_rng([self._plan.seed, 1, epoch, *self._salt]).permutation(len(self._sizes))
            cuts = range(0, len(order), self._plan.window)
            sums = np.add.reduceat(self._sizes[order], cuts).cumsum()
            return [order[cut : cut + self._plan.window] for cut in cuts], [0, *sums[:-1].tolist()]

        return _remember(self._epochs, epoch, compute, 4)

    def _window(self, epoch: int, number: int) -> Ids:
        """Permuted sample ids of one window."""

        def compute() -> Ids:
            groups, starts = self._groups(epoch)
            rng = np.random.default_rng([self._plan.seed, 2, epoch, number, *self._salt])
            return self._plan.shuffle(groups[number] + self._shards.start, rng, starts[number])

        return _remember(self._windows, (epoch, number), compute, self._plan.partitions + 4)


def _remember(kept: dict[Key, Value], key: Key, compute: Callable[[], Value], limit: int) -> Value:
    """Value of `key`, computed if it is not among the `limit` used last."""
    value = kept.pop(key, None)
    value = compute() if value is None else value
    kept[key] = value
    while len(kept) > limit:
        kept.pop(next(iter(kept)))
    return value


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Which part each row of a mixture comes from, repeated every CYCLE rows."""

    which: Ids
    counts: Mapping[int, Ids]
    """Part -> how many of the first n rows of the cycle are its own, n = 0..CYCLE."""

    def before(self, part: int, at: int) -> int:
        """Rows of a part among the first `at` rows."""
        cycles, inside = divmod(at, CYCLE)
        return cycles * int(self.counts[part][-1]) + int(self.counts[part][inside])


def _pattern(weights: Sequence[float]) -> _Pattern:
    """Rows of the parts spread as evenly as their weights allow. Raises ConfigError for an impossible weight."""
    total = sum(weights)
    if min(weights) <= 0 or not np.isfinite(total):
        raise ConfigError(f"data.train: the weights {list(weights)} must be positive")
    exact = np.array(weights) / total * CYCLE
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: CYCLE - quota.sum()]] += 1
    if quota.min() < 1:
        raise ConfigError(f"data.train: a weight of {min(weights)} in {total} is below 1 / {CYCLE}: leave it out")
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in quota])
    which = np.repeat(np.arange(len(weights)), quota)[np.argsort(due, kind="stable")]
    counts = {part: np.concatenate([[0], (which == part).cumsum()]) for part in range(len(weights))}
    return _Pattern(which, counts)


def _group_by_length(lengths: Ids, batch: int, group: int, rng: np.random.Generator) -> Ids:
    """Order in which every `group` batches are sorted by length, then whole batches drawn in a new order."""
    order = np.concatenate([
        start + np.argsort(lengths[start : start + group * batch], kind="stable")
        for start in range(0, max(len(lengths), 1), group * batch)
    ])  # fmt: skip
    whole = len(order) // batch * batch
    blocks = order[:whole].reshape(-1, batch)
    return np.concatenate([rng.permutation(blocks).reshape(-1), order[whole:]])


def rank_slice(rows: int, rank: int, world: int) -> slice:
    """The contiguous rows of a global batch that belong to one rank. Raises ConfigError unless all get equally many."""
    if rows % world:
        raise ConfigError(f"data.batch_size={rows} does not divide over {world} ranks: choose a multiple of {world}")
    return slice(rank * rows // world, (rank + 1) * rows // world)
