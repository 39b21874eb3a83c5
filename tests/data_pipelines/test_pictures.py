"""The quick JPEG path against Pillow's: same geometry, nearly the same pixels, the same verdicts."""

import io
import math
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import BadSample, ConfigError
from data_pipelines.pictures import Prepared, WriteOptions, prepare, thumbnail
from data_pipelines.records import Record
from data_pipelines.resize import ResizeMode, encode, resize_to
from data_pipelines.testing import draw

MODES = [mode for mode in get_args(ResizeMode) if mode != "no"]


def run(data: bytes, **options: object) -> Prepared:
    return prepare(Record(image=data, captions=(), source="", origin=""), WriteOptions.model_validate(options))


def psnr(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one.convert("RGB"), np.float64) - np.asarray(other.convert("RGB"), np.float64)
    return 10 * math.log10(255**2 / max(float((difference**2).mean()), 1e-9))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(640, 480), (321, 243), (100, 301), (257, 257), (1000, 90)])
@pytest.mark.parametrize("always", [False, True])
def test_geometry_and_pixels_are_those_of_pillow(mode: ResizeMode, size: tuple[int, int], always: bool) -> None:
    data = draw(size, format="JPEG", seed=3)
    image = Image.open(io.BytesIO(data))
    expected = resize_to(image, 128, mode, not always)
    found = run(data, image_size=128, resize_mode=mode, resize_only_if_bigger=not always)
    stored = Image.open(io.BytesIO(found.image))
    assert stored.size == found.size == expected.size
    assert found.original == size
    assert psnr(stored, Image.open(io.BytesIO(encode(expected, "jpg")))) > 36


def test_grey_and_cmyk_and_turned_pictures() -> None:
    grey = run(draw((300, 200), "L", "JPEG"), image_size=100, resize_mode="keep_ratio")
    assert (
        psnr(Image.open(io.BytesIO(grey.image)), Image.open(io.BytesIO(draw((300, 200), "L"))).resize((150, 100))) > 36
    )
    cmyk = run(draw((300, 200), "CMYK", "JPEG"), image_size=100, resize_mode="keep_ratio")
    assert (Image.open(io.BytesIO(cmyk.image)).mode, cmyk.size) == ("RGB", (150, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.open(io.BytesIO(draw((300, 200)))).save(stream, "JPEG", exif=exif)
    assert run(stream.getvalue(), image_size=100, resize_mode="keep_ratio").size == (100, 150)


@pytest.mark.parametrize("options", [{}, {"image_size": 50, "resize_mode": "keep_ratio"}])
def test_a_cut_jpeg_is_never_a_sample(options: dict[str, object]) -> None:
    data = draw((200, 150), format="JPEG")
    for length in np.linspace(2, len(data) - 3, 40).astype(int).tolist():
        assert run(data[:length], **options).reason in ("truncated_image", "corrupt_image", "not_an_image"), length
    assert run(data, **options).reason == ""


@pytest.mark.parametrize(("format", "side"), [("jpg", 65_501), ("webp", 16_384)])
def test_a_side_longer_than_the_format_holds_is_a_counted_failure(format: str, side: int) -> None:
    long = draw((side, 1), format="PNG")
    assert run(long, encode_format=format).reason == "side_too_long"
    assert run(draw((side - 1, 1), format="PNG"), encode_format=format).reason == ""
    assert run(long).reason == ""


def test_quality_zero_is_refused_for_jpg() -> None:
    with pytest.raises(ConfigError, match="jpg takes 1 to 100"):
        WriteOptions(encode_format="jpg", encode_quality=0)


@pytest.mark.parametrize(
    ("size", "form", "expected"),
    [
        ((640, 480), "JPEG", (96, 72)),
        ((480, 640), "PNG", (72, 96)),
        ((500, 2), "WEBP", (96, 1)),
        ((300, 300), "GIF", (96, 96)),
        ((40, 32), "JPEG", (40, 32)),
    ],
)
def test_thumbnails_have_the_shape_of_their_picture(
    size: tuple[int, int], form: str, expected: tuple[int, int]
) -> None:
    found = Image.open(io.BytesIO(thumbnail(draw(size, format=form, seed=1), 96)))
    assert (found.size, found.format, found.mode) == (expected, "JPEG", "RGB")


def test_thumbnails_are_upright_on_white_and_tell_nothing_else() -> None:
    for size in ((300, 200), (60, 40)):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "where I live"
        buffer = io.BytesIO()
        Image.new("RGB", size, "red").save(buffer, "JPEG", exif=exif, comment=b"where I live")
        found = thumbnail(buffer.getvalue(), 96)
        assert Image.open(io.BytesIO(found)).size == ((64, 96) if size[0] > 96 else (40, 60))
        exif[0x0112] = 1
        Image.new("RGB", size, "red").save(buffer := io.BytesIO(), "JPEG", exif=exif, comment=b"where I live")
        assert b"where I live" not in found + thumbnail(buffer.getvalue(), 96)
    Image.new("RGBA", (200, 200), (255, 0, 0, 0)).save(buffer := io.BytesIO(), "PNG")
    assert Image.open(io.BytesIO(thumbnail(buffer.getvalue(), 96))).getpixel((50, 50)) == (255, 255, 255)


def test_what_is_no_picture_has_no_thumbnail() -> None:
    whole = draw((640, 480), format="JPEG", seed=3)
    np.save(array := io.BytesIO(), np.zeros((3, 8, 8), np.uint8))
    for data, reason in (
        (whole[:-2000], "truncated_image"), (b"text", "not_an_image"), (b"", "not_an_image"),
        (array.getvalue(), "array_kept_as_is"),
    ):  # fmt: skip
        with pytest.raises(BadSample) as caught:
            thumbnail(data, 96)
        assert caught.value.reason == reason
    with pytest.raises(BadSample, match="too_many_pixels"):
        thumbnail(whole, 96, max_pixels=1000)
