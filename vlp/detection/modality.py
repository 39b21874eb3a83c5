"""Other renderings of a picture, made on the fly: what a student sees in place of colours.

They stand for a second sensor: the same scene, its places and its outlines, without what the colours say. A rendering
is made of what a network takes and is what a network takes, so that every step and every evaluation can ask for it.
Suffixes: B pictures, C channels, H rows, W columns.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.preprocess import ImageConfig

Modality = Literal["rgb", "grey", "edges"]
"""rgb: the picture itself. grey: its luma in every channel. edges: how steep the luma is, by Sobel."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue (ITU-R BT.601); pictures of other bands are averaged."""
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
STEEPEST = 4.0
"""Its answer to a straight step from 0 to 1, which becomes 1; corners reach a little more and are cut."""


def render(pixels_BCHW: Tensor, modality: Modality, image: ImageConfig | None) -> Tensor:
    """Network input to network input of the same shape, type and memory layout. `image`: what normalised it."""
    if modality == "rgb":
        return pixels_BCHW
    channels = pixels_BCHW.shape[1]
    mean, deviation = (image.mean, image.std) if image is not None else ((0.0,) * channels, (1.0,) * channels)
    mean_1C11, deviation_1C11 = (
        torch.tensor(v, device=pixels_BCHW.device).view(1, -1, 1, 1) for v in (mean, deviation)
    )
    unit_BCHW = pixels_BCHW.float() * deviation_1C11 + mean_1C11
    shares = LUMA if channels == len(LUMA) else (1.0 / channels,) * channels
    grey_B1HW = (unit_BCHW * unit_BCHW.new_tensor(shares).view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
    drawn_B1HW = edges(grey_B1HW) if modality == "edges" else grey_B1HW
    return torch.empty_like(pixels_BCHW).copy_((drawn_B1HW - mean_1C11) / deviation_1C11)


def edges(grey_B1HW: Tensor) -> Tensor:
    """B1HW from 0 (even) to 1 (a straight step over the whole range), for values from 0 to 1."""
    across = grey_B1HW.new_tensor(SOBEL)
    kernels_2133 = torch.stack([across, across.T])[:, None]
    slopes_B2HW = F.conv2d(F.pad(grey_B1HW, (1, 1, 1, 1), mode="replicate"), kernels_2133)
    return slopes_B2HW.square().sum(dim=1, keepdim=True).sqrt().div_(STEEPEST).clamp_(max=1.0)
