"""Where a picture comes to lie in the model's input, for pixels (preprocess.fit) and boxes alike.

Torch-free. Coordinates are continuous: a picture of W pixels spans 0..W, its first pixel 0..1. Suffixes: N boxes, 4 the
sides x0, y0, x1, y1.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from data_pipelines.preprocess import ImageConfig


@dataclass(frozen=True, slots=True)
class Placement:
    """x in the input = x in the picture * scale_x - left, both in pixels; y alike."""

    scale_x: float
    scale_y: float
    left: int
    """Negative where the input shows ground beside the picture."""
    top: int
    side: int
    """Width and height of the input."""

    def to_input(self, boxes_N4: Any) -> NDArray[np.float64]:
        """Boxes in pixels of the upright picture -> fractions of the input; what lies outside is not cut off."""
        boxes_N4 = np.asarray(boxes_N4, np.float64).reshape(-1, 4)
        found: NDArray[np.float64] = (boxes_N4 * self._scale - self._shift) / self.side
        return found

    def to_original(self, boxes_N4: Any) -> NDArray[np.float64]:
        """The reverse: fractions of the input -> pixels of the upright picture; not cut off either."""
        boxes_N4 = np.asarray(boxes_N4, np.float64).reshape(-1, 4)
        found: NDArray[np.float64] = (boxes_N4 * self.side + self._shift) / self._scale
        return found

    @property
    def _scale(self) -> NDArray[np.float64]:
        return np.array([self.scale_x, self.scale_y, self.scale_x, self.scale_y])

    @property
    def _shift(self) -> NDArray[np.float64]:
        return np.array([self.left, self.top, self.left, self.top], np.float64)


def placement(full_size: tuple[int, int], config: "ImageConfig") -> Placement:
    """What `preprocess.fit` does to a picture of this (height, width)."""
    height, width = full_size
    new_height, new_width = resized(height, width, config)
    left, top = margin(new_width, config.size), margin(new_height, config.size)
    return Placement(new_width / width, new_height / height, left, top, config.size)


def resized(height: int, width: int, config: "ImageConfig") -> tuple[int, int]:
    """Height and width that a picture of this size gets before the crop."""
    target = config.size
    if config.resize == "squash":
        return target, target
    side = min(height, width) if config.resize == "shortest" else max(height, width)
    # torchvision truncates the long side of `shortest`; open_clip rounds both sides of `longest`
    rounding = int if config.resize == "shortest" else round
    return max(1, rounding(target * height / side)), max(1, rounding(target * width / side))


def margin(length: int, target: int) -> int:
    """Pixels cut off at the start to keep the middle `target` of `length`; negative: added. torchvision rounds so."""
    return round((length - target) / 2.0) if length >= target else -((target - length) // 2)
