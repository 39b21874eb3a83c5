"""From stored samples to decoded ones, with every skipped sample counted by its reason."""

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from data_pipelines.errors import BadSample, PipelineError, ShardError
from data_pipelines.preprocess import ImageConfig, load_image
from data_pipelines.reader import Sample, Shard, open_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decoded:
    """One sample ready to be batched: uint8 CSS pixels of the model's size, and its texts."""

    key: str
    pixels: Tensor
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    source: str


@dataclass(slots=True)
class Ledger:
    """Account of every sample asked for: seen = delivered + sum of quarantined. Stops the job when too much is lost."""

    max_share: float = 0.01
    """Largest tolerated share of bad samples, once 1,000 were seen."""
    max_in_a_row: int = 100
    seen: int = 0
    delivered: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    _in_a_row: int = 0

    def good(self) -> None:
        """Count a delivered sample."""
        self.seen += 1
        self.delivered += 1
        self._in_a_row = 0

    def bad(self, error: BadSample) -> None:
        """Count a skipped sample. Raises PipelineError over the limits."""
        self.seen += 1
        self.quarantined[error.reason] += 1
        self._in_a_row += 1
        log.warning("sample skipped: %s", error)
        lost = self.quarantined.total()
        if self._in_a_row >= self.max_in_a_row or (self.seen >= 1000 and lost > self.max_share * self.seen):
            raise PipelineError(
                f"{lost} of {self.seen} samples could not be used ({dict(self.quarantined)}), over the limit of "
                f"{self.max_share:.1%} or {self.max_in_a_row} in a row: mend the shards, or raise data.max_bad_share"
            )


class ShardSet:
    """All samples of one or several shard folders under one numbering."""

    def __init__(self, folders: Sequence[Path], sources: Mapping[str, int] | None = None) -> None:
        """`sources`: source -> how often its samples appear in an epoch; others are left out. None takes all once."""
        self._shards: list[Shard] = [shard for folder in folders for shard in open_shards(folder)]
        self._rows = [_select(shard, sources) for shard in self._shards]
        if sources is not None and not any(self._rows):
            found = [str(folder) for folder in folders]
            raise PipelineError(f"data.sources={dict(sources)}: no sample of {found} comes from these")
        self.sizes = tuple(len(rows) for rows in self._rows)
        self._starts = [0, *accumulate(self.sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def original(self, sample_id: int) -> tuple[int, int]:
        """(shard, row) of a sample: equal for all its repetitions."""
        number = bisect_right(self._starts, sample_id) - 1
        return number, self._rows[number][sample_id - self._starts[number]]

    def read(self, sample_id: int) -> Sample:
        """The sample with this number. Raises BadSample."""
        number, row = self.original(sample_id)
        return self._shards[number].read(row)


def _select(shard: Shard, sources: Mapping[str, int] | None) -> Sequence[int]:
    if sources is None:
        return range(len(shard))
    return [row for row in range(len(shard)) for _ in range(sources.get(shard.source(row), 0))]


def decode(sample: Sample, image: ImageConfig, max_pixels: int) -> Decoded:
    """Decode one stored sample. Raises BadSample when picture or caption is missing or unusable."""
    if not sample.captions:
        raise BadSample("no_caption", sample.key)
    try:
        pixels = load_image(sample.image, image, max_pixels)
    except BadSample as error:
        raise BadSample(error.reason, f"{sample.key}: {error}") from error
    return Decoded(sample.key, pixels, sample.captions, sample.labels, sample.source)


def iterate(folder: Path, image: ImageConfig, ledger: Ledger, max_pixels: int) -> Iterator[Decoded]:
    """All samples of a folder once, in stored order: the reading side of evaluation and embedding."""
    shards = ShardSet([folder])
    if not len(shards):
        raise ShardError(f"{folder}: the shards hold no sample")
    for sample_id in range(len(shards)):
        try:
            decoded = decode(shards.read(sample_id), image, max_pixels)
        except BadSample as error:
            ledger.bad(error)
        else:
            ledger.good()
            yield decoded
