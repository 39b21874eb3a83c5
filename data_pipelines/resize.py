"""Pictures resized and encoded for shards: img2dataset's modes, the same bytes on every processor. Torch-free."""

import io
import math
from typing import Literal

import numpy as np
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.images import WHITE, eight_bit, flatten

Frame = tuple[float, float, float, float]
WHOLE: Frame = (0.0, 0.0, 1.0, 1.0)
ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
EncodeFormat = Literal["jpg", "png", "webp"]
LONGEST = {"jpg": 65_500, "webp": 16_383, "png": 2**31 - 1}
"""Longest side that a format holds, in pixels."""
Pixels = NDArray[np.uint8]
"""Height x width x channels: 4 for colours, the last of them padding (RGBX), or 1 for grey."""


def needs_resize(width: int, height: int, size: int, mode: ResizeMode, only_if_bigger: bool = True) -> bool:
    """Whether `resize_to` changes a picture of this size.

    With `only_if_bigger`, a picture stays as it is unless its short side (keep_ratio, center_crop) or its long side
    (keep_ratio_largest, border) exceeds `size`, as in img2dataset.
    """
    if mode == "no":
        return False
    side = min(width, height) if mode in ("keep_ratio", "center_crop") else max(width, height)
    if only_if_bigger:
        return side > size
    return side != size if mode.startswith("keep") else (width, height) != (size, size)


def scaled_size(width: int, height: int, size: int, mode: ResizeMode) -> tuple[int, int]:
    """(width, height) after scaling and before any crop or border."""
    side = min(width, height) if mode in ("keep_ratio", "center_crop") else max(width, height)
    return max(1, round(width * size / side)), max(1, round(height * size / side))


