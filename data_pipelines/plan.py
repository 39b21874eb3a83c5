"""Which samples make up global step k: pure arithmetic on (shard sizes, seed, epoch, step).

Shards are permuted, then samples inside windows of consecutive shards. Nothing of the order is state, so any number of
ranks sees the same global batches, and resuming at step k costs the same as starting.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import ConfigError

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of one data set. Sample ids number the samples of all shards through."""

    sizes: tuple[int, ...]
    """Samples per shard."""
    batch_size: int
    """Samples per global step, over all ranks."""
    seed: int = 0
    shuffle: bool = True
    window: int = 16
    """Shards whose samples are mixed with each other; at most this many are read at a time."""
    drop_last: bool = True
    """Leave out the incomplete last batch of an epoch (training); False keeps it (evaluation)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size} must be at least 1")
        if self.samples < 1:
            raise ConfigError("the data set holds no sample")
        if self.drop_last and self.samples < self.batch_size:
            raise ConfigError(
                f"data.batch_size={self.batch_size} exceeds the {self.samples} samples of the data set: use less"
            )

    @property
    def samples(self) -> int:
        """Samples per epoch."""
        return sum(self.sizes)

    @property
    def steps(self) -> int:
        """Global steps per epoch."""
        return self.samples // self.batch_size if self.drop_last else -(-self.samples // self.batch_size)

    def batch(self, step: int) -> Ids:
        """Sample ids of global step `step` (0-based, running over epochs), in order."""
        epoch, inside = divmod(step, self.steps)
        start, stop = inside * self.batch_size, min((inside + 1) * self.batch_size, self.samples)
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        starts = _windows(self, epoch)[1]
        first, last = bisect_right(starts, start) - 1, bisect_right(starts, stop - 1) - 1
        parts = [
            _window_ids(self, epoch, number)[max(start - starts[number], 0) : stop - starts[number]]
            for number in range(first, last + 1)
        ]
        return np.concatenate(parts)

    def generator(self, step: int, purpose: int) -> np.random.Generator:
        """Random numbers of one global step, the same for every rank; `purpose` keeps independent draws apart."""
        return np.random.default_rng([self.seed, 7, purpose, step])


@lru_cache(maxsize=4)
def _windows(plan: Plan, epoch: int) -> tuple[list[Ids], list[int]]:
    """(shards of each window, first position of each window in the epoch)."""
    order = np.random.default_rng([plan.seed, 1, epoch]).permutation(len(plan.sizes))
    groups = [order[i : i + plan.window] for i in range(0, len(order), plan.window)]
    lengths = [sum(plan.sizes[shard] for shard in group) for group in groups]
    return groups, [0, *accumulate(lengths[:-1])]


@lru_cache(maxsize=4)
def _window_ids(plan: Plan, epoch: int, number: int) -> Ids:
    """Permuted sample ids of one window."""
    firsts = [0, *accumulate(plan.sizes)]
    group = _windows(plan, epoch)[0][number]
    ids = np.concatenate([np.arange(firsts[shard], firsts[shard + 1], dtype=np.int64) for shard in group])
    return np.random.default_rng([plan.seed, 2, epoch, number]).permutation(ids)


def rank_slice(ids: Ids, rank: int, world: int) -> slice:
    """The contiguous part of a global batch that belongs to one rank; parts differ by at most one sample."""
    bounds = [len(ids) * r // world for r in range(world + 1)]
    return slice(bounds[rank], bounds[rank + 1])
