"""Pixels: open_clip's geometry, transparency on the ground colour, every kind of file, nothing damaged let through."""

import io
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_pipelines.errors import BadSample
from data_pipelines.preprocess import ImageConfig, decode_rgb, load_image, normalise
from data_pipelines.testing import draw
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402


def psnr(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """In dB, for values in 0..255."""
    return float(10 * torch.log10(255**2 / (ours - theirs).square().mean().clamp(min=1e-12)))


def open_clips(data: bytes, size: int, resize: Literal["shortest", "longest", "squash"]) -> torch.Tensor:
    """The same file through open_clip's transform, as values 0..255."""
    settings = PreprocessCfg(size=size, resize_mode=resize, mean=(0, 0, 0), std=(1, 1, 1), fill_color=255)
    pixels: torch.Tensor = image_transform_v2(settings, is_train=False)(Image.open(io.BytesIO(data)).convert("RGB"))
    return pixels * 255


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """A photograph of 512 x 600 pixels that matplotlib brings along; noise would make every decoder look different."""
    return Image.open(Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg").convert("RGB")


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(640, 480), (479, 641), (50, 30), (64, 64)])
def test_pixels_agree_with_open_clips_transform(
    form: str, resize: Literal["shortest", "longest", "squash"], size: tuple[int, int]
) -> None:
    data = draw(size, format=form)
    ours = load_image(data, ImageConfig(size=64, resize=resize))
    assert ours.shape == (3, 64, 64)
    assert ours.dtype == torch.uint8
    assert psnr(ours.float(), open_clips(data, 64, resize)) > 45


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(640, 480), (641, 479), (479, 641), (1599, 1201), (900, 300), (256, 256)])
def test_photographs_agree_to_70_dB_and_scaled_ones_to_37(
    photograph: Image.Image, resize: Literal["shortest", "longest", "squash"], size: tuple[int, int]
) -> None:
    sampling = "4:4:4" if size[0] % 2 else "4:2:0"
    data = encoded(photograph.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=88, subsampling=sampling)
    reference = open_clips(data, 224, resize)
    assert psnr(load_image(data, ImageConfig(resize=resize)).float(), reference) >= 70
    # 40 is the mean over many photographs; this one is harder than most where 480 rows become 240 and then 224
    scaled = ImageConfig(resize=resize, scaled_decode=True)
    assert psnr(load_image(data, scaled).float(), reference) >= 37


@pytest.mark.parametrize(
    ("size", "decoded"), [((1600, 1200), (300, 400)), ((641, 479), (240, 321)), ((400, 447), None)]
)
def test_scaled_decode_takes_the_smallest_that_suffices(
    photograph: Image.Image, size: tuple[int, int], decoded: tuple[int, int] | None
) -> None:
    data = encoded(photograph.resize(size), "JPEG")
    pixels, full = decode_rgb(data, ImageConfig(scaled_decode=True))
    assert full == size[::-1]
    assert pixels.shape[1:] == (decoded or full)
    assert decode_rgb(data, ImageConfig())[0].shape[1:] == full


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("asked", range(10))
def test_exif_turns_the_picture_upright(photograph: Image.Image, asked: int, scaled: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = asked
    data = encoded(photograph.resize((250, 320)), "JPEG", quality=95, exif=exif, icc_profile=b"profile" * 99)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    ours = load_image(data, ImageConfig(size=112, resize="longest", scaled_decode=scaled))
    expected = open_clips(encoded(turned, "PNG"), 112, "longest")
    assert psnr(ours.float(), expected) > (35 if scaled else 50)  # resized before or after the turn: rounded apart
    if asked in (3, 6) and not scaled:
        again = encoded(photograph.resize((250, 320)), "WEBP", exif=exif)
        assert psnr(load_image(again, ImageConfig(size=112, resize="longest")).float(), expected) > 25


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "L", {}), ("PNG", "1", {}), ("WEBP", "RGB", {"lossless": True}),
     ("GIF", "P", {}), ("JPEG", "CMYK", {"quality": 95}), ("JPEG", "L", {}), ("JPEG", "RGB", {"progressive": True}),
     ("JPEG", "RGB", {"restart_marker_rows": 1})],
)  # fmt: skip
def test_every_kind_of_file_gives_the_pixels_that_pillow_gives(
    photograph: Image.Image, form: str, mode: str, options: dict[str, Any]
) -> None:
    data = encoded(photograph.resize((320, 240)).convert(mode), form, **options)
    assert psnr(load_image(data, ImageConfig()).float(), open_clips(data, 224, "shortest")) > 60


