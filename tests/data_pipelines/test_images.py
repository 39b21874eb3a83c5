import io
import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, PngImagePlugin

from data_pipelines.errors import BadSample
from data_pipelines.images import MOST_SCANS, flatten, has_alpha, open_checked, open_header, upright
from data_pipelines.resize import EncodeFormat, ResizeMode, encode, needs_resize, resize_to, scaled_size, shrink
from data_pipelines.testing import draw


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no pixels: 70 bytes that would decode to gigabytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


def png(image: Image.Image, **options: object) -> Image.Image:
    """The picture after a round trip through a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return open_checked(buffer.getvalue())


@pytest.mark.parametrize("size", [(20_990, 29_700), (10_000, 10_000), (7_072, 7_071)])
def test_too_many_pixels_is_refused_from_the_header(size: tuple[int, int]) -> None:
    # above Pillow's error limit, above its warning limit, and just above ours of 50 million
    with pytest.raises(BadSample) as caught:
        open_checked(png_header(*size))
    assert caught.value.reason == "too_many_pixels"
    assert f"{size[0] * size[1]:,}" in str(caught.value)
    assert "50,000,000" in str(caught.value)


def test_the_limit_itself_is_allowed() -> None:
    data = draw((40, 30))
    assert open_checked(data, max_pixels=1200).size == (40, 30)
    with pytest.raises(BadSample, match="1,200 pixels, limit 1,199"):
        open_checked(data, max_pixels=1199)


@pytest.mark.parametrize("data", [b"", b"hello, world", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"GIF89a", b"\xff\xd8\xff"])
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        open_checked(data)
    assert caught.value.reason == "not_an_image"


@pytest.mark.parametrize("format", ["BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_not_offered_to_a_decoder(format: str) -> None:
    with pytest.raises(BadSample, match="not_an_image"):
        open_checked(draw((32, 32), format=format))


COMMENT = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
FLOODS = [("PNG", COMMENT), ("JPEG", b"\xff\xfe\0\2"), ("JPEG", b"\xff"), ("JPEG", b"\xff\xd0"), ("JPEG", b"\xff\0"),
          ("GIF", b"!\xfe\0"), ("GIF", b"!\xfe\1a\0"), ("GIF", b"\0")]  # fmt: skip


@pytest.mark.parametrize(("format", "part"), FLOODS)
def test_a_flood_of_parts_is_refused_before_they_are_read(format: str, part: bytes) -> None:
    """A thousand are allowed, and one more per KiB; with the picture's own and two per GIF comment 400 still pass."""
    whole = draw((40, 30), format=format)
    at = {"PNG": 33, "JPEG": 2, "GIF": 13 + (3 << ((whole[10] & 7) + 1))}[format]
    assert open_header(whole[:at] + part * 400 + whole[at:]).size == (40, 30)
    for parts in (3000, 300_000):
        began = time.process_time()
        with pytest.raises(BadSample) as caught:
            open_header(whole[:at] + part * parts + whole[at:])
        assert caught.value.reason == "corrupt_image"
        assert time.process_time() - began < 0.2  # 0.003; Pillow takes most of a second for the second


