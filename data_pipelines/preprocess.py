"""The one way from encoded picture to model input, used by training, evaluation and serving alike.

bytes --decode_rgb--> uint8 CHW of any size --fit--> uint8 CHW of the model's size --normalise--> float BCHW.
Batches stay uint8 until they reach the device: a quarter of the bytes to move.
Geometry is open_clip's (resize, then centre crop with the same rounding), so exported weights see the same pictures.
"""

from typing import Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample
from data_pipelines.images import MAX_PIXELS, flatten, open_checked, open_header

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageConfig(StrictModel):
    """How a picture becomes model input; travels inside the bundle."""

    size: int = 224
    """Side of the square input, pixels."""
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    """shortest: short side to `size`, then centre crop. longest: long side to `size`, then pad with `ground`."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    ground: int = 255
    """Grey level 0..255 on which transparent pictures are composed, and with which `longest` pads."""


def decode_rgb(data: bytes, config: ImageConfig, max_pixels: int = MAX_PIXELS) -> Tensor:
    """CHW uint8 picture from JPEG, PNG, WebP or GIF bytes. Raises BadSample with the reason."""
    header = open_header(data, max_pixels)
    if header.format == "JPEG" and header.mode in ("RGB", "L"):
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as error:
            raise BadSample("truncated_image", str(error)) from error
    else:
        ground = (config.ground,) * 3
        pixels = np.asarray(flatten(open_checked(data, max_pixels), ground))
    return torch.from_numpy(np.array(pixels, copy=True) if not pixels.flags.writeable else pixels).permute(2, 0, 1)


def fit(image_CHW: Tensor, config: ImageConfig) -> Tensor:
    """Resize and crop or pad a uint8 CHW picture to C x size x size."""
    _, height, width = image_CHW.shape
    target = config.size
    if config.resize == "squash":
        new_height = new_width = target
    else:
        side = min(height, width) if config.resize == "shortest" else max(height, width)
        # torchvision truncates the long side of `shortest`; open_clip rounds both sides of `longest`
        rounding = int if config.resize == "shortest" else round
        new_height, new_width = (max(1, rounding(target * length / side)) for length in (height, width))
    if (new_height, new_width) != (height, width):
        resized = F.interpolate(
            image_CHW[None], (new_height, new_width), mode=config.interpolation, antialias=True, align_corners=False
        )
        image_CHW = resized[0]
    return _centre(image_CHW, target, config.ground)


def _centre(image_CHW: Tensor, target: int, ground: int) -> Tensor:
    """Centre crop or pad to target x target, with torchvision's rounding of odd margins."""
    _, height, width = image_CHW.shape
    if height < target or width < target:
        extra_h, extra_w = max(target - height, 0), max(target - width, 0)
        margins = (extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2)
        image_CHW = F.pad(image_CHW, margins, value=ground)
        _, height, width = image_CHW.shape
    top, left = round((height - target) / 2.0), round((width - target) / 2.0)
    return image_CHW[:, top : top + target, left : left + target]


def load_image(data: bytes, config: ImageConfig, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Encoded bytes to uint8 C x size x size."""
    return fit(decode_rgb(data, config, max_pixels), config)


def normalise(pixels_BCHW: Tensor, config: ImageConfig) -> Tensor:
    """uint8 BCHW to float32 BCHW with the model's mean and std; runs on the tensor's device."""
    mean = torch.tensor(config.mean, device=pixels_BCHW.device).mul_(255).view(1, -1, 1, 1)
    scale = torch.tensor(config.std, device=pixels_BCHW.device).mul_(255).reciprocal_().view(1, -1, 1, 1)
    return (pixels_BCHW.float() - mean) * scale
