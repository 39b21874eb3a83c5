"""Textures, patches and warps: as many pictures as asked for, all from random numbers that belong to the sample."""

import numpy as np
import pytest
import torch

from data_pipelines.augment import AugmentConfig, augment
from data_pipelines.boxes import BoxConfig
from data_pipelines.data_config import DataConfig
from data_pipelines.errors import ConfigError
from data_pipelines.preprocess import ImageConfig
from data_pipelines.textures import OPACITY

COUNT, SIDE = 64, 32


def run(level: int, **options: float) -> torch.Tensor:
    """Plain pictures of one grey level, changed."""
    return part(level, range(COUNT), 3, options)


def part(level: int, rows: range, channels: int, options: dict[str, float]) -> torch.Tensor:
    """Those of some rows."""
    plain = torch.full((len(rows), channels, SIDE, SIDE), level, dtype=torch.uint8)
    config = AugmentConfig.model_validate({**options, "ground": 0})
    return augment(plain, config, np.random.default_rng(3), COUNT, rows)


def changed(level: int, **options: float) -> torch.Tensor:
    """B: the share of a picture's places that differ."""
    return (run(level, **options) != level).any(dim=1).float().mean(dim=(1, 2))


def test_an_overlay_covers_the_share_of_pictures_that_is_asked_for_and_shows_what_is_below() -> None:
    assert (changed(0, overlay=1.0) > 0.05).float().mean() > 0.9
    assert 0.25 < (changed(0, overlay=0.5) > 0.05).float().mean() < 0.65
    assert run(0, overlay=1.0).max() <= 255 * OPACITY + 1
    assert run(255, overlay=1.0).min() >= 255 * (1 - OPACITY) - 1


def test_textures_differ_from_picture_to_picture_in_scale_direction_and_colour() -> None:
    found = run(0, overlay=1.0).float()
    across, down = (found.diff(dim=axis).abs().mean(dim=(1, 2, 3)) for axis in (3, 2))
    ratio = (across + 0.01) / (down + 0.01)
    assert ratio.min() < 0.3
    assert ratio.max() > 3.0
    grey = (found == found[:, :1]).flatten(1).all(dim=1).float().mean()
    assert 0.3 < grey < 0.75
    assert part(0, range(COUNT), 1, {"overlay": 1.0}).shape[1] == 1


def test_a_patch_is_a_small_rectangle_of_opaque_texture() -> None:
    share = changed(7, patch=1.0)
    assert 0 < share.max() <= 0.36**2
    assert 0.3 < (changed(7, patch=0.5) > 0).float().mean() < 0.7
    for place in (run(7, patch=1.0) != 7).any(dim=1):
        rows, columns = place.any(dim=1).nonzero(), place.any(dim=0).nonzero()
        assert rows.numel() == 0 or int(rows.max() - rows.min()) <= 0.34 * SIDE
        assert columns.numel() == 0 or int(columns.max() - columns.min()) <= 0.34 * SIDE


def test_a_warp_moves_half_of_the_pictures_smoothly_by_no_more_than_it_may() -> None:
    ramp = torch.arange(SIDE, dtype=torch.float32).expand(COUNT, 1, SIDE, SIDE) + 50.0
    config = AugmentConfig(warp=0.05, ground=0)
    moved = (augment(ramp, config, np.random.default_rng(3), COUNT, range(COUNT)) - ramp)[:, 0, 8:-8, 8:-8]
    still = moved.abs().amax(dim=(1, 2)) < 1e-3
    assert 0.3 < still.float().mean() < 0.7
    assert 0.5 < moved.abs().max() <= 2 * 1.3 * 0.05 * SIDE, "uniform from twice the mean to none, a bicubic overshoots"
    assert moved.diff(dim=2).abs().max() < 0.6


def test_a_rank_sees_its_rows_of_the_global_batch() -> None:
    options = {"overlay": 0.5, "patch": 0.5, "warp": 0.1}
    parts = [part(90, range(start, start + 16), 3, options) for start in range(0, COUNT, 16)]
    assert torch.equal(torch.cat(parts), part(90, range(COUNT), 3, options))


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.overlay=0\.5 needs RGB pictures"):
        DataConfig(
            train="x", image=ImageConfig(channels=1, mean=(0.5,), std=(0.5,)), augment=AugmentConfig(overlay=0.5)
        )
    with pytest.raises(ConfigError, match=r"data\.augment\.warp=0\.1 bends pictures, and data\.boxes cannot follow"):
        DataConfig(train="x", augment=AugmentConfig(warp=0.1), boxes=BoxConfig())
