"""From what a dense head says at every point to the boxes most likely to hold something, of whatever class.

Suffixes: B pictures, H rows and W columns of a level, P points of all levels, K proposals.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.detection.boxes import clip, is_valid, nms_batch
from vlp.detection.targets import Points, points_of, to_boxes

OVERLAP = 0.7
"""IoU above which of two proposals the worse one goes, as in Faster R-CNN."""
BEFORE = 1000
"""Points with the highest centreness of which boxes are made."""


def join_levels(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Points, Tensor, Tensor]:
    """Points of all levels, their centreness BP (logits) and their distances BP4 in cells, from BHW and B4HW each."""
    points = points_of([(centre.shape[1], centre.shape[2]) for centre, _ in found], found[0][0].device)
    centre_BP = torch.cat([centre_BHW.flatten(1) for centre_BHW, _ in found], dim=1)
    ltrb_BP4 = torch.cat([sides_B4HW.flatten(2).transpose(1, 2) for _, sides_B4HW in found], dim=1)
    return points, centre_BP, ltrb_BP4


@torch.no_grad()
def propose(
    points: Points, centre_BP: Tensor, ltrb_BP4: Tensor, keep: int, before: int = BEFORE, overlap: float = OVERLAP
) -> tuple[Tensor, Tensor, Tensor]:
    """(boxes BK4 as fractions of the picture, their centreness BK 0..1, whether there is such a box BK), best first.

    K = `keep` always; places that no box fills hold the whole picture and 0.
    """
    best_BN, index_BN = centre_BP.float().sigmoid().topk(min(before, centre_BP.shape[1]), dim=1)
    ltrb_BN4 = ltrb_BP4.float().gather(1, index_BN[..., None].expand(-1, -1, 4))
    chosen = Points(points.centres_P2[index_BN], points.grid_P2[index_BN], points.level_P[index_BN])
    boxes_BN4 = clip(to_boxes(chosen, ltrb_BN4))
    valid_BN = is_valid(boxes_BN4) & best_BN.isfinite()
    place_BK, valid_BK = nms_batch(boxes_BN4, best_BN, overlap, valid_BN=valid_BN, keep=keep)
    boxes_BK4 = boxes_BN4.gather(1, place_BK[..., None].expand(-1, -1, 4))
    score_BK = best_BN.gather(1, place_BK)
    missing = (0, keep - valid_BK.shape[1])
    valid_BK = F.pad(valid_BK, missing)
    boxes_BK4 = F.pad(boxes_BK4, (0, 0, *missing))
    whole_4 = torch.tensor([0.0, 0.0, 1.0, 1.0], device=boxes_BK4.device)
    score_BK = F.pad(score_BK, missing)
    return torch.where(valid_BK[..., None], boxes_BK4, whole_4), score_BK * valid_BK, valid_BK
