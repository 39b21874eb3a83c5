"""What a detector is to predict: which point of which pyramid level answers for which box, and with what.

One anchor per point, a box as the distances to its four sides, and centreness, as in FCOS (arXiv 1904.01355, equations
1 to 3); centreness is the only measure of "something is here", as in OLN (arXiv 2108.06753). Distances are in cells of
the point's level. Suffixes: B pictures, M boxes, P points of all levels one after the other, R regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.detection.boxes import area, iou, is_valid

REACH = 8.0
"""Cells from a point to the farthest side of its box, at most, on all levels but the coarsest: FCOS's 64 pixels at
stride 8, 128 at 16 and so on."""
NONE = -1
"""No box, no class."""


@dataclass(frozen=True, slots=True)
class Points:
    """Centres of the cells of all levels, finest level first, row by row."""

    centres_P2: Tensor
    """x, y as fractions of the picture."""
    grid_P2: Tensor
    """Columns and rows of the point's level."""
    level_P: Tensor
    """Number of the level, 0 the finest."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What every point is to say."""

    box_BP: Tensor
    """int64: number of the box that the point answers for, or NONE."""
    ltrb_BP4: Tensor
    """Distances to the left, top, right and bottom side of that box, in cells; 0 where there is none."""
    centreness_BP: Tensor
    """1 in the middle of the box, down to 0 at its sides; 0 where there is none."""
    inside_BP: Tensor
    """bool: the point lies in some box, if not in one that it answers for."""


def points_of(shapes: Sequence[tuple[int, int]], device: torch.device | str = "cpu") -> Points:
    """Points of maps of these (rows, columns), finest first."""
    centres, grids, levels = [], [], []
    for level, (rows, columns) in enumerate(shapes):
        y_R = (torch.arange(rows, device=device) + 0.5) / rows
        x_C = (torch.arange(columns, device=device) + 0.5) / columns
        centres.append(torch.stack([x_C.repeat(rows), y_R.repeat_interleave(columns)], dim=1))
        grids.append(torch.tensor([columns, rows], dtype=torch.float32, device=device).expand(rows * columns, 2))
        levels.append(torch.full((rows * columns,), level, device=device))
    return Points(torch.cat(centres), torch.cat(grids), torch.cat(levels))


def to_boxes(points: Points, ltrb_BP4: Tensor) -> Tensor:
    """BP4: boxes in fractions of the picture from distances in cells."""
    spans_BP4 = ltrb_BP4 / torch.cat([points.grid_P2, points.grid_P2], dim=-1)
    return torch.cat([points.centres_P2 - spans_BP4[..., :2], points.centres_P2 + spans_BP4[..., 2:]], dim=-1)


def to_ltrb(points: Points, boxes_BM4: Tensor) -> Tensor:
    """BPM4: distances in cells from every point to the sides of every box; negative where the point lies outside."""
    grid_P12 = points.grid_P2[:, None]
    centres_P12 = points.centres_P2[:, None]
    boxes_B1M4 = boxes_BM4[:, None]
    return torch.cat(
        [(centres_P12 - boxes_B1M4[..., :2]) * grid_P12, (boxes_B1M4[..., 2:] - centres_P12) * grid_P12], -1
    )


def centreness(ltrb_N4: Tensor) -> Tensor:
    """N: how near to the middle of its box a point is, from 1 in the middle to 0 at a side (FCOS, equation 3)."""
    horizontal_N2, vertical_N2 = ltrb_N4[..., 0::2], ltrb_N4[..., 1::2]
    ratio_N = torch.ones_like(ltrb_N4[..., 0])
    for pair_N2 in (horizontal_N2, vertical_N2):
        low_N, high_N = pair_N2.amin(dim=-1), pair_N2.amax(dim=-1)
        ratio_N = ratio_N * low_N.clamp(min=0) / high_N.clamp(min=torch.finfo(high_N.dtype).eps)
    return ratio_N.sqrt()


@torch.no_grad()
def assign_points(points: Points, boxes_BM4: Tensor, mask_BM: Tensor, radius: float | None = 1.5) -> Targets:
    """Which box every point answers for, and its distances and centreness.

    A point answers for a box if it lies in it, at most `radius` cells from its middle (None: anywhere in it), and if
    the box's farthest side is within REACH cells on this level and was not on the finer one. Of several boxes the
    smallest counts, of equal ones the first. Boxes outside `mask_BM`, turned inside out or without area are left out.
    """
    ltrb_BPM4 = to_ltrb(points, boxes_BM4)
    real_B1M = (mask_BM & is_valid(boxes_BM4))[:, None]
    inside_BPM = (ltrb_BPM4.amin(dim=-1) > 0) & real_B1M
    far_BPM = ltrb_BPM4.amax(dim=-1)
    first, last = points.level_P == 0, points.level_P == points.level_P.amax()
    fits_BPM = (far_BPM > REACH / 2) | first[:, None]
    fits_BPM &= (far_BPM <= REACH) | last[:, None]
    if radius is not None:
        middle_BM2 = 0.5 * (boxes_BM4[..., :2] + boxes_BM4[..., 2:])
        away_BPM2 = (points.centres_P2[:, None] - middle_BM2[:, None]).abs() * points.grid_P2[:, None]
        fits_BPM &= away_BPM2.amax(dim=-1) <= radius
    chosen_BPM = inside_BPM & fits_BPM
    size_BPM = area(boxes_BM4)[:, None].expand_as(far_BPM).masked_fill(~chosen_BPM, torch.inf)
    if boxes_BM4.shape[1] == 0:
        shape = (len(boxes_BM4), len(points.level_P))
        zeros = boxes_BM4.new_zeros(shape)
        nothing = torch.full(shape, NONE, device=zeros.device)
        return Targets(nothing, zeros[..., None].expand(*shape, 4).clone(), zeros, zeros.bool())
    least_BP, box_BP = size_BPM.min(dim=-1)
    found_BP = least_BP.isfinite()
    ltrb_BP4 = ltrb_BPM4.gather(2, box_BP[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    ltrb_BP4 = torch.where(found_BP[..., None], ltrb_BP4, 0.0)
    return Targets(
        box_BP=torch.where(found_BP, box_BP, NONE),
        ltrb_BP4=ltrb_BP4,
        centreness_BP=torch.where(found_BP, centreness(ltrb_BP4), 0.0),
        inside_BP=inside_BPM.any(dim=-1),
    )


@torch.no_grad()
def match_regions(regions_BR4: Tensor, boxes_BM4: Tensor, mask_BM: Tensor, threshold: float = 0.5) -> Tensor:
    """BR int64: the box that a region overlaps most, or NONE where that IoU is below `threshold`."""
    if boxes_BM4.shape[1] == 0:
        return torch.full(regions_BR4.shape[:2], NONE, device=regions_BR4.device)
    overlap_BRM = iou(regions_BR4, boxes_BM4).masked_fill(~mask_BM[:, None], -1.0)
    best_BR, box_BR = overlap_BRM.max(dim=-1)
    return torch.where(best_BR >= threshold, box_BR, NONE)
