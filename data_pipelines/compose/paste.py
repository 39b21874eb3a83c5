"""Pasting: a background crop, objects with soft edges in its light, and what a camera does to the whole picture.

Only integer arithmetic of Pillow and libjpeg-turbo touches pixels, so equal draws give equal bytes on every processor.
Suffixes: H height, W width in pixels.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageStat

from data_pipelines.compose.dice import Dice
from data_pipelines.resize import encode

SOLID = 24
"""Alpha above which a pixel belongs to the object; the box is the bounding box of these."""
SIDES = (0.2, 0.5)
"""Longer side of an object, as a share of the picture's side."""
ENLARGED = 2.5
"""Largest enlargement of a cut-out, unless the smallest side asks for more."""
TURN = 12.0
"""Largest rotation of an object, degrees."""
TRIES = 30
"""Places that are tried for an object before it is left out."""
ROOM = 1.5
"""Cut-outs and photographs are kept this much larger than they can ever be needed."""

Cutout = Image.Image
"""RGBA, cut to its alpha."""


@dataclass(frozen=True, slots=True)
class Placed:
    """An object on its way into a picture."""

    image: Image.Image
    """RGBA, at its final size."""
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Pixels of the picture."""
        return self.left, self.top, self.left + self.image.width, self.top + self.image.height


def open_cutout(data: bytes, side: int) -> Cutout:
    """A stamp cut to its alpha, no larger than pictures of `side` pixels need it."""
    with Image.open(io.BytesIO(data)) as stored:
        image = stored.convert("RGBA")
    image = image.crop(_solid_box(image))
    most = ceil(ROOM * SIDES[1] * side)
    return _resized(image, most) if max(image.size) > most else image


def open_scene(data: bytes, part: tuple[float, float, float, float], side: int) -> Image.Image:
    """The usable part of a photograph, no larger than crops for pictures of `side` pixels need it."""
    with Image.open(io.BytesIO(data)) as stored:
        image: Image.Image = stored.convert("RGB")
    x0, y0, x1, y1 = part
    box = int(x0 * image.width), int(y0 * image.height), int(x1 * image.width), int(y1 * image.height)
    image = image.crop(box)
    most = ceil(ROOM * 2 * side)
    if min(image.size) > most:
        scale = most / min(image.size)
        size_now = round(image.width * scale), round(image.height * scale)
        image = image.resize(size_now, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image


def ground(scene: Image.Image, side: int, dice: Dice) -> Image.Image:
    """A square crop of a scene, mirrored half the time: `side` pixels."""
    crop = max(min(min(scene.size), side), int(dice.between(0.45, 1.0) * min(scene.size)))
    left, top = (dice.below(length - crop + 1) for length in scene.size)
    square = scene.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + crop, top + crop))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if dice.chance(0.5) else square


def place(cutout: Cutout, side: int, taken: Sequence[tuple[int, int, int, int]], dice: Dice) -> Placed | None:
    """The cut-out scaled, turned, mirrored and put where it overlaps nothing that is there; None: no such place."""
    share = dice.log_between(*SIDES)
    length = max(round(SIDES[0] * side), min(round(share * side), int(ENLARGED * max(cutout.size))))
    if dice.chance(0.5):
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = cutout.convert("RGBa").rotate(dice.between(-TURN, TURN), Image.Resampling.BILINEAR, expand=True)
    image = turned.convert("RGBA")
    image = _resized(image.crop(_solid_box(image)), length)
    image = image.crop(_solid_box(image))
    for _ in range(TRIES):
        left, top = dice.below(side - image.width + 1), dice.below(side - image.height + 1)
        found = Placed(image, left, top)
        if not any(_meet(found.box, other) for other in taken):
            return found
    return None


def paste(picture: Image.Image, placed: Placed, dice: Dice) -> None:
    """Put an object into the picture, its brightness between its own and that of the place, its edge softened."""
    here = ImageStat.Stat(picture.crop(placed.box).convert("L")).mean[0]
    light = dice.between(0.85, 1.15) * ((here + 64) / 192) ** 0.35
    red, green, blue, alpha = placed.image.split()
    table = [min(255, round(value * light)) for value in range(256)]
    lit = Image.merge("RGB", [band.point(table) for band in (red, green, blue)])
    picture.paste(lit, placed.box, alpha.filter(ImageFilter.GaussianBlur(0.6)))


def camera(picture: Image.Image, dice: Dice) -> bytes:
    """Brightness, contrast and blur of the whole picture, then JPEG."""
    gain, lift = dice.log_between(0.8, 1.25), dice.between(-16, 16)
    table = [max(0, min(255, round((value - 128) * gain + 128 + lift))) for value in range(256)]
    picture = picture.point(table * 3)
    if dice.chance(0.6):
        picture = picture.filter(ImageFilter.GaussianBlur(dice.between(0.2, 0.9)))
    return encode(picture, "jpg", 55 + dice.below(41))


def owners(placed: Sequence[Placed], numbers: Sequence[int], side: int) -> NDArray[np.uint8]:
    """HW: the number of the object that a pixel belongs to, 0 for the background."""
    owner_HW = np.zeros((side, side), np.uint8)
    for item, number in zip(placed, numbers, strict=True):
        x0, y0, x1, y1 = item.box
        owner_HW[y0:y1, x0:x1][np.asarray(item.image.getchannel("A")) > SOLID] = number
    return owner_HW


def runs(owner_HW: NDArray[np.uint8], grid: int, count: int) -> list[int]:
    """value, length, value, length ... of the row-major grid x grid cells of a picture.

    A cell is of the object 1..count that covers half of it or more, otherwise of the background, 0.
    """
    side = len(owner_HW)
    edges = np.arange(side) * grid // side
    cells_HW = edges[:, None] * grid + edges[None, :]
    sizes = np.bincount(cells_HW.ravel(), minlength=grid * grid)
    value = np.zeros(grid * grid, int)
    for number in range(1, count + 1):
        covered = np.bincount(cells_HW[owner_HW == number], minlength=grid * grid)
        value[2 * covered >= sizes] = number
    starts = np.flatnonzero(np.diff(value, prepend=-1))
    lengths = np.diff(starts, append=len(value))
    return [int(item) for pair in zip(value[starts], lengths, strict=True) for item in pair]


def _solid_box(image: Image.Image) -> tuple[int, int, int, int]:
    box = image.getchannel("A").point([255 * (value > SOLID) for value in range(256)]).getbbox()
    assert box is not None  # every stamp of the table shows something
    return box


def _resized(image: Image.Image, length: int) -> Image.Image:
    """The longer side to `length`, colours weighted by alpha."""
    scale = length / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGBa").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).convert("RGBA")


def _meet(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
