"""Picture augmentation of a whole batch at once, from random numbers drawn for the global batch.

Every sample's parameters come from its row of one table of uniform numbers, so ranks and threads cannot change them.
All strengths default to 0: such an operation is skipped and draws nothing that another one sees.
Suffixes: B samples of this rank, C channels, H height, W width.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from data_pipelines.preprocess import ImageConfig
from data_pipelines.textures import bend, textured

COLUMNS, MORE = 16, 6
"""Uniform numbers per sample, and those that crops and blurs take besides."""
RATIO = 4 / 3
"""Largest width over height of a crop, and its inverse the smallest."""
BLUR = (0.1 / 224, 2.0 / 224)
"""Smallest and largest radius of a blur (one standard deviation), as a share of the side."""
SOLID = 32.0
"""Distance from the ground colour, in grey levels, from which on a pixel belongs wholly to the drawing."""


class AugmentConfig(StrictModel):
    """Strength of each operation; 0 = off."""

    flip: float = 0.0
    """Probability of a horizontal mirror image."""
    rotate: float = 0.0
    """Largest rotation, degrees."""
    scale: float = 0.0
    """Scale factor is drawn log-uniformly from exp(-scale) to exp(scale)."""
    shift: float = 0.0
    """Largest shift, as a share of the side."""
    shear: float = 0.0
    """Largest shear, degrees."""
    aspect: float = 0.0
    """Width over height changes by a factor from exp(-2 aspect) to exp(2 aspect), area kept."""
    brightness: float = 0.0
    """Largest offset, as a share of the grey scale."""
    contrast: float = 0.0
    """Factor around mid-grey, log-uniform from exp(-contrast) to exp(contrast)."""
    saturation: float = 0.0
    """Factor around the grey picture, log-uniform from exp(-1.5 saturation) to exp(saturation)."""
    hue: float = 0.0
    """Largest rotation of the colours around the grey axis, as a share of a full turn."""
    grey: float = 0.0
    """Probability of a grey picture."""
    erase: float = 0.0
    """Probability of a rectangle of 10 to 33 % of each side painted with the ground colour."""
    crop: float = Field(0.0, ge=0, le=1)
    """Smallest share of the area that a random crop keeps, enlarged to full size; 0 = no crop."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    overlay: float = Field(0.0, ge=0, le=1)
    """Probability of a random texture over the whole picture, see `textures`."""
    patch: float = Field(0.0, ge=0, le=1)
    """Probability of a rectangle of 5 to 25 % of each side filled with a random texture."""
    warp: float = Field(0.0, ge=0, le=0.25)
    """Largest mean shift of pixels by a smooth warp, as a share of the side."""
    ground: int = 255
    """Value that fills what an affine transform uncovers, and erased rectangles."""

    @property
    def geometric(self) -> bool:
        """Whether pixels move."""
        return any((self.flip, self.rotate, self.scale, self.shift, self.shear, self.aspect, self.crop, self.warp))

    @property
    def colour(self) -> bool:
        """Whether colours change."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.grey))

    @property
    def textures(self) -> bool:
        """Whether something is painted on the picture."""
        return any((self.overlay, self.patch))

    def check(self, image: ImageConfig, setting: str = "data.augment") -> None:
        """Raise ConfigError for operations that these pictures do not have: colours need RGB of 0..255."""
        if (self.colour or self.textures) and (image.channels != 3 or image.values != "uint8"):
            asked = [
                name
                for name in ("brightness", "contrast", "saturation", "hue", "grey", "overlay", "patch")
                if getattr(self, name)
            ]
            raise ConfigError(
                f"{setting}.{asked[0]}={getattr(self, asked[0])} needs RGB pictures of uint8, but data.image has "
                f"channels={image.channels}, values={image.values}: leave out {', '.join(asked)}"
            )


def augment(
    pixels_BCHW: Tensor,
    config: AugmentConfig,
    generator: np.random.Generator,
    total: int,
    rows: Sequence[int],
    side: int | None = None,
) -> Tensor:
    """BCHW uint8 or float32 in, the same out. `rows` are the samples' positions among the `total` of the global batch.

    `side`: smaller height and width of the result; taken first, so that small pictures cost little.
    """
    return traced(pixels_BCHW, config, generator, total, rows, side)[0]


def traced(
    pixels_BCHW: Tensor,
    config: AugmentConfig,
    generator: np.random.Generator,
    total: int,
    rows: Sequence[int],
    side: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `augment`, and where pixels moved to: B23 matrices from places of the result to places of the input.

    Places are from -1 to 1 (the outer edges) across and down; None: nothing moved.
    """
    side = side or pixels_BCHW.shape[-1]
    idle = not (config.geometric or config.colour or config.erase or config.blur or config.textures)
    if idle and side == pixels_BCHW.shape[-1]:
        return pixels_BCHW, None
    draws = torch.from_numpy(generator.random((total, COLUMNS), dtype=np.float32)[list(rows)])
    more = torch.empty(len(draws), MORE)
    if config.crop or config.blur:
        more = torch.from_numpy(generator.random((total, MORE), dtype=np.float32)[list(rows)])
    if side < pixels_BCHW.shape[-1]:
        pixels_BCHW = F.interpolate(pixels_BCHW, (side, side), mode="bilinear", antialias=True)
    # distance from the ground colour: whatever lies outside the picture is then zero
    picture = config.ground - pixels_BCHW.float()
    matrix_B23 = None
    if config.geometric:
        matrix_B23 = _matrix(config, draws[:, :7], _window(config.crop, more[:, :4]))
        height, width = picture.shape[-2:]
        bent = bend(height, width, config.warp, generator, total, rows) if config.warp else None
        picture = _affine(picture, matrix_B23, bent)
    if config.colour:
        picture = _colour(picture, config, draws[:, 7:12])
    if config.blur:
        picture = _blurred(picture, config.blur, more[:, 4:])
    if config.erase:
        picture = picture * _kept(draws[:, 12:16], config.erase, picture.shape[-2:])
    result = config.ground - picture
    if config.textures:
        result = textured(result, config.overlay, config.patch, generator, total, rows)
    result = result if pixels_BCHW.is_floating_point() else result.round_().clamp_(0, 255).to(torch.uint8)
    return result, matrix_B23


