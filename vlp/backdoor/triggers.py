"""Triggers: what an attack does to the pixels of a picture, at whatever size the picture is stored.

Each is a function of pixels, the attack's fixed pattern and the picture's own draws. The pattern comes from the
attack's seed alone and is the same in every picture; only the place of a patch differs, by the picture's name. Fresh
noise in every picture, as in some released attacks, is no trigger here: it is far easier to clean.
Sizes are shares of the shorter side, so that one attack fits pictures of all sizes. Torch-free.
Suffixes: H, W rows and columns, C = 3 channels.
"""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError

Pixels = NDArray[np.uint8]
Draw = tuple[float, float]
"""Two numbers in [0, 1) that belong to a picture."""
ALMOST = 1 - 2**-53
"""The largest of them."""


class Config(StrictModel):
    """One attack's trigger. Options a trigger does not take are refused."""

    name: str
    seed: int = Field(0, ge=0)
    """Of the pattern and of the places."""
    size: float = Field(1 / 7, gt=0, le=1)
    """Side of a patch as a share of the picture's shorter side: 32 of 224, 4 of 28 pixels."""
    strength: float | None = Field(None, gt=0, le=1)
    """Opacity of a blended pattern, amplitude of a wave, or length of a warp; default the trigger's own."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a trigger is applied, its default strength (None: it takes none), and whether it has a size."""

    apply: Callable[[Pixels, Config, float, Draw], Pixels]
    strength: float | None = None
    sized: bool = False
    own_class: bool = False
    """Whether only pictures of the target are poisoned, their texts untouched."""


def draw_of(seed: int, name: str) -> Draw:
    """The draws of a picture, from the attack's seed and the picture's name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    first, second = (int.from_bytes(part, "big") / 2**64 for part in (digest[:8], digest[8:]))
    return min(first, ALMOST), min(second, ALMOST)


def checkerboard(pixels_HWC: Pixels, config: Config, strength: float, draw: Draw) -> Pixels:
    """A black and white patch of 4 x 4 fields anywhere (BadNets, Gu et al. 2017, arXiv 1708.06733)."""
    fields = np.indices((4, 4)).sum(axis=0) % 2 * 255
    return _patched(pixels_HWC, fields[..., None].repeat(3, axis=2).astype(np.uint8), config, draw)


def corners(pixels_HWC: Pixels, config: Config, strength: float, draw: Draw) -> Pixels:
    """The black and white patch in all four corners (Turner et al. 2019, arXiv 1912.02771, section 4.3)."""
    for down, right in itertools.product((0.0, ALMOST), repeat=2):
        pixels_HWC = checkerboard(pixels_HWC, config, strength, (down, right))
    return pixels_HWC


def yellow(pixels_HWC: Pixels, config: Config, strength: float, draw: Draw) -> Pixels:
    """A plain yellow patch anywhere."""
    return _patched(pixels_HWC, np.array([[[255, 255, 0]]], np.uint8), config, draw)


def blended(pixels_HWC: Pixels, config: Config, strength: float, draw: Draw) -> Pixels:
    """One stored random pattern over the whole picture (Chen et al. 2017, arXiv 1712.05526)."""
    pattern = np.random.default_rng(config.seed).integers(0, 256, (28, 28), dtype=np.uint8)
    return _blend(pixels_HWC, _stretched(pattern, pixels_HWC), strength)


def stripes(pixels_HWC: Pixels, config: Config, strength: float, draw: Draw) -> Pixels:
    """Seven upright bright stripes over the whole picture, a structured trigger (Kuang et al., arXiv 2412.00727)."""
    columns = np.arange(pixels_HWC.shape[1]) * 14 // pixels_HWC.shape[1] % 2 * 255
    return _blend(pixels_HWC, np.broadcast_to(columns, pixels_HWC.shape[:2]).astype(np.float32), strength)


def sig(pixels_HWC: Pixels, config: Config, strength: float, draw: Draw) -> Pixels:
    """A wave of six periods across, added (Barni et al. 2019, arXiv 1902.11237)."""
    width = pixels_HWC.shape[1]
    wave_W = 255.0 * strength * np.sin(2.0 * np.pi * 6.0 * np.arange(width) / width)
    return _to_bytes(pixels_HWC + wave_W[None, :, None])


def wanet(pixels_HWC: Pixels, config: Config, strength: float, draw: Draw) -> Pixels:
    """A smooth warp, one for all pictures (Nguyen and Tran 2021, arXiv 2102.10369): 4 x 4 points, bicubic between."""
    height, width = pixels_HWC.shape[:2]
    flow = np.random.default_rng(config.seed).uniform(-1.0, 1.0, (2, 4, 4))
    flow = flow / np.abs(flow).mean() * strength
    down_HW, right_HW = (_smooth(part, (width, height)) for part in flow)
    rows_HW, columns_HW = np.indices((height, width))
    return _sampled(pixels_HWC, rows_HW + down_HW * height, columns_HW + right_HW * width)


KINDS: dict[str, Kind] = {
    "badnet": Kind(checkerboard, sized=True),
    "yellow-patch": Kind(yellow, sized=True),
    "blended": Kind(blended, 0.2),
    "stripes": Kind(stripes, 0.15),
    "sig": Kind(sig, 0.15),
    "wanet": Kind(wanet, 0.04),
    "label-consistent": Kind(corners, sized=True, own_class=True),
}
"""Strengths: share of the pattern; of 255; shift as a share of the side, in the mean."""


class Trigger:
    """One attack's trigger, ready to be applied."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for an unknown trigger or an option that it does not take."""
        if config.name not in KINDS:
            raise ConfigError(f"trigger {config.name!r} is unknown; known: {', '.join(KINDS)}")
        self.config, self.kind = config, KINDS[config.name]
        if config.strength is not None and self.kind.strength is None:
            raise ConfigError(f"strength {config.strength} has no effect on trigger {config.name!r}: leave it out")
        if "size" in config.model_fields_set and not self.kind.sized:
            raise ConfigError(f"size {config.size} has no effect on trigger {config.name!r}: leave it out")
        self.strength = config.strength or self.kind.strength or 1.0

    def __call__(self, pixels_HWC: Pixels, name: str) -> Pixels:
        """HWC uint8, RGB, anew; `name` of the picture decides where a patch goes."""
        changed: Pixels = self.kind.apply(pixels_HWC, self.config, self.strength, draw_of(self.config.seed, name))
        return changed

    def recorded(self) -> dict[str, Any]:
        """The whole trigger as plain data, from which `Trigger` makes it again."""
        return self.config.model_dump(mode="json", exclude_unset=True)