def test_of_a_gif_the_first_frame_counts_and_sixteen_bits_are_scaled() -> None:
    red, blue = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
    moving = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert load_image(moving, ImageConfig(size=8))[:, 0, 0].tolist() == [255, 0, 0]
    deep = encoded(Image.fromarray(np.full((32, 32), 0x8000, np.uint16)), "PNG")
    assert load_image(deep, ImageConfig(size=8)).unique().tolist() == [0x80]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
     ("JPEG", "RGB", {"restart_marker_rows": 1}), ("PNG", "RGB", {}), ("WEBP", "RGB", {})],
)  # fmt: skip
def test_a_cut_file_is_refused_wherever_it_is_cut(
    photograph: Image.Image, form: str, mode: str, options: dict[str, Any], scaled: bool
) -> None:
    data = encoded(photograph.resize((160, 120)).convert(mode), form, **options)
    config = ImageConfig(size=64, scaled_decode=scaled)
    assert load_image(data, config).shape == (3, 64, 64)
    last = len(data) - (24 if form == "PNG" else 1)  # check sums and end mark of a PNG hold no pixel
    for length in np.linspace(0, last, 100).astype(int):
        with pytest.raises(BadSample) as caught:
            load_image(data[:length], config)
        assert caught.value.reason in ("not_an_image", "truncated_image", "corrupt_image")


def test_the_size_limit_holds_before_a_jpeg_is_decoded() -> None:
    with pytest.raises(BadSample, match="too_many_pixels"):
        load_image(draw((40, 30), format="JPEG"), ImageConfig(), max_pixels=1199)


def test_a_line_is_refused_before_it_is_stretched() -> None:
    """16,384 x 1 at a short side of 224 would be 3,670,016 x 224 = 822 million pixels, of which 50,176 are kept."""
    with pytest.raises(BadSample, match="3,670,016 x 224") as caught:
        load_image(draw((16_384, 1), format="PNG"), ImageConfig())
    assert caught.value.reason == "too_many_pixels"
    assert load_image(draw((1600, 1), format="PNG"), ImageConfig(resize="longest")).shape == (3, 224, 224)


def test_a_picture_owns_no_more_memory_than_it_shows() -> None:
    pixels = load_image(draw((640, 64), format="JPEG"), ImageConfig(size=64))
    assert pixels.untyped_storage().nbytes() == pixels.numel() == 3 * 64 * 64


def test_normalise_is_mean_and_std() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    config = ImageConfig()
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    torch.testing.assert_close(normalise(pixels, config), (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    room = torch.full((len(pixels), *pixels.shape[1:]), torch.nan)
    assert normalise(pixels, config, out=room) is room
    assert torch.equal(room, normalise(pixels, config))


@pytest.mark.parametrize("ground", [0, 255])
def test_transparent_pixels_take_the_ground_colour(ground: int) -> None:
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[..., 0] = 200  # hidden red below full transparency
    picture[4:, :, 3] = 255
    stream = io.BytesIO()
    Image.fromarray(picture, "RGBA").save(stream, "PNG")
    pixels, _ = decode_rgb(stream.getvalue(), ImageConfig(ground=ground))
    assert pixels[:, 0, 0].tolist() == [ground] * 3
    assert pixels[:, 7, 7].tolist() == [200, 0, 0]