def test_a_jpeg_of_many_scans_is_refused() -> None:
    progressive = io.BytesIO()
    Image.open(io.BytesIO(draw((40, 30), format="PNG"))).convert("RGB").save(progressive, "JPEG", progressive=True)
    data = progressive.getvalue()
    last = data.rindex(b"\xff\xda")
    assert open_header(data).size == (40, 30)
    with pytest.raises(BadSample):
        open_header(data[:last] + data[last:-2] * MOST_SCANS + data[-2:])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_cut_picture_is_refused_at_every_length(format: str) -> None:
    data = draw((200, 150), format=format)
    assert open_checked(data).format == format
    for length in range(1, len(data) - 16, max(1, len(data) // 60)):
        with pytest.raises(BadSample) as caught:
            open_checked(data[:length])
        assert caught.value.reason in ("not_an_image", "truncated_image", "corrupt_image")


def test_a_truncated_picture_has_its_own_reason() -> None:
    for format in ("PNG", "JPEG"):
        data = draw((200, 150), format=format)
        with pytest.raises(BadSample) as caught:
            open_checked(data[: len(data) // 2])
        assert caught.value.reason == "truncated_image"
        assert "200 x 150" in str(caught.value)


def test_a_damaged_picture_has_another() -> None:
    data = bytearray(draw((200, 150)))
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    with pytest.raises(BadSample, match="corrupt_image|truncated_image"):
        open_checked(bytes(data))


RED, HIDDEN = (255, 0, 0), (0, 255, 0)


def test_flatten_shows_the_ground_and_never_a_hidden_colour() -> None:
    rgba = Image.new("RGBA", (2, 1), (*HIDDEN, 0))
    rgba.putpixel((0, 0), (*RED, 255))
    for ground in ((255, 255, 255), (10, 20, 30)):
        flat = flatten(png(rgba), ground)
        assert flat.mode == "RGB"
        assert (flat.getpixel((0, 0)), flat.getpixel((1, 0))) == (RED, ground)


def test_flatten_composes_half_transparency() -> None:
    flat = flatten(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))
    red, green, blue = np.asarray(flat)[0, 0]
    assert red == 255
    assert abs(int(green) - 127) <= 1
    assert green == blue


def test_flatten_knows_palette_grey_and_colour_key_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *HIDDEN])
    palette.putpixel((1, 0), 1)
    by_index = png(palette, transparency=1)
    assert by_index.mode == "P"
    assert [flatten(by_index).getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]
    by_table = png(palette, transparency=b"\xff\x00")
    assert [flatten(by_table).getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]

    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((0, 0), (90, 255))
    assert [flatten(png(grey)).getpixel((x, 0)) for x in (0, 1)] == [(90, 90, 90), (255, 255, 255)]

    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((1, 0), HIDDEN)
    opened = png(keyed, transparency=HIDDEN)
    assert has_alpha(opened)
    assert [flatten(opened).getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]


def test_flatten_scales_sixteen_bits_instead_of_clipping() -> None:
    levels = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    flat = flatten(png(Image.fromarray(levels)))
    assert np.asarray(flat)[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


def test_flatten_converts_cmyk() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(buffer, "JPEG", quality=100)
    red, green, blue = np.asarray(flatten(open_checked(buffer.getvalue())))[8, 8]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.open(io.BytesIO(draw(mode="RGB"))).convert(mode)
    assert flatten(png(image)).mode == "RGB"


def test_no_hidden_colour_bleeds_into_a_resized_edge() -> None:
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, :32] = (*RED, 255)
    pixels[:, 32:] = (*HIDDEN, 0)
    small = resize_to(Image.fromarray(pixels, "RGBA"), 9, "keep_ratio")
    assert np.asarray(small)[..., 1].max() <= 1
    assert 0 < np.asarray(small)[4, 4, 3] < 255
    assert np.asarray(flatten(small))[:, 0].tolist() == [list(RED)] * 9


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("keep_ratio", (40, 20)), ("keep_ratio_largest", (20, 10)), ("center_crop", (20, 20)), ("border", (20, 20))],
)
def test_resize_modes(mode: str, expected: tuple[int, int]) -> None:
    image = open_checked(draw((100, 50), "RGB"))
    assert resize_to(image, 20, mode).size == expected  # type: ignore[arg-type]
    assert resize_to(image, 200, mode) is image  # type: ignore[arg-type]
    assert resize_to(image, 200, mode, only_if_bigger=False).size != image.size  # type: ignore[arg-type]


def test_needs_resize_agrees_with_the_side_that_counts() -> None:
    assert not needs_resize(100, 50, 50, "keep_ratio")
    assert needs_resize(100, 50, 50, "keep_ratio_largest")
    assert not needs_resize(100, 50, 1, "no")
    assert needs_resize(50, 50, 60, "border", only_if_bigger=False)


def test_border_is_clear_around_alpha_and_white_otherwise() -> None:
    wide = open_checked(draw((100, 50), "RGBA"))
    assert resize_to(wide, 20, "border").getpixel((10, 0)) == (0, 0, 0, 0)
    assert resize_to(wide.convert("RGB"), 20, "border").getpixel((10, 0)) == (255, 255, 255)


def test_an_extreme_shape_keeps_one_pixel() -> None:
    assert resize_to(Image.new("RGB", (5000, 2)), 100, "keep_ratio_largest").size == (100, 1)


@pytest.mark.parametrize("format", ["png", "webp", "jpg"])
def test_encoding_is_deterministic_and_free_of_metadata(format: EncodeFormat) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "secret")
    image = png(
        Image.new("RGBA", (20, 20), (200, 10, 10, 255)), pnginfo=text, icc_profile=b"profile" * 9, dpi=(300, 300)
    )
    once, again = encode(image, format), encode(image, format)
    assert once == again
    assert b"secret" not in once
    assert b"profile" not in once
    assert b"ICC" not in once


def test_png_and_webp_keep_alpha_and_jpeg_is_composed_on_white() -> None:
    image = Image.new("RGBA", (20, 20), (*HIDDEN, 0))
    for format in ("png", "webp"):
        assert np.asarray(open_checked(encode(image, format)).convert("RGBA"))[..., 3].max() == 0
    assert np.asarray(open_checked(encode(image, "jpg"))).min() == 255


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    assert upright(open_checked(buffer.getvalue())).size == (20, 40)


@pytest.mark.parametrize("mode", ["keep_ratio", "keep_ratio_largest", "center_crop", "border"])
@pytest.mark.parametrize("size", [(1599, 1201), (640, 480), (401, 1203)])
def test_a_large_jpeg_is_decoded_smaller_and_resized_to_the_same_shape(mode: ResizeMode, size: tuple[int, int]) -> None:
    data = draw(size, format="JPEG")
    whole = resize_to(open_checked(data), 100, mode)
    small = simplejpeg.decode_jpeg(data, "RGBX", min_width=scaled_size(*size, 100, mode)[0])
    assert max(small.shape) <= max(size) / 2 + 1
    shrunk = shrink(small, 100, mode, size)[..., :3]
    assert shrunk.shape[1::-1] == whole.size
    error = np.square(np.asarray(shrunk, dtype=float) - np.asarray(whole, dtype=float)).mean()
    assert 10 * np.log10(255**2 / error) > 40
