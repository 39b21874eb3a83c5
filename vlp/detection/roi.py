"""RoIAlign in plain torch (He et al. 2017, arXiv 1703.06870), equal to torchvision's with aligned=True.

The value of a bin is a weighted sum over the map's places, the same for all channels. On small maps the weights of all
bins are written out and applied as one matrix product; on large ones, where most of them would be zeros, the samples
are read one by one. Differentiable in maps and boxes. Suffixes: B images, M boxes, C channels, H rows and W columns of
a map, S bins a side, N samples a side (all bins), P places of a map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_PLACES = 1024
"""Places of a map up to which the weights are written out: there the product is two to ten times as fast on CPUs."""


def roi_align(map_BCHW: Tensor, boxes_BM4: Tensor, size: int = 7, samples: int = 2) -> Tensor:
    """BMCSS: every box cut out of the map of its own picture, `size` bins a side.

    Boxes are xyxy as fractions 0..1 of the picture; what lies over half a place beyond the map counts zero. `samples`:
    a side, for each bin. A box of no extent reads its point `size` x `size` times; one turned round is read backwards.
    """
    places = map_BCHW.shape[2] * map_BCHW.shape[3]
    if places > DENSE_PLACES and boxes_BM4.numel():
        return _by_samples(map_BCHW, boxes_BM4, size, samples)
    rows_BMSH, columns_BMSW = _both_weights(map_BCHW, boxes_BM4, size, samples)
    weights_BMSSP = (rows_BMSH[:, :, :, None, :, None] * columns_BMSW[:, :, None, :, None, :]).flatten(4)
    found: Tensor = _apply(weights_BMSSP.flatten(1, 3), map_BCHW).unflatten(1, weights_BMSSP.shape[1:4])
    return found.permute(0, 1, 4, 2, 3)


def roi_mean(map_BCHW: Tensor, boxes_BM4: Tensor, size: int = 14, samples: int = 2) -> Tensor:
    """BMC: the mean over all bins of `roi_align`, without computing the bins."""
    rows_BMSH, columns_BMSW = _both_weights(map_BCHW, boxes_BM4, size, samples)
    weights_BMP = (rows_BMSH.mean(2)[..., None] * columns_BMSW.mean(2)[..., None, :]).flatten(2)
    return _apply(weights_BMP, map_BCHW)


def _apply(weights_BRP: Tensor, map_BCHW: Tensor) -> Tensor:
    """B x rows x C: weighted sums over the places of each map."""
    return weights_BRP.to(map_BCHW.dtype) @ map_BCHW.flatten(2).transpose(1, 2)


def _both_weights(map_BCHW: Tensor, boxes_BM4: Tensor, size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Weights of rows, BMSH, and of columns, BMSW; float32."""
    height, width = map_BCHW.shape[2:]
    boxes_BM4 = boxes_BM4.float()
    rows_BMSH = _weights(boxes_BM4[..., 1], boxes_BM4[..., 3], height, size, samples)
    return rows_BMSH, _weights(boxes_BM4[..., 0], boxes_BM4[..., 2], width, size, samples)


def _weights(start_BM: Tensor, end_BM: Tensor, length: int, size: int, samples: int) -> Tensor:
    """BMS x length: how much each place along one side of the map counts in each bin."""
    points_BMN = _points(start_BM, end_BM, size * samples) * length - 0.5
    inside_BMN = (points_BMN >= -1) & (points_BMN <= length)
    places = torch.arange(length, device=start_BM.device)
    distance = (points_BMN.clamp(0, length - 1)[..., None] - places).abs()
    weights = (1 - distance).clamp(min=0) * inside_BMN[..., None]
    binned_BMSL: Tensor = weights.unflatten(2, (size, samples)).mean(3)
    return binned_BMSL


def _points(start_BM: Tensor, end_BM: Tensor, count: int) -> Tensor:
    """BMN: fractions of the picture's side at which a box is sampled."""
    at_N = (torch.arange(count, device=start_BM.device) + 0.5) / count
    return start_BM[..., None] + (end_BM - start_BM)[..., None] * at_N


def _by_samples(map_BCHW: Tensor, boxes_BM4: Tensor, size: int, samples: int) -> Tensor:
    height, width = map_BCHW.shape[2:]
    boxes_BM4, count = boxes_BM4.float(), size * samples
    x_BMN = _points(boxes_BM4[..., 0], boxes_BM4[..., 2], count)[:, :, None].expand(-1, -1, count, -1)
    y_BMN = _points(boxes_BM4[..., 1], boxes_BM4[..., 3], count)[..., None].expand(-1, -1, -1, count)
    # without align_corners a fraction f of the picture is the place 2 f - 1, whatever the size of the map
    places = 2 * torch.stack([x_BMN, y_BMN], dim=-1) - 1
    read = F.grid_sample(map_BCHW.float(), places.flatten(1, 2), padding_mode="border", align_corners=False)
    margin_x, margin_y = 0.5 / width, 0.5 / height  # from half a place beyond the map on there is nothing
    inside = (x_BMN >= -margin_x) & (x_BMN <= 1 + margin_x) & (y_BMN >= -margin_y) & (y_BMN <= 1 + margin_y)
    read = read * inside.flatten(1, 2)[:, None]
    pooled: Tensor = F.avg_pool2d(read, samples).unflatten(2, (boxes_BM4.shape[1], size))
    return pooled.transpose(1, 2).to(map_BCHW.dtype)
