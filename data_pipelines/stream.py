"""From stored samples to decoded ones, as generator stages; every skipped sample is counted by its reason.

The stages also run inside `webdataset.DataPipeline(partial(stored, shards, ledger), partial(decoded, ...), ...)`.
"""

import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from data_pipelines.errors import BadSample, ShardError
from data_pipelines.ledger import Ledger
from data_pipelines.preprocess import ImageConfig, load_image
from data_pipelines.reader import Sample
from data_pipelines.shard_set import Place, ShardSet

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decoded:
    """One sample ready to be batched: uint8 CSS pixels of the model's size, and its texts."""

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


def run_ahead(produce: Callable[[], Iterator[T]], depth: int) -> Iterator[T]:
    """Run a producer in a thread, `depth` items ahead; its errors surface here, and it ends when the consumer does."""
    items: queue.Queue[T | BaseException] = queue.Queue(depth)
    stop = threading.Event()

    def offer(item: T | BaseException) -> None:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in produce():
                offer(item)
                if stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            offer(error)

    thread = threading.Thread(target=work, name="vlp-loader", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        if not sys.is_finalizing():  # by then the thread is frozen, and would be waited for forever
            thread.join()
