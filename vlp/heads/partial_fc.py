"""A cosine classifier of very many classes: weights shared out over the ranks, a few negative classes drawn per step
(Partial FC, An et al. 2022, arXiv 2203.15565), margins on the positives (ArcFace, arXiv 1801.07698; CosFace, arXiv
1801.09414).

Features visit the ranks, each of which holds a run of the classes, and come home with their scores; products are
computed in tiles and a second time for the gradient, as in the loss kernel, so that no B x N matrix is kept.
Suffixes: B samples of a rank, D width, S positive classes of a sample (padded with -1), C classes of this rank,
N drawn classes of this rank, R and M samples and classes of a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlp import distributed
from vlp.distributed import Way
from vlp.objectives._kernel import TILE

Margin = Literal["arc", "cosine"]
"""arc: the angle to a positive class grows by the margin. cosine: the cosine falls by it."""
STEEP = 1e-6
"""Smallest squared sine whose slope is taken: at a cosine of 1 it is infinite."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the loss of some samples is made of."""

    positive_BS: Tensor
    """Score of every positive class, with scale and margin; 0 where there is none."""
    real_BS: Tensor
    """bool: where there is one."""
    negative_B: Tensor
    """Logarithm of the sum of exp(score) over the drawn classes that are not the sample's own; -inf without any."""
    cosines_4: Tensor
    """Of this rank's samples, without gradient: sum and number of the positive cosines, sum and number of the drawn
    negatives' absolute cosines."""


def with_margin(cosine: Tensor, margin: float, kind: Margin) -> Tensor:
    """The cosine of a positive class made harder by the margin; falls with the angle over its whole range."""
    if margin == 0.0:
        return cosine
    if kind == "cosine":
        return cosine - margin
    sine = (1.0 - cosine.square()).clamp(min=STEEP).sqrt()
    moved = cosine * math.cos(margin) - sine * math.sin(margin)
    # beyond an angle of pi - margin the cosine would rise again
    return moved.where(cosine > -math.cos(margin), cosine - (1.0 - math.cos(margin)))


class PartialFC(nn.Module):
    """Holds one direction per class, and what decides which classes are drawn: a seed and how often it was drawn."""

    seed: Tensor
    draws: Tensor

    def __init__(self, classes: int, width: int, scale: float, margin: float, kind: Margin) -> None:
        super().__init__()
        self.classes, self.scale, self.margin, self.kind = classes, scale, margin, kind
        self.weight = nn.Parameter(torch.randn(classes, width) * width**-0.5)
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def share_out(self) -> None:
        """Leave each rank its own classes; once, on the final device and before the optimiser is made."""
        self.weight = nn.Parameter(distributed.shard_rows(self.weight.detach()))

    def drawn(self, count: int, among: Tensor | None = None) -> Tensor:
        """Sorted numbers of the classes that serve as negatives in this step, equal on all ranks.

        `among`: classes that have to be there, of all ranks' samples; others are drawn until there are `count`.
        """
        seed = int(self.seed) * 1_000_003 + int(self.draws)
        order = torch.randperm(self.classes, generator=torch.Generator().manual_seed(seed)).to(self.weight.device)
        if among is not None:
            there = torch.zeros(self.classes, dtype=torch.bool, device=order.device)
            there[among[among >= 0]] = True
            first = there.nonzero()[:, 0]
            order, count = torch.cat([first, order[~there[order]]]), max(count, len(first))
        return order[:count].sort().values

    def advance(self) -> None:
        """The next step draws others."""
        self.draws += 1

    def forward(self, feature_BD: Tensor, ids_BS: Tensor, drawn_N: Tensor, way: Way = "local") -> Scores:
        """Scores of this rank's samples, whose features have length 1, against the classes of all ranks."""
        mine = distributed.row_range(self.classes)
        inside = (drawn_N >= mine.start) & (drawn_N < mine.stop)
        job = _Job(way, mine.start, self.scale)
        weight_CD = distributed.local(self.weight).float()
        cosine_BS, negative_B, sums_2 = _Cosines.apply(  # type: ignore[no-untyped-call]
            feature_BD.float(), weight_CD, ids_BS, drawn_N[inside] - mine.start, job
        )
        real_BS = ids_BS >= 0
        positive_BS = self.scale * with_margin(cosine_BS, self.margin, self.kind)
        cosines_4 = torch.stack([(cosine_BS.detach() * real_BS).sum(), real_BS.sum().float(), *sums_2])
        return Scores(positive_BS.where(real_BS, 0.0), real_BS, negative_B, cosines_4)


