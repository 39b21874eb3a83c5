"""Heads on a pyramid: what a region is, and where objects are.

The region head is the box head of Faster R-CNN (Ren et al. 2015, arXiv 1506.01497, with convolutions as in He et al.
2017, arXiv 1703.06870) that ends in the shared space of pictures and texts. The dense head finds objects of any class:
one point for each place, its centreness and its distances to the box's sides (FCOS, Tian et al. 2019, arXiv
1904.01355). Suffixes: B pictures, M boxes, C channels, S bins a side, D embedding width, H rows and W columns of a map.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlp.detection.maps import as_type
from vlp.detection.pyramid import conv_norm

MOST_PLACES = 1000.0
"""Longest distance of a side, in places."""
RARE = 0.01
"""Centreness that an untrained dense head gives every point: nearly all lie outside of objects."""


class RegionHead(nn.Module):
    """Pooled regions to embeddings."""

    def __init__(self, width: int, size: int, embed: int, convs: int, hidden: int) -> None:
        """`width`: C. `size`: S. `embed`: D. `convs`: convolutions before the hidden layer."""
        super().__init__()
        layers = [nn.Sequential(conv_norm(width, width, 3), nn.ReLU()) for _ in range(convs)]
        self.convs = nn.Sequential(*layers)
        self.hidden = nn.Linear(width * size * size, hidden)
        self.out = nn.Linear(hidden, embed)

    def forward(self, rois_BMCSS: Tensor) -> Tensor:
        """BMD, not normalised."""
        flat = as_type(rois_BMCSS.flatten(0, 1), self.hidden.weight)
        found = self.out(torch.relu(self.hidden(self.convs(flat).flatten(1))))
        found_BMD: Tensor = found.unflatten(0, rois_BMCSS.shape[:2])
        return found_BMD


class DenseHead(nn.Module):
    """Maps of a pyramid to one box and its centreness for every place; the weights are shared by all levels."""

    def __init__(self, width: int, convs: int, levels: int) -> None:
        """`width`: C. `levels`: maps that it will be given."""
        super().__init__()
        self.tower = nn.Sequential(*(nn.Sequential(conv_norm(width, width, 3), nn.ReLU()) for _ in range(convs)))
        self.centre = nn.Conv2d(width, 1, 1)
        self.sides = nn.Conv2d(width, 4, 1)
        self.scales = nn.Parameter(torch.ones(levels))
        """One for each level: objects of one size in pixels are of other sizes in places."""
        nn.init.normal_(self.centre.weight, std=0.01)
        nn.init.normal_(self.sides.weight, std=0.01)
        nn.init.constant_(self.centre.bias, math.log(RARE / (1 - RARE)))  # type: ignore[arg-type]
        nn.init.ones_(self.sides.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per level (centreness as logits, BHW; distances to left, top, right, bottom side in places, B4HW, positive).

        The point of row y and column x lies at ((x + 0.5) / W, (y + 0.5) / H) of the picture; float32.
        """
        found = []
        for map_BCHW, scale in zip(maps, self.scales, strict=True):
            features_BCHW = self.tower(as_type(map_BCHW, self.centre.weight))
            sides_B4HW = (self.sides(features_BCHW).float() * scale).clamp(max=math.log(MOST_PLACES)).exp()
            found.append((self.centre(features_BCHW)[:, 0].float(), sides_B4HW))
        return found