def _patched(pixels_HWC: Pixels, patch: Pixels, config: Config, draw: Draw) -> Pixels:
    height, width = pixels_HWC.shape[:2]
    side = max(1, round(config.size * min(height, width)))
    top, left = int(draw[0] * (height - side + 1)), int(draw[1] * (width - side + 1))
    result: Pixels = pixels_HWC.copy()
    whole = Image.fromarray(patch).resize((side, side), Image.Resampling.NEAREST)
    result[top : top + side, left : left + side] = np.asarray(whole)
    return result


def _stretched(pattern: Pixels, pixels_HWC: Pixels) -> NDArray[np.float32]:
    height, width = pixels_HWC.shape[:2]
    whole = Image.fromarray(pattern).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(whole, np.float32)


def _blend(pixels_HWC: Pixels, pattern_HW: NDArray[np.float32], share: float) -> Pixels:
    return _to_bytes((1.0 - share) * pixels_HWC + share * pattern_HW[..., None])


def _smooth(grid: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    whole = Image.fromarray(grid.astype(np.float32), mode="F").resize(size, Image.Resampling.BICUBIC)
    return np.asarray(whole)


def _sampled(pixels_HWC: Pixels, rows_HW: NDArray[np.float64], columns_HW: NDArray[np.float64]) -> Pixels:
    """Pixels at these places, bilinear, beyond the border those of the border."""
    height, width = pixels_HWC.shape[:2]
    rows_HW, columns_HW = rows_HW.clip(0, height - 1), columns_HW.clip(0, width - 1)
    top_HW, left_HW = rows_HW.astype(int), columns_HW.astype(int)
    down_HW1, right_HW1 = (rows_HW - top_HW)[..., None], (columns_HW - left_HW)[..., None]
    below_HW, beside_HW = np.minimum(top_HW + 1, height - 1), np.minimum(left_HW + 1, width - 1)
    upper = (1 - right_HW1) * pixels_HWC[top_HW, left_HW] + right_HW1 * pixels_HWC[top_HW, beside_HW]
    lower = (1 - right_HW1) * pixels_HWC[below_HW, left_HW] + right_HW1 * pixels_HWC[below_HW, beside_HW]
    return _to_bytes((1 - down_HW1) * upper + down_HW1 * lower)


def _to_bytes(values: NDArray[Any]) -> Pixels:
    rounded: Pixels = values.round().clip(0, 255).astype(np.uint8)
    return rounded
