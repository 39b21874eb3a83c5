"""A picture with the boxes and names of what was found in it."""

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vlp.detection.infer import Detection

GOLDEN = 0.618033988749895
"""Step of the hue from label to label: neighbours in the list never look alike."""
DARK, LIGHT = (16, 18, 24), (255, 255, 255)
Colour = tuple[int, int, int]


def draw_detections(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """A copy of the picture, RGB, with a box and a tag for each detection; the best is drawn last, on top.

    One colour for each label; lines and letters grow with the picture. Tags stay within the picture, and move below or
    above tags that are in their way as far as there is room.
    """
    drawn = image.convert("RGB")
    canvas = ImageDraw.Draw(drawn)
    side = min(drawn.size)
    line, font = max(2, side // 200), ImageFont.load_default(size=max(11, side // 32))
    names = sorted({item.label for item in detections})
    colours = {name: _colour(number) for number, name in enumerate(names)}
    taken: list[tuple[float, float, float, float]] = []
    tags = []
    for item in detections:  # the best one chooses its place first
        text = f"{item.label} {item.score:.2f}"
        tag = _place(canvas.textbbox((0, 0), text, font=font), item.box, drawn.size, taken, line)
        taken.append(tag)
        tags.append((item, text, tag))
    for item, _, _ in reversed(tags):
        _outline(canvas, item.box, colours[item.label], line)
    for item, text, tag in reversed(tags):
        colour = colours[item.label]
        canvas.rounded_rectangle(tag, radius=2 * line, fill=colour)
        middle = (tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2
        canvas.text(middle, text, fill=_ink(colour), font=font, anchor="mm")
    return drawn


def _colour(number: int) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb((0.02 + number * GOLDEN) % 1.0, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _ink(ground: Colour) -> Colour:
    """Dark or light, whichever can be read on this colour (relative luminance by Rec. 709)."""
    return DARK if 0.2126 * ground[0] + 0.7152 * ground[1] + 0.0722 * ground[2] > 115 else LIGHT


def _outline(canvas: ImageDraw.ImageDraw, box: Sequence[float], colour: Colour, line: int) -> None:
    """The box, between two thin dark lines that keep it visible on any ground."""
    x0, y0, x1, y1 = box
    for grow, width, fill in ((1, line + 2, DARK), (0, line, colour)):
        left, top = x0 - grow, y0 - grow
        canvas.rectangle((left, top, max(left, x1 + grow), max(top, y1 + grow)), outline=fill, width=width)


def _place(
    letters: tuple[float, float, float, float],
    box: Sequence[float],
    size: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
    line: int,
) -> tuple[float, float, float, float]:
    """Where a tag goes: above its box, below its upper side, or at its lower side, the first place that is free."""
    width, height = letters[2] - letters[0] + 4 * line, letters[3] - letters[1] + 4 * line
    left = min(max(0.0, box[0]), max(0.0, size[0] - width))
    tops = [
        min(max(0.0, top), max(0.0, size[1] - height)) for top in (box[1] - height, box[1], box[3] - height, box[3])
    ]
    places = [(left, top, left + width, top + height) for top in tops]
    free = [place for place in places if not any(_meet(place, other) for other in taken)]
    return (free or places)[0]


def _meet(first: Sequence[float], second: Sequence[float]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
