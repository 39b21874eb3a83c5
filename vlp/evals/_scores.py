"""Ranks and average precision from similarities, a tile at a time: never all pictures x all candidates in memory.

Suffixes: Q queries, C candidates or classes, D embedding width, K neighbours, N pictures.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vlp.evals._encode import in_shares

TILE = 1 << 22
"""Similarities at a time: 16 MiB, and up to ten times as much while they are compared."""
FEWEST = 16
"""Queries of a tile at least, however many candidates there are."""

Rights = Sequence[Sequence[int]]
"""Right candidates, or classes, of every query; may be empty."""


def best_ranks(scores_QC: Tensor, right_QC: Tensor) -> Tensor:
    """0-based rank of the best right candidate of each query; wrong candidates with an equal score come first."""
    best_Q = scores_QC.masked_fill(~right_QC, float("-inf")).amax(dim=1)
    ahead_QC = (scores_QC >= best_Q[:, None]) & ~right_QC
    return ahead_QC.sum(dim=1)


def mask_of(right: Rights, candidates: int) -> Tensor:
    """QC bool."""
    mask_QC = torch.zeros(len(right), candidates, dtype=torch.bool)
    rows = [row for row, numbers in enumerate(right) for _ in numbers]
    mask_QC[rows, [number for numbers in right for number in numbers]] = True
    return mask_QC


def tiled_ranks(score: Callable[[range], Tensor], right: Rights, candidates: int) -> Tensor:
    """Q ranks as `best_ranks` gives them; `score` gives the QC similarities of a run of queries."""
    return in_shares(
        len(right),
        max(FEWEST, TILE // candidates),
        lambda rows: best_ranks(score(rows), mask_of(right[rows.start : rows.stop], candidates)),
    )


def accuracies(ranks_Q: Tensor, right: Rights, classes: int) -> Iterator[tuple[str, float]]:
    """top1, top5, the mean of top1 over the classes that occur, and the share of the largest class to compare with.

    The first class of each picture counts.
    """
    targets_Q = torch.tensor([numbers[0] for numbers in right])
    sizes_C = torch.bincount(targets_Q, minlength=classes)
    hits_C = torch.bincount(targets_Q[ranks_Q < 1], minlength=classes)
    present_C = sizes_C > 0
    yield from ((f"top{k}", float((ranks_Q < k).double().mean())) for k in (1, 5))
    yield "mean_per_class_top1", float((hits_C[present_C].double() / sizes_C[present_C]).mean())
    yield "largest_class", float(sizes_C.max()) / len(right)
    yield "classes", float(classes)
    yield "pictures", float(len(right))


def average_precision(scores_NC: Tensor, right_NC: Tensor) -> Tensor:
    """C: for each class the mean over its pictures of the precision at their score; NaN for a class without any.

    The precision at a score counts all pictures with this score or a higher one, so the order of ties does not matter:
    scikit-learn's `average_precision_score`.
    """
    found = torch.full((scores_NC.shape[1],), float("nan"), dtype=torch.float64)
    for number in range(scores_NC.shape[1]):
        scores_N, right_N = scores_NC[:, number].contiguous(), right_NC[:, number]
        positives_P = scores_N[right_N].sort().values
        if len(positives_P):
            above_P = len(scores_N) - torch.searchsorted(scores_N.sort().values, positives_P)
            right_above_P = len(positives_P) - torch.searchsorted(positives_P, positives_P)
            found[number] = (right_above_P.double() / above_P).mean()
    return found


def mean_average_precision(
    score: Callable[[range], Tensor], right: Rights, classes: int
) -> Iterator[tuple[str, float]]:
    """mAP over the classes that occur, their number, and the mAP of scores drawn at random.

    `score` gives the NC scores of a run of classes.
    """
    members: list[list[int]] = [[] for _ in range(classes)]
    for row, numbers in enumerate(right):
        for number in numbers:
            members[number].append(row)

    def tile(run: range) -> Tensor:
        return average_precision(score(run), mask_of(members[run.start : run.stop], len(right)).T)

    found_C = in_shares(classes, max(FEWEST, TILE // len(right)), tile)
    sizes = [len(set(rows)) for rows in members if rows]
    yield "mAP", float(found_C.nanmean())
    yield "chance_mAP", sum(sizes) / len(sizes) / len(right)
    yield "mAP_classes", float(len(sizes))


def micro_average_precision(score: Callable[[range], Tensor], right: Rights, classes: int) -> float:
    """Average precision over all pairs of picture and class as one list; `score` gives NC scores of a run of classes.

    Only the scores of the right pairs are kept; every other score is counted below the first of them that it reaches.
    """
    members: list[list[int]] = [[] for _ in range(classes)]
    for row, numbers in enumerate(right):
        for number in numbers:
            members[number].append(row)
    size = max(FEWEST, TILE // len(right))
    runs = [range(first, min(first + size, classes)) for first in range(0, classes, size)]
    tiles = ((score(run), mask_of(members[run.start : run.stop], len(right)).T) for run in runs)
    positives_P = torch.cat([scores_NC[right_NC] for scores_NC, right_NC in tiles]).sort().values
    reached = torch.zeros(len(positives_P) + 1, dtype=torch.int64)
    for run in runs:
        places = torch.searchsorted(positives_P, score(run).flatten(), right=True)
        reached += torch.bincount(places, minlength=len(reached))
    above_P = reached.flip(0).cumsum(0).flip(0)[1:]
    right_above_P = len(positives_P) - torch.searchsorted(positives_P, positives_P)
    return float((right_above_P.double() / above_P).mean())


def neighbours(query_QD: Tensor, known_CD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(similarities, row numbers) QK of the nearest rows of `known_CD`, nearest first; K is k or C if that is less."""
    k = min(k, len(known_CD))
    step = max(k, TILE // 256)

    def nearest(rows: range) -> Tensor:
        part_QD = query_QD[rows.start : rows.stop]
        best = torch.empty(2, len(part_QD), 0, dtype=torch.float64)
        for start in range(0, len(known_CD), step):
            scores_QC = part_QD @ known_CD[start : start + step].T
            top = scores_QC.topk(min(k, scores_QC.shape[1]))
            both = torch.cat([best, torch.stack([top.values.double(), top.indices.double() + start])], dim=2)
            order = both[0].topk(min(k, both.shape[2])).indices
            best = both.gather(2, order.expand(2, *order.shape))
        return best.transpose(0, 1)

    found = in_shares(len(query_QD), 256, nearest)
    return found[:, 0], found[:, 1].long()
