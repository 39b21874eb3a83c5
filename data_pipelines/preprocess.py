"""The one way from encoded picture to model input, used by training, evaluation and serving alike.

bytes --decode_rgb--> uint8 CHW of any size --fit--> uint8 CHW of the model's size --normalise--> float BCHW.
Batches stay uint8 until they reach the device: a quarter of the bytes to move.
Geometry is open_clip's (resize, then centre crop with the same rounding), so exported weights see the same pictures.
JPEG goes through libjpeg-turbo, which refuses damaged data that Pillow would fill with grey, everything else through
Pillow. Interleaved memory (strides of HWC) is kept up to the crop: torch resizes it in one pass without a copy.
"""

from typing import Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample
from data_pipelines.images import (
    MAX_PIXELS,
    check_size,
    flatten,
    halvings,
    has_exif,
    open_checked,
    open_header,
    orientation,
    upright,
)

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
TURNS = {
    1: (False, ()), 2: (False, (2,)), 3: (False, (1, 2)), 4: (False, (1,)),
    5: (True, ()), 6: (True, (2,)), 7: (True, (1, 2)), 8: (True, (1,)),
}  # fmt: skip
"""EXIF orientation -> whether rows and columns change places, and which dimensions of CHW are then mirrored."""


class ImageConfig(StrictModel):
    """How a picture becomes model input; travels inside the bundle."""

    size: int = 224
    """Side of the square input, pixels."""
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    """shortest: short side to `size`, then centre crop. longest: long side to `size`, then pad with `ground`."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    scaled_decode: bool = False
    """Decode JPEGs of twice the wanted size or more at a half, quarter or eighth: faster, about 42 dB away."""
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    ground: int = 255
    """Grey level 0..255 on which transparent pictures are composed, and with which `longest` pads."""


def decode_rgb(data: bytes, config: ImageConfig, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, tuple[int, int]]:
    """Upright CHW uint8 picture from JPEG, PNG, WebP or GIF (first frame) bytes, and its full height and width.

    They differ with `config.scaled_decode` alone, which may give a smaller picture, never below what `fit` makes of it.
    Raises BadSample with the reason.
    """
    decoded = _decode_jpeg(data, config, max_pixels) if data[:2] == b"\xff\xd8" else None
    if decoded is None:
        image = flatten(upright(open_checked(data, max_pixels)), (config.ground,) * 3)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), (image.height, image.width)
    pixels, (height, width) = decoded
    image_CHW = torch.from_numpy(pixels).permute(2, 0, 1)
    swap, mirrored = TURNS[orientation(open_header(data, max_pixels)) if has_exif(data) else 1]
    if swap:
        image_CHW, height, width = image_CHW.transpose(1, 2), width, height
    return (image_CHW.flip(mirrored) if mirrored else image_CHW), (height, width)


def _decode_jpeg(data: bytes, config: ImageConfig, max_pixels: int) -> tuple[NDArray[np.uint8], tuple[int, int]] | None:
    """HWC pixels of a JPEG as stored and its full size; None where Pillow has to do it: CMYK, or an unclear header."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None  # damaged, and Pillow says how, or of a kind that only Pillow knows
    check_size(width, height, max_pixels)
    in_print = colours in ("CMYK", "YCCK")
    shrink = 1
    if config.scaled_decode:
        shrink = halvings((height, width), _resized(height, width, config))
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "CMYK" if in_print else "RGB", min_height=-(-height // shrink), min_width=-(-width // shrink)
        )
    except ValueError as error:
        reason = "truncated_image" if "Premature end of JPEG" in str(error) else "corrupt_image"
        raise BadSample(reason, f"{width} x {height} JPEG, {len(data)} bytes: {error}") from error
    return None if in_print else (pixels, (height, width))


def _resized(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """Height and width that a picture of this size gets before the crop."""
    target = config.size
    if config.resize == "squash":
        return target, target
    side = min(height, width) if config.resize == "shortest" else max(height, width)
    # torchvision truncates the long side of `shortest`; open_clip rounds both sides of `longest`
    rounding = int if config.resize == "shortest" else round
    return max(1, rounding(target * height / side)), max(1, rounding(target * width / side))


def fit(image_CHW: Tensor, full_size: tuple[int, int], config: ImageConfig) -> Tensor:
    """Resize and crop or pad a uint8 CHW picture, whose full height and width decide the shape, to C x size x size."""
    wanted = _resized(*full_size, config)
    if wanted != image_CHW.shape[1:]:
        # The operator below F.interpolate, because that takes a size or a scale, not both: half of 641 pixels arrives
        # as 321, and stretching these over the place of 320.5 would cost 10 dB.
        resize = (
            torch.ops.aten._upsample_bicubic2d_aa
            if config.interpolation == "bicubic"
            else torch.ops.aten._upsample_bilinear2d_aa
        )
        shrink = round(max(full_size) / max(image_CHW.shape[1:]))
        scales = [shrink * new / old for new, old in zip(wanted, full_size, strict=True)]
        image_CHW = resize(image_CHW[None], wanted, False, *scales)[0]
    # a picture of its own, not a window that keeps the uncropped one alive in the loader's cache
    return _centre(image_CHW, config.size, config.ground).contiguous()


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
    return fit(*decode_rgb(data, config, max_pixels), config)


def normalise(pixels_BCHW: Tensor, config: ImageConfig, out: Tensor | None = None) -> Tensor:
    """uint8 BCHW to float32 BCHW with the model's mean and std; runs on the tensor's device.

    `out`: a float tensor of this shape to fill. Asking the system for new memory costs more than the arithmetic, so a
    loop that is done with its last batch hands it in again.
    """
    mean = torch.tensor(config.mean, device=pixels_BCHW.device).mul_(255).view(1, -1, 1, 1)
    scale = torch.tensor(config.std, device=pixels_BCHW.device).mul_(255).reciprocal_().view(1, -1, 1, 1)
    pixels = pixels_BCHW.to(torch.float32, copy=True) if out is None else out.copy_(pixels_BCHW)
    return pixels.sub_(mean).mul_(scale)
