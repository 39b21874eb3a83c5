"""Boxes in plain torch: areas, overlap, IoU losses, clipping and batched non-maximum suppression.

Boxes are (x0, y0, x1, y1) in the last dimension, in any one unit. Suffixes: B pictures, N and M boxes, K kept boxes,
G boxes of one block. torchvision's operators are compiled, and missing on machines without them (torchvision_guard.py).
"""

from typing import Literal

import torch
from torch import Tensor

IouLoss = Literal["linear", "log", "giou"]
"""linear: 1 - IoU. log: -log IoU (UnitBox, arXiv 1608.01471). giou: 1 - GIoU (arXiv 1902.09630)."""
BLOCK = 256
"""Boxes that are compared with each other at a time in NMS."""
LEAST_IOU = 1e-6
"""Below it `log` stops growing: boxes apart would cost infinitely much."""


def area(boxes_N4: Tensor) -> Tensor:
    """N: areas; 0 for a box turned inside out."""
    return (boxes_N4[..., 2] - boxes_N4[..., 0]).clamp(min=0) * (boxes_N4[..., 3] - boxes_N4[..., 1]).clamp(min=0)


def overlap(a_N4: Tensor, b_N4: Tensor) -> Tensor:
    """N: the area that boxes share, pair by pair; dimensions broadcast."""
    left_top = torch.maximum(a_N4[..., :2], b_N4[..., :2])
    right_bottom = torch.minimum(a_N4[..., 2:], b_N4[..., 2:])
    sides_N2 = (right_bottom - left_top).clamp(min=0)
    return sides_N2[..., 0] * sides_N2[..., 1]


def paired_iou(a_N4: Tensor, b_N4: Tensor) -> Tensor:
    """N: intersection over union, pair by pair; 0 where neither box has an area. Dimensions broadcast."""
    shared_N = overlap(a_N4, b_N4)
    union_N = area(a_N4) + area(b_N4) - shared_N
    return torch.where(union_N > 0, shared_N / union_N.clamp(min=torch.finfo(union_N.dtype).tiny), 0.0)


def iou(a_N4: Tensor, b_M4: Tensor) -> Tensor:
    """NM: intersection over union of every box with every other; further dimensions in front broadcast."""
    return paired_iou(a_N4[..., :, None, :], b_M4[..., None, :, :])


def iou_loss(boxes_N4: Tensor, targets_N4: Tensor, kind: IouLoss = "linear") -> Tensor:
    """N: how far boxes are from their targets, by overlap."""
    found_N = paired_iou(boxes_N4, targets_N4)
    if kind == "linear":
        return 1.0 - found_N
    if kind == "log":
        return -found_N.clamp(min=LEAST_IOU).log()
    hull_N4 = torch.cat(
        [torch.minimum(boxes_N4[..., :2], targets_N4[..., :2]), torch.maximum(boxes_N4[..., 2:], targets_N4[..., 2:])],
        dim=-1,
    )
    hull_N = area(hull_N4)
    union_N = area(boxes_N4) + area(targets_N4) - overlap(boxes_N4, targets_N4)
    return 1.0 - found_N + (hull_N - union_N) / hull_N.clamp(min=torch.finfo(hull_N.dtype).tiny)


def clip(boxes_N4: Tensor, width: float = 1.0, height: float = 1.0) -> Tensor:
    """The part of each box that lies on a picture of this size."""
    limits = torch.tensor([width, height, width, height], dtype=boxes_N4.dtype, device=boxes_N4.device)
    return torch.minimum(boxes_N4.clamp(min=0), limits)


def is_valid(boxes_N4: Tensor, least_side: float = 0.0) -> Tensor:
    """N bool: finite, the right way round, and both sides longer than `least_side`."""
    sides_N2 = boxes_N4[..., 2:] - boxes_N4[..., :2]
    return boxes_N4.isfinite().all(dim=-1) & (sides_N2 > least_side).all(dim=-1)


def nms(
    boxes_N4: Tensor, scores_N: Tensor, threshold: float, groups_N: Tensor | None = None, keep: int | None = None
) -> Tensor:
    """K int64: boxes that stay, the best first; see `nms_batch`, whose one picture this is."""
    groups = None if groups_N is None else groups_N[None]
    index_BK, kept_BK = nms_batch(boxes_N4[None], scores_N[None], threshold, groups, keep=keep)
    return index_BK[0][kept_BK[0]]


