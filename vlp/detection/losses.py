"""The three losses of detector fine-tuning, over the batch of all ranks.

Where and how large: IoU loss of the distances that points predict, weighted by centreness (FCOS, arXiv 1904.01355).
Whether anything: centreness as a soft target, with the quality focal loss (arXiv 2006.04388, equation 2), for nearly
all points lie outside of objects. What: softmax over class texts and a background. Suffixes: B pictures, P points, R
regions, N of any of these, D embedding width, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.detection.boxes import IouLoss, iou_loss
from vlp.detection.targets import Targets
from vlp.distributed import mean_over, world_size

IGNORED = -2
"""Class of a region that is neither a known class nor background."""
BACKGROUND = -1
"""Class of a region that is no object."""
LEAST = 1e-6


def share_out(total: Tensor, weight: Tensor) -> Tensor:
    """`total / weight`, both summed over the samples of all ranks; 0 where nothing has a weight.

    Every rank gets the same value; the gradients, averaged over the ranks, are those of one process.
    """
    own = total / (mean_over("local", weight.detach().clone()) * world_size()).clamp(min=LEAST) * world_size()
    return own + (mean_over("local", own.detach().clone()) - own.detach())


def side_loss(ltrb_BP4: Tensor, targets: Targets, kind: IouLoss) -> Tensor:
    """IoU loss of the points that answer for a box, weighted by their centreness; a scalar.

    Distances from one point are boxes around it, and the IoU does not depend on the unit, here cells.
    """
    found_BP = targets.box_BP >= 0
    around, wanted = (
        torch.cat([-sides_N4[:, :2], sides_N4[:, 2:]], dim=1)
        for sides_N4 in (ltrb_BP4[found_BP].float(), targets.ltrb_BP4[found_BP].float())
    )
    weight_N = targets.centreness_BP[found_BP].float()
    return share_out((iou_loss(around, wanted, kind) * weight_N).sum(), weight_N.sum())


def centre_loss(centre_BP: Tensor, targets: Targets, everywhere: bool, power: float = 2.0) -> Tensor:
    """Cross-entropy of centreness logits with the centreness, times |difference|^power; a scalar.

    Divided by the number of points that answer for a box. `everywhere`: points outside of all boxes are to say 0;
    otherwise they are left out, so that objects without a box are not unlearned (OLN, arXiv 2108.06753).
    """
    logits_BP, wanted_BP = centre_BP.float(), targets.centreness_BP.float()
    loss_BP = F.binary_cross_entropy_with_logits(logits_BP, wanted_BP, reduction="none")
    # |difference| has no gradient of its own where it is 0, which is what powers below 2 need
    loss_BP = loss_BP * (wanted_BP - logits_BP.sigmoid()).abs().clamp(min=LEAST).pow(power)
    if not everywhere:
        loss_BP = loss_BP * targets.inside_BP
    return share_out(loss_BP.sum(), (targets.box_BP >= 0).float().sum())


def class_logits(regions_BRD: Tensor, texts_KD: Tensor, background_D: Tensor, scale: Tensor) -> Tensor:
    """BR(K+1): scaled cosines with the classes' texts and, last, with the background; float32."""
    heads_KD = F.normalize(torch.cat([texts_KD.float(), background_D.float()[None]]), dim=-1)
    return scale.float() * (F.normalize(regions_BRD.float(), dim=-1) @ heads_KD.T)


def class_loss(logits_BRK: Tensor, classes_BR: Tensor, background_weight: float = 0.9) -> Tensor:
    """Weighted mean cross-entropy of regions; the last logit is the background's. A scalar.

    `classes_BR`: class numbers, BACKGROUND or IGNORED.
    """
    classes_N = classes_BR.flatten()
    background = logits_BRK.shape[-1] - 1
    weight_N = (classes_N != IGNORED).float().masked_fill(classes_N == BACKGROUND, background_weight)
    targets_N = torch.where(classes_N < 0, background, classes_N)
    loss_N = F.cross_entropy(logits_BRK.flatten(0, -2), targets_N, reduction="none")
    return share_out((loss_N * weight_N).sum(), weight_N.sum())
