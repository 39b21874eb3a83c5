"""Shards to embeddings: the streaming first half of every evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.images import MAX_PIXELS
from data_pipelines.ledger import Ledger
from data_pipelines.stream import Decoded, iterate
from vlp.bundle import Bundle
from vlp.infer import BATCH, encode_pixels


@dataclass(frozen=True, slots=True)
class Encoded:
    """N embedded pictures with what was written beside them."""

    image_ND: Tensor
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    skipped: int


def encode_shards(bundle: Bundle, data: Path, show: Callable[[int], None] | None = None) -> Encoded:
    """Embed every picture of a folder of shards; bad samples are counted, too many stop the evaluation."""
    ledger = Ledger()
    rows: list[Tensor] = []
    waiting: list[Decoded] = []
    seen: list[Decoded] = []

    def flush() -> None:
        if waiting:
            rows.append(encode_pixels(bundle, torch.stack([sample.pixels for sample in waiting])))
            if show:
                show(len(waiting))
            waiting.clear()

    for sample in iterate(data, bundle.image, ledger, MAX_PIXELS):
        waiting.append(sample)
        seen.append(Decoded(sample.key, torch.empty(0), sample.captions, sample.labels, sample.source))
        if len(waiting) == BATCH:
            flush()
    flush()
    return Encoded(
        image_ND=torch.cat(rows),
        keys=tuple(sample.key for sample in seen),
        captions=tuple(sample.captions for sample in seen),
        labels=tuple(sample.labels for sample in seen),
        skipped=ledger.quarantined.total(),
    )
