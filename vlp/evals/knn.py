"""Weighted k-nearest-neighbour classification of a test folder by a train folder, on frozen picture features.

Wu et al. 2018, arXiv 1805.01978, section 3.4, as DINO uses it (Caron et al. 2021, arXiv 2104.14294): each of the k
nearest training pictures votes for its label with weight exp(cosine / temperature).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.shard_set import Train
from vlp.evals._encode import Encoder
from vlp.evals._labels import Labels, LabelSet, firsts, label_sets, labelled, several
from vlp.evals._scores import accuracies, mean_average_precision, neighbours, tiled_ranks


class Config(StrictModel):
    """Options of `knn`."""

    train: Train
    """Shards whose pictures vote."""
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    labels: Labels | None = None
    """Classes, as for zero-shot; default those of the training shards."""
    column: str = "labels"
    """Where a sample says its labels: `labels`, `cls`, or a json column."""
    multi: bool | None = None
    """Also mean average precision over all labels; default where a picture carries several."""


def run(encoder: Encoder, data: Train | Path, config: Config) -> Iterator[tuple[str, float]]:
    """top1 and top5 by first labels, the mean over classes, the share of the largest class; mAP over all labels."""
    train, test = encoder.pictures(config.train, config.column), encoder.pictures(data, config.column)
    single, every = label_sets(config.labels, train)

    def vote(labels: LabelSet, first: bool) -> tuple[Votes, list[list[int]]]:
        of_train, voters = labelled(train, labels, config.train, config.column)
        rows, classes = labelled(test, labels, data, config.column)
        cosine_QK, near_QK = neighbours(test.image_ND[rows], train.image_ND[of_train], config.k)
        return Votes(cosine_QK, near_QK, firsts(voters) if first else voters, config.temperature), classes

    votes, classes = vote(single, first=True)
    count = len(single.names)
    ranks = tiled_ranks(lambda run: votes.count(run, range(count)), firsts(classes), count)
    yield from accuracies(ranks, classes, count)
    yield "train_pictures", float(len(votes.voters))
    yield "without_label", float(len(test.keys) - len(classes))
    if several(config.multi, labelled(test, every, data, config.column)[1]):
        votes, classes = vote(every, first=False)
        everyone = range(len(classes))
        yield from mean_average_precision(lambda run: votes.count(everyone, run), classes, len(every.names))
    yield "skipped", float(test.skipped)


class Votes:
    """The votes of the neighbours of every query."""

    def __init__(self, cosine_QK: Tensor, near_QK: Tensor, voters: Sequence[Sequence[int]], temperature: float) -> None:
        """`near_QK`: places in `voters`, which holds the classes of every training picture."""
        # a factor common to all of a query's votes changes no order; without it the exponentials could overflow
        self.weight_QK = ((cosine_QK - cosine_QK[:, :1]) / temperature).double().exp()
        self.near_QK, self.voters = near_QK, voters
        most = max(map(len, voters))
        self.class_TM = torch.tensor([[*numbers, *[-1] * (most - len(numbers))] for numbers in voters])

    def count(self, queries: range, classes: range) -> Tensor:
        """QC sums of weights."""
        near_QK = self.near_QK[queries.start : queries.stop]
        class_QKM = self.class_TM[near_QK] - classes.start
        outside = (class_QKM < 0) | (class_QKM >= len(classes))
        class_QKM = class_QKM.masked_fill(outside, len(classes))
        weight_QKM = self.weight_QK[queries.start : queries.stop, :, None].expand(class_QKM.shape)
        sums = torch.zeros(len(near_QK), len(classes) + 1, dtype=torch.float64)
        return sums.scatter_add_(1, class_QKM.flatten(1), weight_QKM.flatten(1))[:, :-1]
