"""From stored samples to decoded ones, as generator stages; every skipped sample is counted by its reason.

The stages also run inside `webdataset.DataPipeline(partial(stored, shards, ledger), partial(decoded, ...), ...)`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data_pipelines.errors import BadSample, ShardError
from data_pipelines.geometry import placement
from data_pipelines.ledger import Ledger
from data_pipelines.preprocess import ImageConfig, fit
from data_pipelines.preprocess import decode as decode_image
from data_pipelines.reader import Sample
from data_pipelines.rows import read_boxes
from data_pipelines.shard_set import Place, ShardSet, Train

T = TypeVar("T")
BLOCK = 64
"""Samples that `iterate` decodes between two looks at the ledger."""
AHEAD = 2
"""Blocks that threads work on while one is used."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """Boxes of one picture."""

    sides_M4: Tensor
    """float64 x0, y0, x1, y1 as fractions of the model's input; parts may lie outside."""
    names: tuple[str, ...]


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
    boxes: Boxes | None = None
    """Where asked for."""


def decode(
    sample: Sample,
    image: ImageConfig,
    max_pixels: int,
    columns: frozenset[str] = frozenset(),
    captions: bool = True,
    boxes: bool = False,
) -> Decoded:
    """Decode one stored sample. Raises BadSample when picture, caption or a box is missing or unusable.

    With `columns`, one of these may stand in for the caption; without `captions`, none is needed.
    """
    found = {"cls": sample.cls, "npy": sample.array} | sample.columns if columns else {}
    kept = {name: found[name] for name in columns if found.get(name) is not None}
    if captions and not sample.captions and not any(isinstance(value, str) and value for value in kept.values()):
        raise BadSample("no_caption", sample.key)
    try:
        pixels_CHW, full_size = decode_image(sample.image, image, max_pixels)
        found_boxes = placed_boxes(sample.columns.get("boxes"), full_size, image) if boxes else None
    except BadSample as error:
        raise BadSample(error.reason, f"{sample.key}: {error}") from error
    pixels = fit(pixels_CHW, full_size, image)
    return Decoded(sample.key, pixels, sample.captions, sample.labels, sample.source, kept, found_boxes)


def placed_boxes(stored: Any, full_size: tuple[int, int], image: ImageConfig) -> Boxes:
    """The boxes of a json member in the model's input, not cut off at its edges.

    Raises BadSample `bad_box` for what is no box: sides out of order, beyond the picture, or not numbers.
    """
    boxes = read_boxes(stored)
    height, width = full_size
    pixels_M4 = [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1, _ in boxes]
    sides_M4 = torch.from_numpy(placement(full_size, image).to_input(pixels_M4))
    return Boxes(sides_M4, tuple(box[4] for box in boxes))


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


def in_blocks(function: Callable[[int], T], blocks: Iterable[Sequence[int]], threads: int) -> Iterator[list[T]]:
    """`function` of every number of every block, in order; threads work on the next blocks while one is used."""
    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque[Iterator[T]] = deque()
        for block in blocks:
            waiting.append(pool.map(function, block))
            if len(waiting) > AHEAD:
                yield list(waiting.popleft())
        while waiting:
            yield list(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def decoded_blocks(
    shards: ShardSet,
    blocks: Sequence[Sequence[int]],
    read: Callable[[Sample], Decoded],
    ledger: Ledger,
    threads: int,
) -> Iterator[list[Decoded]]:
    """The usable samples of every block of sample ids, decoded by threads; the others are counted."""

    def fetch(sample_id: int) -> Decoded | BadSample:
        try:
            return read(shards.read(sample_id))
        except BadSample as error:
            return error

    for block, found in zip(blocks, in_blocks(fetch, blocks, threads), strict=True):
        good = []
        for sample_id, item in zip(block, found, strict=True):
            if isinstance(item, BadSample):
                ledger.bad(item, shards.place(sample_id))
            else:
                ledger.good(shards.names[shards.original(sample_id)[0]])
                good.append(item)
        yield good


def cut(count: int, size: int) -> list[range]:
    """0..count-1 in runs of `size`; the last may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def iterate(
    folder: Train | Path, image: ImageConfig, ledger: Ledger, max_pixels: int, threads: int = 2
) -> Iterator[Decoded]:
    """All samples of a folder once, in stored order."""
    shards = ShardSet(folder)
    if not len(shards):
        raise ShardError(f"{folder}: the shards hold no sample")
    blocks = cut(len(shards), BLOCK)
    for block in decoded_blocks(shards, blocks, lambda sample: decode(sample, image, max_pixels), ledger, threads):
        yield from block