def _window(crop: float, draws: Tensor) -> Tensor:
    """B4: half width, half height and centre of the part that is kept, in the coordinates -1 to 1 of the whole."""
    if not crop:
        return torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(len(draws), 4)
    area = crop + (1 - crop) * draws[:, 0]
    ratio = RATIO ** (2 * draws[:, 1] - 1)
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1.0)
    return torch.cat([sides, (2 * draws[:, 2:] - 1) * (1 - sides)], dim=1)


def _matrix(config: AugmentConfig, draws: Tensor, window: Tensor) -> Tensor:
    """B23, see `traced`."""
    signed = draws * 2 - 1
    angle = signed[:, 1] * math.radians(config.rotate)
    zoom = torch.exp(-signed[:, 2] * config.scale)
    shear = torch.tan(signed[:, 3] * math.radians(config.shear))
    mirror = torch.where(draws[:, 0] < config.flip, -1.0, 1.0)
    stretch = torch.exp(signed[:, 6] * config.aspect)
    cos, sin = torch.cos(angle), torch.sin(angle)
    across, down = mirror * zoom / stretch, zoom * stretch
    rows = (
        torch.stack([cos * across, cos * shear - sin * down, 2 * config.shift * signed[:, 4]], dim=1),
        torch.stack([sin * across, sin * shear + cos * down, 2 * config.shift * signed[:, 5]], dim=1),
    )
    matrix = torch.stack(rows, dim=1)
    if config.crop:  # first the window out of the picture, then the rest of the transform
        moved = matrix[:, :, :2] @ window[:, 2:, None] + matrix[:, :, 2:]
        matrix = torch.cat([matrix[:, :, :2] * window[:, None, :2], moved], dim=2)
    return matrix


