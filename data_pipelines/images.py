"""Encoded pictures made safe: header and limits before decode, alpha composed or kept, turned upright.

Torch-free. Everything that opens a picture of unknown origin, in any floor, does it through this module.
"""

import io
import itertools
import re
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from data_pipelines.errors import BadSample

MAX_PIXELS = 50_000_000
"""Default limit of width x height: 150 MB once decoded to RGB."""
MAX_FILE_BYTES = 256 * 2**20
"""A longer file is refused unread; nothing within the pixel limit needs as much."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Decoders that are offered the bytes. Pillow knows dozens more, each a door of its own."""


WHITE = (255, 255, 255)
ORIENTATION = 0x0112
DAMAGE = (OSError, SyntaxError, ValueError, IndexError, TypeError, EOFError, struct.error)
"""What Pillow's decoders raise on damaged input (UnidentifiedImageError is an OSError)."""


MOST_PARTS = 1000
"""Chunks, segments or blocks before the pixels of a picture, and one more per KiB. Pillow reads each in Python: ten
megabytes of empty ones would take seconds."""
MOST_SCANS = 64
"""Passes of a progressive JPEG. Each goes over the whole picture and may cost a few bytes; encoders make about ten."""


def open_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Picture whose header was read and found acceptable; its pixels are not decoded yet.

    Raises BadSample: `not_an_image` (or a format that is not allowed), `too_many_pixels`, `corrupt_image` for one made
    to be slow. Pillow's own guard stays as
    it is, so no `max_pixels` admits more than twice PIL.Image.MAX_IMAGE_PIXELS (179 million).
    """
    if (data.count(b"\xff\xda") > MOST_SCANS and data[:2] == b"\xff\xd8") or too_many_parts(data):
        raise BadSample("corrupt_image", f"{len(data)} bytes in more parts than any picture needs")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\d+", str(error))
        raise BadSample(
            "too_many_pixels", f"{int(found.group()) if found else '?':,} pixels, limit {max_pixels:,}"
        ) from error
    except DAMAGE as error:
        raise BadSample("not_an_image", f"{len(data)} bytes are no {', '.join(FORMATS)} picture") from error
    check_size(*image.size, max_pixels)
    return image


def too_many_parts(data: bytes) -> bool:
    """Whether a PNG, JPEG or GIF has more chunks, segments or blocks than MOST_PARTS says; stops counting there."""
    most = MOST_PARTS + len(data) // 1024
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        steps = _chunks(data)
    elif data[:2] == b"\xff\xd8":
        steps = _segments(data)
    elif data[:4] == b"GIF8":
        steps = _blocks(data)
    else:
        return False
    return sum(1 for _ in itertools.islice(steps, most + 1)) > most


def _chunks(png: bytes) -> Iterator[int]:
    at = 8
    while at < len(png) and png[at + 4 : at + 8] != b"IEND":
        yield at
        at += 12 + int.from_bytes(png[at : at + 4], "big")


def _segments(jpeg: bytes) -> Iterator[int]:
    """As Pillow reads them: fill bytes and markers without a length count as well."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and at + 1 < len(jpeg) and (marker := jpeg[at + 1]) != 0xDA:
        yield at
        if marker == 0xFF:
            at += 1
        elif marker <= 1 or 0xD0 <= marker <= 0xD9:
            at += 2
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")


def _blocks(gif: bytes) -> Iterator[int]:
    """Sub-blocks of the extensions before the first frame, and bytes between them that mean nothing."""
    flags = gif[10] if len(gif) > 10 else 0
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    while at < len(gif) and gif[at] not in b",;":
        yield at
        if gif[at] != 0x21:
            at += 1
            continue
        at += 2
        while at < len(gif) and gif[at]:
            yield at
            at += 1 + gif[at]
        at += 1


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises BadSample: `too_many_pixels`, or `empty_image` for none."""
    if width * height > max_pixels:
        raise BadSample("too_many_pixels", f"{width:,} x {height:,} = {width * height:,} pixels, limit {max_pixels:,}")
    if width * height == 0:
        raise BadSample("empty_image", f"{width} x {height} pixels")


def halvings(full: tuple[int, int], wanted: tuple[int, int]) -> int:
    """8, 4, 2 or 1: the smallest JPEG decode that still covers `wanted`, both as (width, height) or (height, width).

    By halves, because between them libjpeg-turbo has no vector code and is slower than in full.
    """
    return next(s for s in (8, 4, 2, 1) if s == 1 or (full[0] >= s * wanted[0] and full[1] >= s * wanted[1]))


def open_checked(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decoded picture (first frame), its `format` kept. Raises BadSample as `open_header`, and `truncated_image`."""
    image = open_header(data, max_pixels)
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", f"{error}, limit {max_pixels}") from error
    except DAMAGE as error:
        detail = f"{image.width} x {image.height} {image.format}, {len(data)} bytes: {error}"
        raise BadSample("truncated_image" if "truncated" in str(error) else "corrupt_image", detail) from error
    return image


def has_alpha(image: Image.Image) -> bool:
    """Whether any pixel may be transparent: an alpha channel, or a transparent palette entry or colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def flatten(image: Image.Image, ground: tuple[int, int, int] = WHITE) -> Image.Image:
    """8-bit RGB of any mode, composed on a plain ground where it is transparent, so that no hidden colour shows."""
    plain = eight_bit(image)
    if plain.mode != "RGBA":
        return plain if plain.mode == "RGB" else plain.convert("RGB")
    below = Image.new("RGBA", plain.size, (*ground, 255))
    return Image.alpha_composite(below, plain).convert("RGB")


def eight_bit(image: Image.Image) -> Image.Image:
    """The picture as L, RGB or RGBA of 8 bits per channel."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
        levels = np.asarray(image).astype(np.int64)
        grey = Image.fromarray((np.clip(levels, 0, 65535) >> 8).astype(np.uint8))
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            alpha = Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8))
            return Image.merge("RGBA", (grey, grey, grey, alpha))
        return grey
    if has_alpha(image):
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def orientation(image: Image.Image) -> int:
    """How EXIF asks for the picture to be turned or mirrored before it is shown: 2..8, or 1 for not at all."""
    try:
        asked = int(image.getexif().get(ORIENTATION, 1))
    except DAMAGE:
        return 1  # damaged EXIF does no harm to the pixels
    return asked if 2 <= asked <= 8 else 1


def is_rotated(image: Image.Image) -> bool:
    """Whether `upright` changes the picture."""
    return orientation(image) != 1


def has_exif(jpeg: bytes) -> bool:
    """Whether a JPEG carries EXIF, from its marker segments alone: a tenth of the time that Pillow takes to open it."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and jpeg[at + 1 : at + 2] != b"\xda":  # the picture itself starts at 0xDA
        if jpeg.startswith(b"Exif\0\0", at + 4):
            return True
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF asks."""
    return ImageOps.exif_transpose(image) if is_rotated(image) else image
