"""Batch augmentation: off means untouched, each operation does what it says, ranks change nothing."""

import numpy as np
import pytest
import torch

from data_pipelines.augment import AugmentConfig, augment

STRONG = AugmentConfig(
    flip=0.5, rotate=20, scale=0.3, shift=0.1, shear=10, aspect=0.1, brightness=0.3, contrast=0.3, saturation=0.3,
    hue=0.1, grey=0.2, erase=0.5,
)  # fmt: skip


def pixels(count: int = 8, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").to(torch.uint8)


def run(
    batch: torch.Tensor, config: AugmentConfig, rows: range | None = None, total: int | None = None
) -> torch.Tensor:
    rows = rows or range(len(batch))
    return augment(batch, config, np.random.default_rng(0), total or len(batch), rows)


def test_off_returns_the_same_tensor() -> None:
    batch = pixels()
    assert run(batch, AugmentConfig()) is batch


def test_all_strengths_change_pixels_and_keep_shape_and_type() -> None:
    batch = pixels()
    out = run(batch, STRONG)
    assert out.shape == batch.shape
    assert out.dtype == torch.uint8
    assert all(not torch.equal(a, b) for a, b in zip(batch, out, strict=True))


def test_a_rank_sees_its_rows_of_the_global_batch() -> None:
    batch = pixels(8)
    whole = run(batch, STRONG)
    parts = [run(batch[4 * rank : 4 * rank + 4], STRONG, range(4 * rank, 4 * rank + 4), 8) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_certain_flip_is_the_mirror_image() -> None:
    batch = pixels()
    difference = run(batch, AugmentConfig(flip=1.0)).int() - batch.flip(3).int()
    assert difference.abs().max() <= 1


def test_certain_grey_has_equal_channels() -> None:
    out = run(pixels(), AugmentConfig(grey=1.0)).int()
    assert (out - out[:, :1]).abs().max() <= 1


def test_hue_keeps_grey_pixels_and_moves_colours() -> None:
    grey = torch.full((4, 3, 6, 6), 120, dtype=torch.uint8)
    assert (run(grey, AugmentConfig(hue=0.5)).int() - 120).abs().max() <= 1
    red = torch.zeros(4, 3, 6, 6, dtype=torch.uint8)
    red[:, 0] = 200
    assert not torch.equal(run(red, AugmentConfig(hue=0.5)), red)


@pytest.mark.parametrize("ground", [0, 255])
def test_what_a_shift_uncovers_has_the_ground_colour(ground: int) -> None:
    batch = torch.full((16, 3, 20, 20), 100, dtype=torch.uint8)
    out = run(batch, AugmentConfig(shift=0.4, ground=ground))
    assert set(out.unique().tolist()) >= {100, ground}
    assert (out == ground).float().mean() > 0.05


def test_erasing_paints_a_rectangle() -> None:
    batch = torch.full((16, 3, 30, 30), 100, dtype=torch.uint8)
    share = (run(batch, AugmentConfig(erase=1.0)) == 255).float().mean(dim=(1, 2, 3))
    assert share.min() > 0.004
    assert share.max() < 0.14


def test_colours_of_the_drawing_change_and_its_ground_stays() -> None:
    batch = torch.full((16, 3, 20, 20), 255, dtype=torch.uint8)
    batch[:, 0, 5:15, 5:15] = 90
    batch[:, 1:, 5:15, 5:15] = 30
    out = run(batch, AugmentConfig(brightness=0.2, contrast=0.3, saturation=0.5, hue=0.1))
    ground = torch.ones(20, 20, dtype=torch.bool)
    ground[5:15, 5:15] = False
    assert (out[:, :, ground] == 255).all()
    assert (out[:, :, ~ground] != batch[:, :, ~ground]).float().mean() > 0.8
