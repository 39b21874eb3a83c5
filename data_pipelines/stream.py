"""From stored samples to decoded ones, as generator stages; every skipped sample is counted by its reason.

The stages also run inside `webdataset.DataPipeline(partial(stored, shards, ledger), partial(decoded, ...), ...)`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipelines.errors import BadSample, ShardError
from data_pipelines.ledger import Ledger
from data_pipelines.preprocess import ImageConfig, load_image
from data_pipelines.reader import Sample
from data_pipelines.shard_set import Place, ShardSet


@dataclass(frozen=True, slots=True)
class Decoded:
    """One sample ready to be batched: uint8 (or float32) CSS pixels of the model's size, and its texts."""

    key: str
    pixels: Tensor
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    source: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the json member that captions or labels are made of, `cls` and `npy` members among them."""


def decode(sample: Sample, image: ImageConfig, max_pixels: int, columns: frozenset[str] = frozenset()) -> Decoded:
    """Decode one stored sample. Raises BadSample when picture or caption is missing or unusable.

    With `columns`, one of these may stand in for the caption.
    """
    found = {"cls": sample.cls, "npy": sample.array} | sample.columns if columns else {}
    kept = {name: found[name] for name in columns if found.get(name) is not None}
    if not sample.captions and not any(isinstance(value, str) and value for value in kept.values()):
        raise BadSample("no_caption", sample.key)
    try:
        pixels = load_image(sample.image, image, max_pixels)
    except BadSample as error:
        raise BadSample(error.reason, f"{sample.key}: {error}") from error
    return Decoded(sample.key, pixels, sample.captions, sample.labels, sample.source, kept)


def stored(shards: ShardSet, ledger: Ledger, ids: Iterable[int] | None = None) -> Iterator[tuple[Place, Sample]]:
    """Source stage: samples as stored, in the order of `ids` (default: all once), with their places."""
    for sample_id in range(len(shards)) if ids is None else ids:
        try:
            yield shards.place(sample_id), shards.read(sample_id)
        except BadSample as error:
            ledger.bad(error, shards.place(sample_id))


def decoded(
    samples: Iterable[tuple[Place, Sample]], image: ImageConfig, ledger: Ledger, max_pixels: int
) -> Iterator[Decoded]:
    """Stage: decode what `stored` yields."""
    for place, sample in samples:
        try:
            ready = decode(sample, image, max_pixels)
        except BadSample as error:
            ledger.bad(error, place)
        else:
            ledger.good(place.shard)
            yield ready


def iterate(folder: Path | str, image: ImageConfig, ledger: Ledger, max_pixels: int) -> Iterator[Decoded]:
    """All samples of a folder once, in stored order: the reading side of evaluation and embedding."""
    shards = ShardSet(folder)
    if not len(shards):
        raise ShardError(f"{folder}: the shards hold no sample")
    yield from decoded(stored(shards, ledger), image, ledger, max_pixels)
