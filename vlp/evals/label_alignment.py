"""Does the space order pairs of pictures as their labels do: Spearman's rank correlation over pairs.

A pair's likeness by its labels is the cosine of the two rows of zeros and ones, as in SoftCon (Wang et al. 2024, arXiv
2405.20462); by its pictures it is the cosine of their features. Equal values share the mean of their ranks.
Suffixes: N pictures, P pairs, C labels, D embedding width.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import PipelineError
from data_pipelines.shard_set import Train
from vlp.evals._encode import Encoder, in_shares
from vlp.evals._labels import Labels, label_sets, labelled
from vlp.evals._scores import mask_of

PIECE = 1 << 14


class Config(StrictModel):
    """Options of `label-alignment`."""

    labels: Labels | None = None
    """Labels that count, as for zero-shot; default the shards'."""
    column: str = "labels"
    """Where a sample says its labels: `labels`, or a json column that holds a list."""
    pairs: int = Field(500_000, ge=2)
    """Pairs at most; where there are more, so many are drawn."""
    seed: int = 0
    """Draws the pairs."""


def run(encoder: Encoder, data: Train | Path, config: Config) -> Iterator[tuple[str, float]]:
    """spearman, between -1 and 1, the number of pairs, and the share of them that have a label in common."""
    encoded = encoder.pictures(data, config.column)
    _, labels = label_sets(config.labels, encoded)
    rows, classes = labelled(encoded, labels, data, config.column)
    if len(rows) < 3:
        raise PipelineError(f"{data}: {len(rows)} pictures with a label have no order of pairs")
    image_ND = encoded.image_ND[rows]
    label_NC = F.normalize(mask_of(classes, len(labels.names)).float(), dim=1)
    pairs_P2 = draw_pairs(len(rows), config.pairs, config.seed)
    by_label_P, by_picture_P = (cosines(rows_ND, pairs_P2) for rows_ND in (label_NC, image_ND))
    yield "spearman", spearman(by_label_P, by_picture_P)
    yield "alike", float((by_label_P > 0).double().mean())
    yield "pairs", float(len(pairs_P2))
    yield "pictures", float(len(rows))
    yield "without_label", float(len(encoded.keys) - len(rows))
    yield "skipped", float(encoded.skipped)


def draw_pairs(count: int, most: int, seed: int) -> Tensor:
    """P x 2 numbers below `count`, the two of a pair different: all pairs, or `most` drawn with replacement."""
    if count * (count - 1) // 2 <= most:
        return torch.combinations(torch.arange(count))
    generator = torch.Generator().manual_seed(seed)
    first_P = torch.randint(count, (most,), generator=generator)
    apart_P = torch.randint(1, count, (most,), generator=generator)
    return torch.stack([first_P, (first_P + apart_P) % count], dim=1)


def cosines(rows_ND: Tensor, pairs_P2: Tensor) -> Tensor:
    """P products of the L2-normalised rows of each pair."""

    def piece(run: range) -> Tensor:
        first, second = pairs_P2[run.start : run.stop].T
        return (rows_ND[first] * rows_ND[second]).sum(dim=1)

    return in_shares(len(pairs_P2), PIECE, piece)


def spearman(first_P: Tensor, second_P: Tensor) -> float:
    """Pearson's correlation of the ranks; 0 where one side is all equal."""
    centred = [ranks - ranks.mean() for ranks in map(mean_ranks, (first_P, second_P))]
    norms = [values.norm() for values in centred]
    return float(centred[0] @ centred[1] / (norms[0] * norms[1])) if min(norms) > 0 else 0.0


def mean_ranks(values_P: Tensor) -> Tensor:
    """Ranks from 1 in float64; equal values share the mean of theirs."""
    _, place_P, count_U = values_P.unique(sorted=True, return_inverse=True, return_counts=True)
    last_U = count_U.cumsum(0).double()
    ranks_P: Tensor = (last_U - (count_U.double() - 1) / 2)[place_P]
    return ranks_P
