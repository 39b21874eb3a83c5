"""The two contrastive losses without a B x B matrix: weighted InfoNCE in both directions, and pairwise sigmoid.

Scores are computed in tiles and forgotten. InfoNCE keeps the log-sum-exp of every row and column, both from the same
tile, and computes the tiles a second time for the gradient (Inf-CL, arXiv 2410.17243); the sigmoid loss has no such
sums and takes its gradient at once (SigLIP, arXiv 2303.15343). Over ranks each computes its own images against all
texts, so that no pair is computed twice (DisCo-CLIP, arXiv 2304.08480).

Suffixes: B samples of this rank, D width, R rows (images) and C columns (texts) of a tile.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlp import distributed
from vlp.distributed import Way

Precision = Literal["fp32", "bf16"]
"""Of the products inside tiles; every sum is kept in float32."""

TILE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of a tile: 1024 stays in a core's caches, 8192 fills a GPU."""
KEPT = 1 << 20
"""Scores of a batch that is one tile and has no more of them stay until the backward pass."""
RANGE = 80.0
"""Scores of a tile that lie no further apart share one offset under the exponential; float32 bears 87."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """What is known of R x C pairs, beyond which text came with which picture."""

    excluded_RC: Tensor | None = None
    """bool: in no denominator. Own pairs stay in, whatever it says, unless their target is 0."""
    log_weight_RC: Tensor | None = None
    """Finite logarithm of the weight in the denominators; weight 0 is `excluded_RC`. InfoNCE only."""
    target_RC: Tensor | None = None
    """Share in [0, 1] to which the text is true of the picture, own pairs included; InfoNCE divides it by its sums over
    rows and over columns. None: 1 for own pairs, 0 for all others."""


Side = tuple[Tensor, ...]
"""Labels of some samples, each tensor with one entry per sample."""
Judge = Callable[[Side, Side], Pairs]
"""From the labels of R samples and of C samples: one tile at a time, of whatever size."""


@dataclass(frozen=True, slots=True)
class Job:
    """How to compute: everything that is no tensor."""

    way: Way = "gather"
    precision: Precision = "fp32"
    judge: Judge | None = None
    smoothing: float = 0.0
    decoupled: bool = False
    tile: int | None = None
    """Rows and columns of a tile; default: `TILE` of the device."""

    def cast(self, tensor: Tensor) -> Tensor:
        """To the type of the products."""
        return tensor.to(torch.bfloat16) if self.precision == "bf16" else tensor

    def tiles(self, rows: Side, columns: Side, own: bool) -> Iterator["Tile"]:
        """All tiles of a block. Both sides: features, then labels. `own`: row i and column i are one sample."""
        step = self.tile or TILE.get(rows[0].device.type, TILE["cuda"])
        parts = [slice(start, start + step) for start in range(0, len(rows[0]), step)]
        for row, column in ((row, column) for row in parts for column in parts):
            side_R, side_C = tuple(side[row] for side in rows), tuple(side[column] for side in columns)
            pairs = self.judge(side_R[1:], side_C[1:]) if self.judge else Pairs()
            scores_RC = (side_R[0] @ side_C[0].T).float()
            yield Tile(row, column, scores_RC, own and row == column, pairs, self.decoupled)


class Tile:
    """Scores of some rows and columns, and what is known of these pairs."""

    def __init__(self, row: slice, column: slice, scores_RC: Tensor, own: bool, pairs: Pairs, decoupled: bool) -> None:
        """`own`: the diagonal are own pairs."""
        self.row, self.column, self.scores_RC, self.own = row, column, scores_RC, own
        self.target_RC, self.log_weight_RC, excluded_RC = pairs.target_RC, pairs.log_weight_RC, pairs.excluded_RC
        if own and decoupled and excluded_RC is None:
            excluded_RC = torch.zeros_like(scores_RC, dtype=torch.bool)
        if own and excluded_RC is not None:
            excluded_RC = excluded_RC.clone()
            own_R = excluded_RC.diagonal()
            own_R &= False if self.target_RC is None else self.target_RC.diagonal() == 0
            own_R |= decoupled
        self.excluded_RC = excluded_RC

    def positives(self, over: int) -> tuple[Tensor | float, Tensor | float]:
        """(sum of target x score, sum of target) over an axis."""
        if self.target_RC is not None:
            return (self.target_RC * self.scores_RC).sum(over), self.target_RC.sum(over)
        return (self.scores_RC.diagonal(), 1.0) if self.own else (0.0, 0.0)

    def even(self, over: int) -> tuple[Tensor, Tensor | float]:
        """(sum of scores, number) of what is in the denominator, over an axis."""
        if self.excluded_RC is None:
            return self.scores_RC.sum(over), float(self.scores_RC.shape[over])
        return self.scores_RC.masked_fill(self.excluded_RC, 0.0).sum(over), (~self.excluded_RC).sum(over)

    def minus(self, slope_RC: Tensor, row_R: Tensor, column_C: Tensor) -> Tensor:
        """`slope_RC` less the sum of both at every target; in place."""
        if self.target_RC is not None:
            slope_RC -= self.target_RC * (row_R[:, None] + column_C)
        elif self.own:
            slope_RC.diagonal().sub_(row_R + column_C)
        return slope_RC

    def masses(self) -> tuple[Tensor, Tensor | None]:
        """(RC, offset): weight x exp(score - offset), 0 where excluded. Where the scores lie too far apart for one
        offset: the logarithms, -inf where excluded, and None."""
        scores_RC = self.scores_RC if self.log_weight_RC is None else self.scores_RC + self.log_weight_RC
        low, high = scores_RC.aminmax()
        near = bool(high - low <= RANGE)
        mass_RC = (scores_RC - high).exp_() if near else scores_RC
        if self.excluded_RC is not None:
            mass_RC = mass_RC.masked_fill(self.excluded_RC, 0.0 if near else -math.inf)
        return mass_RC, high if near else None


def two_way(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    labels: Side = (),
    job: Job | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(image-to-text, text-to-image) InfoNCE over the batch of all ranks, scalars; equal on every rank.

    `-w_i sum_j T_ij S_ij + log sum_j omega_ij exp(S_ij)`, mean over rows i, and likewise over columns; S are the scaled
    products. T is the target, with `smoothing` of it spread evenly over the pairs in the denominator; `decoupled`
    leaves own pairs out of the denominators. `weights`: w of images and of texts, each B, without gradient. A row
    without a positive or without a denominator counts 0. All inputs are this rank's; with way "gather" the whole batch.
    """
    ones_B = torch.ones(len(image_BD), device=image_BD.device)
    sides = image_BD.float(), text_BD.float(), scale.float(), *(weights or (ones_B, ones_B))
    losses: tuple[Tensor, Tensor] = _TwoWay.apply(*sides, job or Job(), *labels)  # type: ignore[no-untyped-call]
    return losses