@dataclass(frozen=True, slots=True)
class _Job:
    way: Way
    first: int
    """Number of this rank's first class."""
    scale: float


@dataclass(frozen=True, slots=True)
class _Shard:
    """This rank's classes, all of length 1, and those of them that were drawn."""

    weight_CD: Tensor
    negative_N: Tensor
    first: int

    def positives(self, ids_BS: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For every place S: (place, samples P whose class of that place is here, these classes P)."""
        for place, ids_B in enumerate(ids_BS.unbind(1)):
            here_B = (ids_B >= self.first) & (ids_B < self.first + len(self.weight_CD))
            row_P = here_B.nonzero()[:, 0]
            yield place, row_P, ids_B[row_P] - self.first

    def tiles(self, feature_BD: Tensor, ids_BS: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, tuple[Tensor, ...]]]:
        """(samples, drawn classes M, their RM cosines, the pairs of which the class is the sample's own)."""
        step = TILE.get(feature_BD.device.type, TILE["cuda"])
        for start in range(0, len(feature_BD), step):
            rows = slice(start, start + step)
            _, rows_P, classes_P = zip(*self.positives(ids_BS[rows]), strict=True)
            row_P, class_P = torch.cat(rows_P), torch.cat(classes_P)
            for classes_M in self.negative_N.split(step) if len(self.negative_N) else ():
                place_P = torch.searchsorted(classes_M, class_P).clamp_(max=len(classes_M) - 1)
                own_P = classes_M[place_P] == class_P
                yield rows, classes_M, feature_BD[rows] @ self.weight_CD[classes_M].T, (row_P[own_P], place_P[own_P])


class _Cosines(torch.autograd.Function):
    """Cosines of the positive classes, and the log-sum-exp of the drawn negatives, wherever the classes lie."""

    @staticmethod
    def forward(
        ctx: Any, feature_BD: Tensor, weight_CD: Tensor, ids_BS: Tensor, negative_N: Tensor, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        length_C1 = weight_CD.norm(dim=1, keepdim=True).clamp_(min=1e-12)
        shard = _Shard(weight_CD / length_C1, negative_N, job.first)
        places = ids_BS.shape[1]

        def meet(own: bool, feature_BD: Tensor, ids_BS: Tensor) -> Tensor:
            found = feature_BD.new_zeros(places + 3, len(feature_BD))
            for place, row_P, class_P in shard.positives(ids_BS):
                found[place, row_P] = (feature_BD[row_P] * shard.weight_CD[class_P]).sum(dim=1)
            found[places] = -math.inf
            for rows, classes_M, cosine_RM, mine in shard.tiles(feature_BD, ids_BS):
                cosine_RM[mine] = 0.0
                found[places + 1, rows] += cosine_RM.abs().sum(dim=1)
                found[places + 2, rows] += float(len(classes_M))
                found[places + 2, rows] -= mine[0].bincount(minlength=len(cosine_RM))
                cosine_RM.mul_(job.scale)[mine] = -math.inf
                found[places, rows] = found[places, rows].logaddexp(cosine_RM.logsumexp(dim=1))
            return found

        def merge(found: Tensor) -> Tensor:
            merged = found.sum(dim=0)
            merged[places] = found[:, places].logsumexp(dim=0)
            return merged

        found = distributed.visit(job.way, (feature_BD, ids_BS), meet, merge)
        sums_2 = found[places + 1 :].sum(dim=1)
        ctx.save_for_backward(feature_BD, shard.weight_CD, length_C1, ids_BS, negative_N, found[places])
        ctx.job = job
        ctx.mark_non_differentiable(sums_2)
        return found[:places].T.contiguous(), found[places].clone(), sums_2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BS: Tensor, grad_B: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        feature_BD, weight_CD, length_C1, ids_BS, negative_N, negative_B = ctx.saved_tensors
        shard = _Shard(weight_CD, negative_N, job.first)
        pull_CD = torch.zeros_like(weight_CD)

        def meet(
            own: bool, feature_BD: Tensor, ids_BS: Tensor, grad_BS: Tensor, grad_B: Tensor, negative_B: Tensor
        ) -> Tensor:
            pull_BD = torch.zeros_like(feature_BD)
            for place, row_P, class_P in shard.positives(ids_BS):
                grad_P1 = grad_BS[row_P, place, None]
                pull_BD.index_add_(0, row_P, grad_P1 * weight_CD[class_P])
                pull_CD.index_add_(0, class_P, grad_P1 * feature_BD[row_P])
            log_B = negative_B.clamp(min=torch.finfo(negative_B.dtype).min)  # no infinity less infinity
            for rows, classes_M, cosine_RM, mine in shard.tiles(feature_BD, ids_BS):
                cosine_RM.mul_(job.scale)[mine] = -math.inf
                slope_RM = cosine_RM.sub_(log_B[rows, None]).exp_().mul_((job.scale * grad_B[rows])[:, None])
                pull_BD[rows] += slope_RM @ weight_CD[classes_M]
                pull_CD.index_add_(0, classes_M, slope_RM.T @ feature_BD[rows])
            return pull_BD

        guests = feature_BD, ids_BS, grad_BS.contiguous(), grad_B.contiguous(), negative_B
        pull_BD = distributed.visit(job.way, guests, meet, lambda shares_NBD: shares_NBD.sum(dim=0))
        # through the lengths; samples' gradients come times the ranks, for a mean that sharded weights do not undergo
        pull_CD -= weight_CD * (pull_CD * weight_CD).sum(dim=1, keepdim=True)
        return pull_BD, pull_CD / (length_C1 * distributed.world_size()), None, None, None


def visiting(exchange: str) -> Way:
    """How features visit the classes, for the option that says how ranks share a contrastive loss."""
    return "ring" if exchange == "ring" else "local"


def class_mean(values_B: Tensor, real_BS: Tensor) -> Tensor:
    """Mean over the samples of all ranks that have a class; 0 without any."""
    labelled_B = real_BS.any(dim=1)
    count = distributed.gather(labelled_B.float()).sum().clamp(min=1.0)
    return distributed.gather(values_B.where(labelled_B, 0.0)).sum() / count


def class_parts(scores: Scores) -> dict[str, Tensor]:
    """For the log: share of the samples with a class, mean positive cosine, mean absolute cosine of the negatives."""
    sum_p, count_p, sum_n, count_n = distributed.gather(scores.cosines_4[None]).sum(dim=0)
    return {
        "positives": distributed.gather(scores.real_BS.any(dim=1).float()).mean(),
        "positive_cosine": sum_p / count_p.clamp(min=1.0),
        "negative_cosine": sum_n / count_n.clamp(min=1.0),
    }


def positive_mass(scores: Scores) -> Tensor:
    """B: logarithm of the sum of exp(-score) over the positive classes; -inf without any."""
    return (-scores.positive_BS).masked_fill(~scores.real_BS, -math.inf).logsumexp(dim=1)


def softmax_loss(scores: Scores) -> Tensor:
    """B: cross-entropy of a positive class against itself and the drawn negatives, mean over the sample's classes."""
    loss_BS = F.softplus(scores.negative_B[:, None] - scores.positive_BS).where(scores.real_BS, 0.0)
    return loss_BS.sum(dim=1) / scores.real_BS.sum(dim=1).clamp(min=1)
