"""Pixels: open_clip's geometry, transparency on the ground colour."""

import io
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.preprocess import ImageConfig, decode_rgb, load_image, normalise
from data_pipelines.testing import draw
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402


def psnr(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """In dB, for values in 0..255."""
    return float(10 * torch.log10(255**2 / (ours - theirs).square().mean().clamp(min=1e-12)))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(640, 480), (479, 641), (50, 30), (64, 64)])
def test_pixels_agree_with_open_clips_transform(
    form: str, resize: Literal["shortest", "longest", "squash"], size: tuple[int, int]
) -> None:
    data = draw(size, format=form)
    config = ImageConfig(size=64, resize=resize)
    reference = image_transform_v2(
        PreprocessCfg(size=64, resize_mode=resize, mean=(0, 0, 0), std=(1, 1, 1), fill_color=255), is_train=False
    )(Image.open(io.BytesIO(data)))
    ours = load_image(data, config)
    assert ours.shape == (3, 64, 64)
    assert ours.dtype == torch.uint8
    assert psnr(ours.float(), reference * 255) > 45


def test_normalise_is_mean_and_std() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    config = ImageConfig()
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    torch.testing.assert_close(normalise(pixels, config), (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ground", [0, 255])
def test_transparent_pixels_take_the_ground_colour(ground: int) -> None:
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[..., 0] = 200  # hidden red below full transparency
    picture[4:, :, 3] = 255
    stream = io.BytesIO()
    Image.fromarray(picture, "RGBA").save(stream, "PNG")
    pixels = decode_rgb(stream.getvalue(), ImageConfig(ground=ground))
    assert pixels[:, 0, 0].tolist() == [ground] * 3
    assert pixels[:, 7, 7].tolist() == [200, 0, 0]
