"""The one way from encoded picture to model input, used by training, evaluation and serving alike.

bytes --decode--> uint8 CHW of any size --fit--> uint8 CHW of the model's size --normalise--> float BCHW.
Pictures of other bands or values come as .npy arrays and are float32 on the way where `ImageConfig.values` says so.
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
from pydantic import Field, model_validator
from torch import Tensor

from data_pipelines.arrays import is_array, open_array
from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, ConfigError
from data_pipelines.geometry import margin, resized
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
    channels: int = Field(3, ge=1)
    """Bands of a picture. 3: encoded pictures, or arrays. 1: either, in grey. Any other number: arrays (.npy)."""
    layout: Literal["chw", "hwc"] = "chw"
    """Axes of stored arrays; one of two axes is a single band."""
    values: Literal["uint8", "float32"] = "uint8"
    """What a batch carries. float32 also takes uint16 and float32 arrays; uint8 takes nothing else and is faster."""
    scale: float = Field(255.0, gt=0)
    """Stored value that counts as 1 in `mean` and `std`; 1 when these are in the units of the data."""
    mean: tuple[float, ...] = OPENAI_MEAN
    """One per channel."""
    std: tuple[float, ...] = OPENAI_STD
    """One per channel."""
    ground: int = 255
    """Value on which transparent pictures are composed, and with which `longest` pads."""

    @model_validator(mode="after")
    def _one_per_channel(self) -> "ImageConfig":
        for name, given in (("mean", self.mean), ("std", self.std)):
            if len(given) != self.channels:
                raise ConfigError(
                    f"image.{name} has {len(given)} numbers, image.channels={self.channels}: give one per channel"
                )
        return self


def decode(data: bytes, config: ImageConfig, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, tuple[int, int]]:
    """Upright CHW picture with `config.channels` bands of `config.values`, and its full height and width.

    Raises BadSample with the reason: `wrong_channels` and `wrong_values` for a picture that is not what `config` says.
    """
    if is_array(data):
        return decode_array(data, config, max_pixels)
    if config.channels not in (1, 3):
        raise BadSample("wrong_channels", f"an encoded picture, image.channels={config.channels}: store .npy")
    image_CHW, full_size = decode_rgb(data, config, max_pixels)
    if config.channels == 1:  # Pillow's weights and rounding
        red, green, blue = image_CHW.int()
        image_CHW = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[None]
    return (image_CHW.float() if config.values == "float32" else image_CHW), full_size


def decode_array(data: bytes, config: ImageConfig, max_pixels: int) -> tuple[Tensor, tuple[int, int]]:
    """`decode` for .npy bytes."""
    array = open_array(data, max_pixels)
    if config.values == "uint8" and array.dtype != np.uint8:
        raise BadSample("wrong_values", f"{array.dtype} array, image.values=uint8: set image.values=float32")
    if array.ndim == 2:
        array = array[None]
    elif config.layout == "hwc":
        array = array.transpose(2, 0, 1)
    if len(array) != config.channels:
        raise BadSample(
            "wrong_channels",
            f"{len(array)} by image.layout={config.layout}, image.channels={config.channels}; shape {array.shape}",
        )
    image_CHW = torch.from_numpy(np.array(array, config.values, order="C"))
    return image_CHW, (image_CHW.shape[1], image_CHW.shape[2])


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
        shrink = halvings((height, width), resized(height, width, config))
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "CMYK" if in_print else "RGB", min_height=-(-height // shrink), min_width=-(-width // shrink)
        )
    except ValueError as error:
        reason = "truncated_image" if "Premature end of JPEG" in str(error) else "corrupt_image"
        raise BadSample(reason, f"{width} x {height} JPEG, {len(data)} bytes: {error}") from error
    return None if in_print else (pixels, (height, width))


def fit(image_CHW: Tensor, full_size: tuple[int, int], config: ImageConfig, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Resize and crop or pad a CHW picture, whose full height and width decide the shape, to C x size x size.

    Raises BadSample `too_many_pixels` for a picture so long that it would have these before it is cropped.
    """
    wanted = resized(*full_size, config)
    check_size(wanted[1], wanted[0], max_pixels)
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
    """Centre crop or pad to target x target."""
    _, height, width = image_CHW.shape
    if height < target or width < target:
        extra_h, extra_w = max(target - height, 0), max(target - width, 0)
        before_w, before_h = -min(0, margin(width, target)), -min(0, margin(height, target))
        margins = (before_w, extra_w - before_w, before_h, extra_h - before_h)
        image_CHW = F.pad(image_CHW, margins, value=ground)
        _, height, width = image_CHW.shape
    top, left = margin(height, target), margin(width, target)
    return image_CHW[:, top : top + target, left : left + target]


def load_image(data: bytes, config: ImageConfig, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Encoded bytes or .npy to C x size x size of `config.values`."""
    return fit(*decode(data, config, max_pixels), config, max_pixels)


def normalise(pixels_BCHW: Tensor, config: ImageConfig, out: Tensor | None = None) -> Tensor:
    """uint8 or float32 BCHW to float32 BCHW with the model's mean and std; runs on the tensor's device.

    `out`: a float tensor of this shape to fill. Asking the system for new memory costs more than the arithmetic, so a
    loop that is done with its last batch hands it in again.
    """
    mean = torch.tensor(config.mean, device=pixels_BCHW.device).mul_(config.scale).view(1, -1, 1, 1)
    scale = torch.tensor(config.std, device=pixels_BCHW.device).mul_(config.scale).reciprocal_().view(1, -1, 1, 1)
    pixels = pixels_BCHW.to(torch.float32, copy=True) if out is None else out.copy_(pixels_BCHW)
    return pixels.sub_(mean).mul_(scale)