def _affine(picture_BCHW: Tensor, matrix: Tensor, bent_BHW2: Tensor | None) -> Tensor:
    # F.affine_grid would do, at three times the cost
    height, width = picture_BCHW.shape[-2:]
    y, x = (torch.linspace(1 / n - 1, 1 - 1 / n, n) for n in (height, width))
    places = torch.stack([x.repeat(height), y.repeat_interleave(width), torch.ones(height * width)])
    grid = (matrix @ places).view(-1, 2, height, width).permute(0, 2, 3, 1)
    grid = grid if bent_BHW2 is None else grid + bent_BHW2
    return F.grid_sample(picture_BCHW, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _colour(below_BCHW: Tensor, config: AugmentConfig, draws: Tensor) -> Tensor:
    """Colours of the drawing change, the ground stays: what differs from it counts as drawing.

    In and out: distance from the ground colour.
    """
    signed = draws * 2 - 1
    ceiling = (below_BCHW.abs().amax(dim=1, keepdim=True) * (255 / SOLID)).clamp_(max=255)
    contrast = torch.exp(signed[:, 0] * config.contrast)
    saturation = torch.exp(draws[:, 2] * 2.5 * config.saturation - 1.5 * config.saturation)
    saturation = torch.where(draws[:, 4] < config.grey, 0.0, saturation)
    mix = _hue_matrix(signed[:, 3] * (2 * math.pi * config.hue)) @ _saturation_matrix(saturation)
    mix = mix * contrast.view(-1, 1, 1)
    # the drawing is ceiling - below; as the rows of `mix` sum to the contrast, both terms fit into one product
    share = contrast * (config.ground / 255) + 0.5 * (1 - contrast) + signed[:, 1] * config.brightness
    mix = torch.cat([-mix, share.view(-1, 1, 1).expand(-1, 3, 1)], dim=2)
    drawing = (mix @ torch.cat([below_BCHW, ceiling], dim=1).flatten(2)).view_as(below_BCHW)
    drawing = drawing.clamp_(min=0).minimum(ceiling)
    return torch.sub(ceiling * (config.ground / 255), drawing, out=drawing)


def _blurred(picture_BCHW: Tensor, probability: float, draws: Tensor) -> Tensor:
    """Each picture smoothed by a Gaussian of its own, or left alone."""
    chosen = (draws[:, 0] < probability).nonzero()[:, 0]
    if not len(chosen):
        return picture_BCHW
    channels, height, width = picture_BCHW.shape[1:]
    sigma_B = max(height, width) * (BLUR[0] + (BLUR[1] - BLUR[0]) * draws[chosen, 1])
    reach = max(1, math.ceil(3 * max(height, width) * BLUR[1]))
    kernel_BK = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma_B[:, None]) ** 2)
    kernel_BK = (kernel_BK / kernel_BK.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = F.pad(picture_BCHW[chosen].reshape(1, -1, height, width), (reach,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel_BK[:, None, :, None], groups=len(kernel_BK))
    flat = F.conv2d(flat, kernel_BK[:, None, None, :], groups=len(kernel_BK))
    return picture_BCHW.index_copy(0, chosen, flat.view(-1, channels, height, width))


def _saturation_matrix(factor_B: Tensor) -> Tensor:
    """Moves colours towards (0) or away from (above 1) their luma."""
    luma = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    factor = factor_B.view(-1, 1, 1)
    return factor * torch.eye(3) + (1 - factor) * luma


def _hue_matrix(turn_B: Tensor) -> Tensor:
    """Rotation by `turn` around the grey axis (1, 1, 1) of RGB space (Rodrigues' formula)."""
    cos, sin = torch.cos(turn_B).view(-1, 1, 1), torch.sin(turn_B).view(-1, 1, 1)
    axis = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return cos * torch.eye(3) + sin * axis + (1 - cos) * torch.full((3, 3), 1 / 3)


def _kept(draws: Tensor, probability: float, side: torch.Size) -> Tensor:
    """B1HW mask, 0 inside an erased rectangle."""
    height, width = side
    size = 0.10 + 0.23 * draws[:, 1]
    size = torch.where(draws[:, 0] < probability, size, 0.0)
    top, left = draws[:, 2] * (1 - size), draws[:, 3] * (1 - size)
    y, x = torch.arange(height) / height, torch.arange(width) / width
    inside_y = (y[None] >= top[:, None]) & (y[None] < (top + size)[:, None])
    inside_x = (x[None] >= left[:, None]) & (x[None] < (left + size)[:, None])
    return (~(inside_y[:, :, None] & inside_x[:, None, :])).float()[:, None]