@torch.no_grad()
def nms_batch(
    boxes_BN4: Tensor,
    scores_BN: Tensor,
    threshold: float,
    groups_BN: Tensor | None = None,
    valid_BN: Tensor | None = None,
    keep: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression of many pictures at once: (index BK, whether that place is filled BK).

    From the highest score down, a box stays unless its IoU with one that stays exceeds `threshold`; of equal scores
    the first in the list counts as higher. With `groups_BN` only boxes of the same number suppress each other.
    `valid_BN` False: not a box, never kept. `keep`: stop after so many. Boxes without an area neither suppress nor are
    suppressed. Raises ValueError for scores or boxes that are not finite.

    Exact: blocks of sorted boxes are thinned by what stays so far, then within themselves (`_settle`).
    """
    valid_BN = torch.ones_like(scores_BN, dtype=torch.bool) if valid_BN is None else valid_BN
    if not (boxes_BN4[valid_BN].isfinite().all() and scores_BN[valid_BN].isfinite().all()):
        raise ValueError("boxes or scores that are not finite cannot be ordered: leave them out with valid_BN")
    count = scores_BN.shape[1]
    limit = count if keep is None else min(keep, count)
    # those that are no boxes go to the end, where all that counts is that they are no boxes
    order_BN = scores_BN.masked_fill(~valid_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
    boxes_BN4 = boxes_BN4.gather(1, order_BN[..., None].expand(-1, -1, 4))
    groups_BN = torch.zeros_like(order_BN) if groups_BN is None else groups_BN.gather(1, order_BN)
    alive_BN = valid_BN.gather(1, order_BN)
    kept_BK = order_BN.new_zeros(len(order_BN), 0)
    filled_BK = alive_BN.new_zeros(len(order_BN), 0)
    for first in range(0, count, BLOCK):
        block = slice(first, first + BLOCK)
        own = boxes_BN4[:, block], groups_BN[:, block]
        before = boxes_BN4.gather(1, kept_BK[..., None].expand(-1, -1, 4)), groups_BN.gather(1, kept_BK)
        beaten_BG = (_beats(before, own, threshold) & filled_BK[..., None]).any(dim=1)
        stays_BG = _settle(alive_BN[:, block] & ~beaten_BG, _beats(own, own, threshold))
        places_BG = torch.arange(first, first + stays_BG.shape[1], device=order_BN.device).expand_as(stays_BG)
        kept_BK, filled_BK = _front(
            torch.cat([kept_BK, places_BG], dim=1), torch.cat([filled_BK, stays_BG], dim=1), limit
        )
        if keep is not None and filled_BK.shape[1] == limit and bool(filled_BK.all()):
            break
    return order_BN.gather(1, kept_BK), filled_BK


def _beats(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], threshold: float) -> Tensor:
    """BNM bool: whether a box (with its group) suppresses another where it has the higher score."""
    same_BNM = first[1][:, :, None] == second[1][:, None, :]
    return (iou(first[0], second[0]) > threshold) & same_BNM


def _settle(alive_BG: Tensor, beats_BGG: Tensor) -> Tensor:
    """BG bool: what greedy suppression leaves of boxes that are sorted by score.

    A box stays if none that stays and is before it beats it. Applied to all boxes at once, again and again, the rule
    settles the first k boxes for good in k rounds, so the point where nothing changes any more is the greedy result; it
    is reached in as many rounds as the longest chain of boxes that beat one another, few in practice.
    """
    earlier_BGG = beats_BGG.triu(diagonal=1) & alive_BG[:, :, None] & alive_BG[:, None, :]
    stays_BG = alive_BG
    while True:
        after_BG = alive_BG & ~(earlier_BGG & stays_BG[:, :, None]).any(dim=1)
        if torch.equal(after_BG, stays_BG):
            return after_BG
        stays_BG = after_BG


def _front(places_BK: Tensor, filled_BK: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The filled places of every row in their order, in as few columns as the fullest row needs, at most `limit`."""
    width = min(limit, int(filled_BK.sum(dim=1).max())) if filled_BK.numel() else 0
    order_BK = (~filled_BK).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return places_BK.gather(1, order_BK), filled_BK.gather(1, order_BK)
