"""Random textures and warps: changes of pictures that no camera makes, to learn not to mind them.

A texture is a grid of random values with rows and columns of its own number, smoothly enlarged and hardened by a random
contrast: dots, stripes, waves, blobs and plain areas are cases of it. It is laid over a picture at a random opacity, or
fills a rectangle. A warp moves the points of a coarse grid, and what lies between them smoothly (Simard et al. 2003).
Suffixes: B samples of this rank, C channels, H height, W width, G points across a texture.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GRID, BENDS = 28, 4
"""Most points across a texture; points across a warp."""
OPACITY = 0.4
"""Of the strongest texture over a whole picture."""
PATCH = (0.05, 0.25)
"""Smallest and largest side of a rectangle, as a share of the picture's."""
HARD = 8.0
"""Contrast of the hardest texture: nearly two values alone."""
COLUMNS = 13
"""Uniform numbers per sample, beside those of the grids."""


def drawn(generator: np.random.Generator, total: int, rows: Sequence[int], points: int) -> Tensor:
    """B x points uniform numbers: the rows of this rank out of those of the global batch."""
    return torch.from_numpy(generator.random((total, points), dtype=np.float32)[list(rows)])


def textured(
    pixels_BCHW: Tensor, overlay: float, patch: float, generator: np.random.Generator, total: int, rows: Sequence[int]
) -> Tensor:
    """Grey levels 0 to 255, float32, anew: textures over a share `overlay` of the pictures, inside `patch` of them."""
    draws, noise = drawn(generator, total, rows, COLUMNS), drawn(generator, total, rows, GRID * GRID)
    height, width = pixels_BCHW.shape[-2:]
    texture_BCHW = _texture(noise.view(-1, 1, GRID, GRID), draws, height, width)
    if pixels_BCHW.shape[1] == 3:
        texture_BCHW = _tinted(texture_BCHW, draws[:, 3:10])
    opacity = torch.where(draws[:, 10] < overlay, OPACITY * draws[:, 10] / max(overlay, 1e-6), 0.0).view(-1, 1, 1, 1)
    chosen = drawn(generator, total, rows, 4)
    inside_B1HW = _inside(chosen, patch, height, width) if patch else torch.zeros(len(rows), 1, 1, 1)
    share = torch.maximum(opacity, inside_B1HW)
    return pixels_BCHW + share * (255.0 * texture_BCHW - pixels_BCHW)


def bend(
    height: int, width: int, most: float, generator: np.random.Generator, total: int, rows: Sequence[int]
) -> Tensor:
    """BHW2: by how much to move places of -1 to 1 right and down: half of the pictures, by up to `most` in the mean."""
    draws = drawn(generator, total, rows, 1 + 2 * BENDS * BENDS)
    amount_B111 = 4.0 * most * (2.0 * draws[:, :1, None, None] - 1.0).clamp(min=0.0)  # a picture is 2 wide there
    points = amount_B111 * (2.0 * draws[:, 1:] - 1.0).view(-1, 2, BENDS, BENDS)
    return F.interpolate(points, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def _texture(noise_B1GG: Tensor, draws: Tensor, height: int, width: int) -> Tensor:
    """B1HW, 0 to 1."""
    count = GRID ** draws[:, :2]  # of points across and down that are seen
    x, y = ((torch.arange(n) + 0.5) / n for n in (width, height))
    across = (count[:, :1] * x + 0.5) * (2.0 / GRID) - 1.0
    down = (count[:, 1:2] * y + 0.5) * (2.0 / GRID) - 1.0
    grid = torch.stack(
        [across[:, None, :].expand(-1, height, -1), down[:, :, None].expand(-1, -1, width)], dim=3
    )  # fmt: skip
    smooth = F.grid_sample(noise_B1GG, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return ((smooth - 0.5) * (HARD ** draws[:, 2]).view(-1, 1, 1, 1) + 0.5).clamp_(0.0, 1.0)


def _tinted(texture_B1HW: Tensor, draws: Tensor) -> Tensor:
    """B3HW: between two colours, or black and white for one half of the pictures."""
    grey = draws[:, :1] < 0.5
    low, high = torch.where(grey, 0.0, draws[:, 1:4]), torch.where(grey, 1.0, draws[:, 4:7])
    return low[..., None, None] + (high - low)[..., None, None] * texture_B1HW


def _inside(draws: Tensor, probability: float, height: int, width: int) -> Tensor:
    """B1HW, 1 inside a rectangle."""
    least, most = PATCH
    size = torch.where(draws[:, 0] < probability, least + (most - least) * draws[:, 1], 0.0)
    masks = []
    for n, place in ((height, draws[:, 2]), (width, draws[:, 3])):
        at = (torch.arange(n) + 0.5) / n
        start = place * (1.0 - size)
        masks.append((at[None] >= start[:, None]) & (at[None] < (start + size)[:, None]))
    return (masks[0][:, :, None] & masks[1][:, None, :]).float()[:, None]
