"""Linear probe: logistic regression on frozen picture features, trained on one folder and tested on another.

Radford et al. 2021, arXiv 2103.00020, appendix A.3: L-BFGS, and a strength of regularisation that is chosen on a part
of the training pictures, never on the test pictures; the chosen one is then fitted to all of them. One label per
picture: softmax regression. Several: one logistic regression per label (one versus rest), mean average precision over
labels (mAP), and over all pairs of picture and label as one list (micro_mAP).

    minimise over W, b   mean over pictures of loss(xW + b) + penalty / 2 * |W|^2

x is a feature minus the mean of the training pictures, divided by the root mean square that then remains, one number
for all of its entries. Suffixes: N pictures, D width, C classes; W_DC carries b as its last row.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import PipelineError
from data_pipelines.shard_set import Train
from data_pipelines.stream import cut
from vlp.evals._encode import Encoder
from vlp.evals._labels import Labels, firsts, label_sets, labelled, several
from vlp.evals._scores import TILE, Rights, accuracies, mean_average_precision, micro_average_precision, tiled_ranks

Pairs = Iterator[tuple[str, float]]


class Config(StrictModel):
    """Options of `linear-probe`."""

    train: Train
    """Shards to fit on."""
    labels: Labels | None = None
    """Classes, as for zero-shot; default those of the training shards."""
    column: str = "labels"
    """Where a sample says its labels: `labels`, `cls`, or a json column."""
    multi: bool | None = None
    """One classifier per label; default where a training picture carries several."""
    penalties: tuple[float, ...] = (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """Strengths of regularisation to choose from."""
    validation: float = Field(0.2, gt=0, lt=1)
    """Share of the training pictures on which the strength is chosen."""
    iterations: int = Field(100, ge=1)
    """Steps of L-BFGS at most, for each strength."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of the labelled training pictures that are used, the validation pictures among them: label efficiency."""
    seed: int = 0
    """Draws the validation pictures and the share."""

    @field_validator("penalties")
    @classmethod
    def _strongest_first(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0:
            raise ValueError("needs one positive number at least")
        return tuple(sorted(value, reverse=True))


def run(encoder: Encoder, data: Train | Path, config: Config) -> Pairs:
    """top1, top5, mean over classes; or mAP; the chosen penalty and what it reached on the validation pictures."""
    train, test = encoder.pictures(config.train, config.column), encoder.pictures(data, config.column)
    single, every = label_sets(config.labels, train)
    multi = several(config.multi, labelled(train, every, config.train, config.column)[1])
    labels = every if multi else single
    of_train, targets = some(*labelled(train, labels, config.train, config.column), config)
    rows, classes = labelled(test, labels, data, config.column)
    features_ND = train.image_ND[of_train].to(encoder.bundle.device)
    penalty, reached = choose(features_ND, targets, len(labels.names), multi, config)
    score = Probe(features_ND, targets, len(labels.names), multi, config.iterations).fit(penalty)
    scores = score(test.image_ND[rows].to(features_ND.device))
    yield from measure(scores, classes, len(labels.names), multi)
    if multi:
        everyone = range(len(rows))
        yield "micro_mAP", micro_average_precision(lambda run: scores(everyone, run), classes, len(labels.names))
    yield "penalty", penalty
    yield "validation", reached
    yield "train_pictures", float(len(of_train))
    yield "without_label", float(len(test.keys) - len(rows))
    yield "skipped", float(test.skipped)


Scores = Callable[[range, range], Tensor]
"""QC scores of a run of pictures for a run of classes."""


def some(rows: list[int], targets: list[list[int]], config: Config) -> tuple[list[int], list[list[int]]]:
    """The share of the training pictures that is asked for, drawn by `seed`."""
    if config.share == 1:
        return rows, targets
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    kept = sorted(order[: max(2, round(config.share * len(rows)))].tolist())
    return [rows[place] for place in kept], [targets[place] for place in kept]


def choose(features_ND: Tensor, targets: Rights, classes: int, multi: bool, config: Config) -> tuple[float, float]:
    """(penalty, its accuracy or mAP) that is best on held-out training pictures; the strongest of equals."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = round(len(targets) * config.validation)
    if not 0 < held < len(targets):
        raise PipelineError(
            f"{len(targets)} training pictures are too few to keep {config.validation:.0%} for validation"
        )
    fit, kept = order[held:], order[:held]
    probe = Probe(features_ND[fit], [targets[row] for row in fit], classes, multi, config.iterations)
    reached = []
    for penalty in config.penalties:
        score = probe.fit(penalty)(features_ND[kept])
        found = dict(measure(score, [targets[row] for row in kept], classes, multi))
        reached.append(found["mAP" if multi else "top1"])
    best = max(range(len(reached)), key=reached.__getitem__)
    return config.penalties[best], reached[best]


def measure(score: Scores, right: Rights, classes: int, multi: bool) -> Pairs:
    """Accuracies of the first class of each picture, or the mean average precision over all of them."""
    if multi:
        everyone = range(len(right))
        yield from mean_average_precision(lambda run: score(everyone, run), right, classes)
        yield "classes", float(classes)
        yield "pictures", float(len(right))
    else:
        ranks = tiled_ranks(lambda run: score(run, range(classes)), firsts(right), classes)
        yield from accuracies(ranks, right, classes)


class Probe:
    """Training pictures and the weights fitted to them; every fit starts from the one before."""

    def __init__(self, features_ND: Tensor, targets: Rights, classes: int, multi: bool, iterations: int) -> None:
        """`targets`: classes of every picture, of which the first counts unless `multi`."""
        self.mean_D = features_ND.mean(dim=0)
        centred_ND = features_ND - self.mean_D
        self.scale = float(centred_ND.square().mean().sqrt()) or 1.0
        self.input_ND = self._input(features_ND)
        self.weight_DC = torch.zeros(self.input_ND.shape[1], classes, device=features_ND.device)
        self.device, self.multi, self.iterations = features_ND.device, multi, iterations
        right = targets if multi else firsts(targets)
        pairs = [(row, number) for row, numbers in enumerate(right) for number in numbers]
        self.pairs_2P = torch.tensor(pairs, device=self.device).T.contiguous()
        self.rows = cut(len(targets), max(1, TILE // classes))

    def _input(self, features_ND: Tensor) -> Tensor:
        scaled_ND = (features_ND - self.mean_D) / self.scale
        return torch.cat([scaled_ND, scaled_ND.new_ones(len(scaled_ND), 1)], dim=1)

    def fit(self, penalty: float) -> Callable[[Tensor], Scores]:
        """Weights at the minimum; returns features -> scores."""
        weight_DC = self.weight_DC.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight_DC], max_iter=self.iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = penalty / 2 * weight_DC[:-1].square().sum()
            loss.backward()
            for rows in self.rows:
                part = self._loss(rows, weight_DC) / len(self.input_ND)
                part.backward()
                loss = loss.detach() + part.detach()
            return loss

        optimizer.step(closure)
        self.weight_DC = weight_DC.detach()
        return self._scores

    def _loss(self, rows: range, weight_DC: Tensor) -> Tensor:
        """Sum over these pictures: ln(1 + e^z) of every class, or ln of the sum of e^z; minus z of the right ones."""
        logits_NC = self.input_ND[rows.start : rows.stop] @ weight_DC
        first, last = torch.searchsorted(self.pairs_2P[0], torch.tensor([rows.start, rows.stop], device=self.device))
        row_P, class_P = self.pairs_2P[:, first:last]
        whole = F.softplus(logits_NC) if self.multi else logits_NC.logsumexp(dim=1)
        return whole.sum() - logits_NC[row_P - rows.start, class_P].sum()

    def _scores(self, features_ND: Tensor) -> Scores:
        input_ND, weight_DC = self._input(features_ND), self.weight_DC
        return lambda pictures, classes: (
            input_ND[pictures.start : pictures.stop] @ weight_DC[:, classes.start : classes.stop]
        ).cpu()