def pairwise_sigmoid(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, labels: Side = (), job: Job | None = None
) -> Tensor:
    """`1/B sum_ij softplus(x_ij) - T_ij x_ij`, x = scale * product + bias, over the batch of all ranks: a scalar.

    Excluded pairs count 0. Inputs as for `two_way`.
    """
    sides = image_BD.float(), text_BD.float(), scale.float(), bias.float()
    loss: Tensor = _Sigmoid.apply(*sides, job or Job(), *labels)  # type: ignore[no-untyped-call]
    return loss


class _TwoWay(torch.autograd.Function):
    """Rows are this rank's images. The texts visit; what is summed over their columns goes home with them."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        scale: Tensor,
        image_weight_B: Tensor,
        text_weight_B: Tensor,
        job: Job,
        *labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows, empty_5B = (job.cast(image_BD * scale), *labels), _no_sums(image_BD)
        row_5B = empty_5B.clone()
        ctx.only = None

        def meet(own: bool, *columns: Tensor) -> Tensor:
            column_5B = empty_5B.clone()
            for tile in job.tiles(rows, columns, own):
                if job.way == "gather" and len(tile.scores_RC) == len(image_BD) and tile.scores_RC.numel() <= KEPT:
                    ctx.only = tile
                mass_RC, offset = tile.masses()
                for sums_5B, part, over in ((row_5B, tile.row, 1), (column_5B, tile.column, 0)):
                    _add(sums_5B[:, part], tile, mass_RC, offset, over, job.smoothing)
            return column_5B

        column_5B = distributed.visit(job.way, (job.cast(text_BD), *labels), meet, _merge)
        row_B, row_4B = _settle(row_5B, image_weight_B, job.smoothing)
        column_B, column_4B = _settle(column_5B, text_weight_B, job.smoothing)
        ctx.job = job
        ctx.save_for_backward(image_BD, text_BD, scale, row_4B, column_4B, *labels)
        mean_2 = distributed.mean_over(job.way, torch.stack([row_B.mean(), column_B.mean()]))
        return mean_2[0], mean_2[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor, column_grad: Tensor) -> tuple[Tensor | None, ...]:
        job: Job = ctx.job
        image_BD, text_BD, scale, row_4B, column_4B, *labels = ctx.saved_tensors
        # of the mean over all ranks' samples, times the ranks, because gradients are averaged over ranks later
        row_4B, column_4B = (
            torch.cat([settled_4B[:1], settled_4B[1:] * (grad / len(image_BD))])
            for settled_4B, grad in ((row_4B, row_grad), (column_4B, column_grad))
        )
        rows, image_low_BD = (job.cast(image_BD * scale), *labels), job.cast(image_BD)
        pull_image_BD, wanted = torch.zeros_like(image_BD), ctx.needs_input_grad[1]

        def meet(own: bool, text_BD: Tensor, column_4B: Tensor, *labels: Tensor) -> Tensor:
            pull_text_BD = torch.zeros_like(image_BD)
            for tile in [ctx.only] if ctx.only else job.tiles(rows, (text_BD, *labels), own):
                slope_RC = _slope(tile, row_4B[:, tile.row], column_4B[:, tile.column], job.smoothing)
                _pull(tile, job.cast(slope_RC), text_BD, image_low_BD, pull_image_BD, pull_text_BD if wanted else None)
            return pull_text_BD

        pull_text_BD = distributed.visit(job.way, (job.cast(text_BD), column_4B, *labels), meet, _sum)
        none = (None,) * (3 + len(labels))
        return pull_image_BD * scale, pull_text_BD * scale, (pull_image_BD * image_BD).sum(), *none


class _Sigmoid(torch.autograd.Function):
    """Nothing is summed over rows or columns: the gradient comes with the loss, and the texts travel once."""

    @staticmethod
    def forward(
        ctx: Any, image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, job: Job, *labels: Tensor
    ) -> Tensor:
        rows, image_low_BD = (job.cast(image_BD * scale), *labels), job.cast(image_BD)
        pull_image_BD, half = torch.zeros_like(image_BD), torch.full((1,), 0.5, device=bias.device)
        total, pull_bias = torch.zeros_like(bias), torch.zeros_like(bias)
        wanted = ctx.needs_input_grad[1]

        def meet(own: bool, text_BD: Tensor, *labels: Tensor) -> Tensor:
            pull_text_BD = torch.zeros_like(image_BD)
            for tile in job.tiles(rows, (text_BD, *labels), own):
                x_RC = tile.scores_RC.add_(bias)
                loss_RC, slope_RC = F.softplus(x_RC), x_RC.sigmoid()
                if tile.excluded_RC is not None:
                    loss_RC.masked_fill_(tile.excluded_RC, 0.0)
                    slope_RC.masked_fill_(tile.excluded_RC, 0.0)
                total.add_(loss_RC.sum() - torch.as_tensor(tile.positives(1)[0]).sum())
                slope_RC = tile.minus(slope_RC, half, half)
                pull_bias.add_(slope_RC.sum())
                _pull(tile, job.cast(slope_RC), text_BD, image_low_BD, pull_image_BD, pull_text_BD if wanted else None)
            return pull_text_BD

        pull_text_BD = distributed.visit(job.way, (job.cast(text_BD), *labels), meet, _sum)
        ctx.save_for_backward(image_BD, scale, pull_image_BD, pull_text_BD, pull_bias)
        ctx.labels = len(labels)
        return distributed.mean_over(job.way, total / len(image_BD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, scale, pull_image_BD, pull_text_BD, pull_bias = ctx.saved_tensors
        share = grad / len(image_BD)  # the mean over all ranks' samples times the ranks, as in _TwoWay
        pull_scale = (pull_image_BD * image_BD).sum()
        pulls = pull_image_BD * (scale * share), pull_text_BD * (scale * share), pull_scale * share, pull_bias * share
        return *pulls, *(None,) * (1 + ctx.labels)


def _pull(
    tile: Tile, slope_RC: Tensor, text_BD: Tensor, image_BD: Tensor, pull_image_BD: Tensor, pull_text_BD: Tensor | None
) -> None:
    """Add what the slope of a tile does to both sides' features; None for texts without a gradient, a copy's keys."""
    pull_image_BD[tile.row] += slope_RC @ text_BD[tile.column]
    if pull_text_BD is not None:
        pull_text_BD[tile.column] += slope_RC.T @ image_BD[tile.row]


def _no_sums(image_BD: Tensor) -> Tensor:
    """5B, of every row or column so far: log-sum-exp; sums of target x score and of target; sum of the scores in the
    denominator and their number."""
    sums_5B = torch.zeros(5, len(image_BD), device=image_BD.device)
    sums_5B[0] = -math.inf
    return sums_5B


def _add(sums_5R: Tensor, tile: Tile, mass_RC: Tensor, offset: Tensor | None, over: int, smoothing: float) -> None:
    """Add a tile's rows (`over` 1) or columns (0) to the sums; in place."""
    log = mass_RC.logsumexp(over) if offset is None else mass_RC.sum(over).log_() + offset
    torch.logaddexp(sums_5R[0], log, out=sums_5R[0])
    for number, term in enumerate((*tile.positives(over), *(tile.even(over) if smoothing else ())), start=1):
        sums_5R[number] += term


