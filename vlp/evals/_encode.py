"""Shards and texts to features, shared out over the ranks: the first half of every evaluation.

Work is cut into the same pieces whatever the number of ranks, and a rank takes a run of whole pieces: every batch holds
the same rows as in one process, so its features do, bit for bit. Suffixes: N pictures or texts, D embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import MissingField, PipelineError, ShardError
from data_pipelines.images import MAX_PIXELS
from data_pipelines.ledger import Ledger
from data_pipelines.reader import Sample
from data_pipelines.shard_set import ShardSet, Train
from data_pipelines.stream import Decoded, cut, decode, decoded_blocks
from vlp import distributed
from vlp.bundle import Bundle
from vlp.infer import BATCH, encode_pixels, encode_texts

T = TypeVar("T")
Change = Callable[[Sample], Sample]
"""What is done to stored samples before they are decoded."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """N embedded pictures with what was written beside them."""

    image_ND: Tensor
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str | int, ...], ...]
    """Of the column asked for: names, or class numbers of a `cls` member."""
    skipped: int
    """Samples that could not be used."""


class Encoder:
    """A bundle that embeds shards and texts, all ranks together; keeps the features of every folder it has seen."""

    def __init__(self, bundle: Bundle, advance: Callable[[int], None] = lambda step: None) -> None:
        """`advance` is told of pictures of this rank."""
        self.bundle, self.advance = bundle, advance
        self._seen: dict[tuple[str, str, Change | None], Encoded] = {}

    def pictures(self, data: Train | Path, column: str = "labels", change: Change | None = None) -> Encoded:
        """Every picture of the shards; `column` holds the labels. Raises PipelineError on all ranks alike."""
        known = (repr(data), column, change)
        if known not in self._seen:
            self._seen[known] = encode_shards(self.bundle, data, column, self.advance, change)
        return self._seen[known]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """ND, L2-normalised."""
        if not texts:
            return torch.empty(0, self.bundle.dim)
        return in_shares(len(texts), BATCH, lambda rows: encode_texts(self.bundle, texts[rows.start : rows.stop]))

    def prompts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """ND: for every class, the normalised mean over its prompts."""

        def head(classes: range) -> Tensor:
            chosen = prompts[classes.start : classes.stop]
            rows = encode_texts(self.bundle, [text for texts in chosen for text in texts])
            return torch.stack([F.normalize(part.mean(dim=0), dim=0) for part in rows.split([*map(len, chosen)])])

        most = max(len(texts) for texts in prompts)
        return in_shares(len(prompts), max(1, BATCH // most), head)


def encode_shards(
    bundle: Bundle,
    data: Train | Path,
    column: str = "labels",
    advance: Callable[[int], None] = lambda step: None,
    change: Change | None = None,
) -> Encoded:
    """Embed every picture of the shards; bad samples are counted, too many stop the evaluation on all ranks."""
    columns = frozenset() if column == "labels" else frozenset({column})
    ledger = Ledger()

    def read(sample: Sample) -> Decoded:
        stored = change(sample) if change else sample
        return decode(stored, bundle.image, MAX_PIXELS, columns, captions=False)

    def work() -> tuple[list[Tensor], list[Decoded]]:
        shards = ShardSet(data)
        if not len(shards):
            raise ShardError(f"{data}: the shards hold no sample")
        blocks = cut(len(shards), BATCH)
        share = distributed.share(len(blocks))
        rows: list[Tensor] = []
        seen: list[Decoded] = []
        threads = max(2, torch.get_num_threads())
        for block in decoded_blocks(shards, blocks[share.start : share.stop], read, ledger, threads):
            if block:
                rows.append(encode_pixels(bundle, torch.stack([sample.pixels for sample in block])))
            seen += [Decoded(s.key, torch.empty(0), s.captions, _labels(s, column), s.source) for s in block]
            advance(len(block))
        return rows, seen

    rows, seen = together(work)
    whole = Ledger()
    for report in distributed.from_all_ranks(ledger.report()):
        whole.add(report)
    whole.check()
    if not whole.delivered:
        raise PipelineError(f"{data}: not one sample can be used ({dict(whole.quarantined)})")
    found = [(s.key, s.captions, s.labels) for s in seen]
    everything = [item for part in distributed.from_all_ranks(found) for item in part]
    keys, captions, labels = zip(*everything, strict=True)
    image_ND = distributed.gather_rows(torch.cat(rows) if rows else None)
    return Encoded(image_ND, keys, captions, labels, whole.quarantined.total())


def _labels(sample: Decoded, column: str) -> tuple[Any, ...]:
    value = sample.labels if column == "labels" else sample.columns.get(column, ())
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(item if isinstance(item, int) else str(item) for item in values)


def together(work: Callable[[], T]) -> T:
    """This rank's work; an error of one rank is raised on all, for the others would wait for it for ever."""
    result, failure = None, None
    try:
        result = work()
    except PipelineError as error:
        failure = error
    failures = [text for text in distributed.from_all_ranks(str(failure or "")) if text]
    if failures:
        raise failure or PipelineError(failures[0])
    assert result is not None
    return result


def in_shares(count: int, size: int, compute: Callable[[range], Tensor]) -> Tensor:
    """Rows 0..count-1 on every rank, `size` at a time by `compute`, each rank a run of these pieces."""
    pieces = cut(count, size)
    share = distributed.share(len(pieces))
    mine = pieces[share.start : share.stop]
    rows: Tensor | None = None
    for piece in mine:
        part = compute(piece)
        if rows is None:
            rows = part.new_empty(mine[-1].stop - mine[0].start, *part.shape[1:])
        # copied and dropped: small results that stay would sit in the gaps that the next large tile needs
        rows[piece.start - mine[0].start : piece.stop - mine[0].start] = part
    return distributed.gather_rows(rows)


def with_captions(encoded: Encoded, data: Train | Path) -> list[int]:
    """Rows of the pictures that have a caption. Raises MissingField where none has."""
    rows = [row for row, captions in enumerate(encoded.captions) if captions]
    if not rows:
        raise MissingField(f"{data}: no sample carries a caption, which this task needs")
    return rows
