"""Which samples share a batch, by their labels or clusters: an arrangement inside each window of the plan.

label_paired: samples with a common label stand side by side, k at a time; an epoch still holds every sample once. A
supervised contrast has no positives without it. class_balanced: every class of a window gets equally many places
(class-aware sampling: Shen et al. 2016, arXiv 1512.05830), so that rare classes come again and frequent ones in part.
Both are arithmetic on the window's random numbers, like the order itself, so any number of ranks sees the same batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError

Ids = NDArray[np.int64]
ROUNDS = 8
"""Times that a sample with several labels draws one of them to find partners."""


class SamplerConfig(StrictModel):
    """Which samples share a batch."""

    name: Literal["label_paired", "class_balanced"]
    """label_paired: k samples with a common label side by side. class_balanced: as many of every class."""
    by: Literal["labels", "clusters"] = "labels"
    """labels: the classes of `data.labels`, all of a sample if `multi`, else its first. clusters: `data.clusters`."""
    k: int = Field(2, ge=1)
    """Samples of a class side by side; divides the rows that a partition gives to a batch."""

    @model_validator(mode="after")
    def _pairs(self) -> "SamplerConfig":
        if self.name == "label_paired" and self.k < 2:
            raise ConfigError(f"data.sampler.k={self.k}: label_paired needs at least 2")
        return self


@dataclass(frozen=True, slots=True)
class Numbers:
    """Lists of class numbers of N samples, one after the other."""

    starts: Ids
    """N + 1: where the list of each sample begins."""
    values: Ids

    @staticmethod
    def of(rows: Sequence[Sequence[int] | NDArray[np.int32]]) -> "Numbers":
        """From one list for each sample."""
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        values = np.concatenate([np.empty(0, np.int64), *(np.asarray(row, dtype=np.int64) for row in rows)])
        return Numbers(np.concatenate([[0], ends]), values)

    @staticmethod
    def cat(parts: "Sequence[Numbers]") -> "Numbers":
        """Those of several shards."""
        counts = np.concatenate([np.diff(part.starts) for part in parts])
        return Numbers(np.concatenate([[0], counts.cumsum()]), np.concatenate([part.values for part in parts]))

    @property
    def counts(self) -> Ids:
        """Classes of each sample."""
        return np.diff(self.starts)


@dataclass(frozen=True, slots=True)
class Places:
    """Where k samples side by side end up in one step, and the places left over between such runs."""

    runs: Ids
    """R x k positions."""
    single: Ids

    @staticmethod
    def cut(length: int, cuts: Sequence[int], k: int) -> "Places":
        """Places of a window of `length` positions; in the sequence of steps, positions count from each of `cuts`.

        The first cut is at or before 0, where the partition begins that the window begins in.
        """
        found = [np.empty((0, k), dtype=np.int64)]
        for cut, end in zip(cuts, [*cuts[1:], length], strict=True):
            first = cut if cut >= 0 else cut + -(cut // k) * k
            found.append(np.arange(first, first + max(0, end - first) // k * k).reshape(-1, k))
        runs = np.concatenate(found)
        return Places(runs, np.setdiff1d(np.arange(length), runs))


class Sampler:
    """The arrangement of windows. Holds the class numbers of the shards read last."""

    def __init__(self, config: SamplerConfig, numbers: Callable[[int], Numbers], keep: int) -> None:
        """`numbers(shard)`: classes of its samples. `keep`: shards whose classes are remembered."""
        self.config = config
        self._numbers, self._keep = numbers, keep
        self._known: dict[int, Numbers] = {}

    def arrange(self, shards: Sequence[int], cuts: Sequence[int], rng: np.random.Generator) -> Ids:
        """For every position of a window the number of a sample in the window; for `cuts` see `Places.cut`."""
        numbers = Numbers.cat([self._of(shard) for shard in shards])
        places = Places.cut(len(numbers.counts), cuts, self.config.k)
        return (paired if self.config.name == "label_paired" else balanced)(numbers, places, rng)

    def _of(self, shard: int) -> Numbers:
        found = self._known.pop(shard, None)
        found = self._numbers(shard) if found is None else found
        self._known[shard] = found
        while len(self._known) > self._keep:
            self._known.pop(next(iter(self._known)))
        return found


def paired(numbers: Numbers, places: Places, rng: np.random.Generator) -> Ids:
    """An order of all samples in which those with a common class stand in the same run, as far as there are such.

    A sample draws one of its classes; whoever finds no partners draws again. What is left makes smaller groups.
    """
    k = places.runs.shape[1]
    left = rng.permutation(np.flatnonzero(numbers.counts))
    order = np.full(len(numbers.counts), -1, dtype=np.int64)
    runs = rng.permutation(places.runs)
    for size in range(k, 1, -1):
        for _ in range(min(ROUNDS, int(numbers.counts.max(initial=0)))):
            groups, left = _match(numbers, rng.permutation(left), size, rng)
            slots = runs[:, : k // size * size].reshape(-1, size)[: len(groups)]
            order[slots] = groups[: len(slots)]
            runs = runs[-(-len(groups) // (k // size)) :]
    rest = np.setdiff1d(np.arange(len(order)), order[order >= 0])
    order[order < 0] = rng.permutation(rest)
    return order


def _match(numbers: Numbers, left: Ids, size: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """(G x size samples with a common class in each row, samples left over)."""
    places = numbers.starts[left] + (rng.random(len(left)) * numbers.counts[left]).astype(np.int64)
    order = np.argsort(numbers.values[places], kind="stable")
    drawn, rows = numbers.values[places][order], left[order]
    _, first, counts = np.unique(drawn, return_index=True, return_counts=True)
    inside = np.arange(len(rows)) - np.repeat(first, counts)
    whole = inside < np.repeat(counts // size * size, counts)
    return rows[whole].reshape(-1, size), rows[~whole]


def balanced(numbers: Numbers, places: Places, rng: np.random.Generator) -> Ids:
    """Samples for all places: runs of k of one class, every class once before any comes again.

    Samples without a class keep their share of the places. A class of less than k samples is repeated inside a run.
    """
    count, k = len(numbers.counts), places.runs.shape[1]
    owners = np.repeat(np.arange(count), numbers.counts)
    order = np.argsort(numbers.values, kind="stable")
    classes, sizes = np.unique(numbers.values, return_counts=True)
    members = np.split(owners[order], sizes.cumsum()[:-1]) if len(classes) else []
    without = np.flatnonzero(numbers.counts == 0)
    runs = len(places.runs) + -(-len(places.single) // k)
    plain = np.diff(np.floor(np.arange(runs + 1) * (len(without) / max(count, 1)) + rng.random())) > 0
    rounds = -(-int((~plain).sum()) // max(len(classes), 1))
    turns = rng.permuted(np.tile(np.arange(len(classes)), (rounds, 1)), axis=1).reshape(-1)
    which = np.full(runs, len(classes))
    which[~plain] = turns[: int((~plain).sum())]
    turn = np.argsort(which, kind="stable")
    heres = np.split(turn, np.searchsorted(which[turn], np.arange(1, len(classes) + 1)))
    found = np.empty((runs, k), dtype=np.int64)
    for own, here in zip([*members, without], heres, strict=True):
        found[here] = _cycle(own, len(here), k, rng)
    order = np.empty(count, dtype=np.int64)
    order[places.runs.reshape(-1)] = found[: len(places.runs)].reshape(-1)
    order[places.single] = found[len(places.runs) :].reshape(-1)[: len(places.single)]
    return order


def _cycle(own: Ids, runs: int, k: int, rng: np.random.Generator) -> Ids:
    """runs x k samples; each in turn, in an order drawn again for every pass, none twice in a run if avoidable."""
    if not runs:
        return np.empty((0, k), dtype=np.int64)
    per_pass = len(own) // k
    if not per_pass:
        return np.stack([np.resize(rng.permutation(own), k) for _ in range(runs)])
    passes = [rng.permutation(own)[: per_pass * k].reshape(-1, k) for _ in range(-(-runs // per_pass))]
    return np.concatenate(passes)[:runs]