def _merge(sums_N5B: Tensor) -> Tensor:
    """5B: the sums of several ranks' shares."""
    return torch.cat([sums_N5B[:, :1].logsumexp(dim=0), sums_N5B[:, 1:].sum(dim=0)])


def _sum(shares_NBD: Tensor) -> Tensor:
    return shares_NBD.sum(dim=0)


def _settle(sums_5B: Tensor, weight_B: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """(loss of every row, 4B for the gradient: log-sum-exp, and by how much the loss falls with the latter, with target
    x score, and with a score in the denominator)."""
    log_B, positive_B, target_B, even_B, count_B = sums_5B
    counts_B = ((log_B > -math.inf) & (target_B > 0)).float()
    log_B = log_B.clamp(min=torch.finfo(log_B.dtype).min)  # nothing below multiplies 0 by infinity
    by_target_B = counts_B * weight_B * (1.0 - smoothing) / target_B.where(target_B > 0, 1.0)
    by_even_B = counts_B * weight_B * smoothing / count_B.clamp(min=1.0)
    loss_B = counts_B * log_B - by_target_B * positive_B - by_even_B * even_B
    return loss_B, torch.stack([log_B, counts_B, by_target_B, by_even_B])


def _slope(tile: Tile, row_4R: Tensor, column_4C: Tensor, smoothing: float) -> Tensor:
    """RC: the loss's derivative by the scores."""
    mass_RC, offset = tile.masses()
    (log_R, share_R, target_R, even_R), (log_C, share_C, target_C, even_C) = row_4R, column_4C
    if offset is None:
        slope_RC = (mass_RC - log_R[:, None]).exp_().mul_(share_R[:, None])
        slope_RC += (mass_RC - log_C).exp_().mul_(share_C)
    else:  # above RANGE only rows of which the tile holds nothing but excluded pairs, whose mass is 0
        factor_R, factor_C = ((offset - log).clamp(max=RANGE).exp() for log in (log_R, log_C))
        slope_RC = mass_RC.mul_((factor_R * share_R)[:, None] + factor_C * share_C)
    if smoothing:
        even_RC = even_R[:, None] + even_C
        slope_RC -= even_RC if tile.excluded_RC is None else even_RC.masked_fill(tile.excluded_RC, 0.0)
    return tile.minus(slope_RC, target_R, target_C)