def frame(width: int, height: int, size: int, mode: ResizeMode) -> Frame:
    """What part of a picture its resized version shows: all of it, its middle, or more than it where a border is added.

    As x0, y0, x1, y1 in fractions of the picture.
    """
    if mode not in ("center_crop", "border"):
        return WHOLE
    w, h = scaled_size(width, height, size, mode)
    left, top = (
        ((w - size) // 2, (h - size) // 2) if mode == "center_crop" else (-((size - w) // 2), -((size - h) // 2))
    )
    return left / w, top / h, (left + size) / w, (top + size) / h


def exact_size(full: tuple[int, int], decoded: tuple[int, int]) -> tuple[float, float]:
    """How much of a picture that was decoded in eighths is picture: half of 401 pixels arrives as 201."""
    for eighths in range(1, 8):
        exact = full[0] * eighths / 8, full[1] * eighths / 8
        if (math.ceil(exact[0]), math.ceil(exact[1])) == decoded:
            return exact
    return decoded


def resize_to(image: Image.Image, size: int, mode: ResizeMode, only_if_bigger: bool = True) -> Image.Image:
    """Resized picture (L, RGB or RGBA), or the picture itself when nothing has to change.

    keep_ratio: short side becomes `size`. keep_ratio_largest: long side. center_crop: short side, then the middle
    square. border: long side, then a `size` x `size` square, transparent around a picture with alpha, else white.
    """
    if not needs_resize(*image.size, size, mode, only_if_bigger):
        return image
    plain = eight_bit(image)
    width, height = scaled_size(*image.size, size, mode)
    if plain.mode == "RGBA":
        # Premultiplied (RGBa), so that colours hidden below alpha 0 do not bleed into the edges. The reducing gap
        # averages whole blocks first: two to four times faster on large pictures, invisible in the result.
        work = plain.convert("RGBa")
        small = work.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0).convert("RGBA")
    else:
        small = Image.new(plain.mode, (width, height))
        _bicubic(plain, small, plain.size)
    if mode == "center_crop":
        left, top = (width - size) // 2, (height - size) // 2
        return small.crop((left, top, left + size, top + size))
    if mode == "border":
        grounds: dict[str, int | tuple[int, ...]] = {"RGBA": (0, 0, 0, 0), "RGB": WHITE, "L": 255}
        square = Image.new(small.mode, (size, size), grounds[small.mode])
        square.paste(small, ((size - width) // 2, (size - height) // 2))
        return square
    return small


def shrink(pixels: Pixels, size: int, mode: ResizeMode, full: tuple[int, int]) -> Pixels:
    """What `resize_to` makes of a JPEG of `full` width and height, without a copy of its pixels.

    They may have been decoded smaller, but not below the result.
    """
    width, height = scaled_size(*full, size, mode)
    small = np.empty((height, width, pixels.shape[2]), np.uint8)
    _bicubic(_view(pixels), _view(small), exact_size(full, (pixels.shape[1], pixels.shape[0])))
    if mode == "center_crop":
        left, top = (width - size) // 2, (height - size) // 2
        return np.ascontiguousarray(small[top : top + size, left : left + size])
    if mode == "border":
        square = np.full((size, size, pixels.shape[2]), 255, np.uint8)
        left, top = (size - width) // 2, (size - height) // 2
        square[top : top + height, left : left + width] = small
        return square
    return small


def _view(pixels: Pixels) -> Image.Image:
    # CMYK stands for any four bytes here: the one such mode that the resizer does not take for alpha
    mode = "CMYK" if pixels.shape[2] == 4 else "L"
    return Image.frombuffer(mode, (pixels.shape[1], pixels.shape[0]), pixels, "raw", mode, 0, 1)


def _bicubic(image: Image.Image, small: Image.Image, part: tuple[float, float]) -> None:
    """Fill `small` with the upper left `part` (width, height) of a picture.

    Six times as fast as Pillow, and in whole numbers: the same bytes on every processor.
    """
    bicubic = ResizeAlg.convolution(FilterType.catmull_rom)
    Resizer().resize_pil(image, small, ResizeOptions(resize_alg=bicubic, crop_box=CropBox(0.0, 0.0, *part)))


def encode(image: Image.Image, format: EncodeFormat, quality: int | None = None) -> bytes:
    """Encoded picture, free of metadata; equal pixels give equal bytes. JPEG is composed on white, others keep alpha.

    `quality` is 1..100 for jpg and webp (default 95) and the compression level 0..9 for png (default 6).
    Raises BadSample: `side_too_long` for the format.
    """
    if max(image.size) > LONGEST[format]:
        size = f"{image.width:,} x {image.height:,} pixels"
        raise BadSample(
            "side_too_long", f"{size}, {format} holds up to {LONGEST[format]:,} a side: resize, or keep png"
        )
    if format == "jpg":
        return _encode_jpeg(np.asarray(flatten(image)), "RGB", quality)
    plain = eight_bit(image).copy()
    plain.info = {}  # ICC profiles, EXIF, text and gamma would travel into the shard
    buffer = io.BytesIO()
    if format == "png":
        plain.save(buffer, "PNG", compress_level=6 if quality is None else quality)
    else:
        plain.save(buffer, "WEBP", quality=95 if quality is None else quality)
    return buffer.getvalue()


def encode_pixels(pixels: Pixels, format: EncodeFormat, quality: int | None = None) -> bytes:
    """`encode` for the pixels that `shrink` gives."""
    if format == "jpg" and pixels.shape[2] == 4:
        return _encode_jpeg(pixels, "RGBX", quality)
    if pixels.shape[2] == 4:
        size = pixels.shape[1], pixels.shape[0]
        return encode(Image.frombuffer("RGB", size, pixels, "raw", "RGBX", 0, 1), format, quality)
    return encode(_view(pixels), format, quality)


def _encode_jpeg(pixels: Pixels, layout: str, quality: int | None) -> bytes:
    """By simplejpeg, because Pillow's encoder does not let go of the GIL."""
    return bytes(simplejpeg.encode_jpeg(pixels, 95 if quality is None else quality, layout, "420"))
