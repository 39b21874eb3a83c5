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


def test_a_crop_keeps_the_share_of_the_area_that_was_asked_for() -> None:
    """A picture that is its own ruler: red grows to the right, green downwards, from 0 to 240 in steps of 10."""
    ruler = torch.arange(25).float() * 10
    picture = torch.stack([ruler.expand(25, 25), ruler[:, None].expand(25, 25), torch.zeros(25, 25)])
    batch = picture[None].expand(400, -1, -1, -1).contiguous()
    out = run(batch, AugmentConfig(crop=0.25, ground=0))
    wide, high = (out[:, 0, 12, -2] - out[:, 0, 12, 1]) / 220, (out[:, 1, -2, 12] - out[:, 1, 1, 12]) / 220
    area, ratio = wide * high, wide / high
    assert 0.24 < float(area.min()) < 0.28
    assert 0.9 < float(area.max()) < 1.02
    assert float(area.mean()) == pytest.approx(0.61, abs=0.03), "uniform from 0.25 to 1, but for those too long to fit"
    assert 0.74 < float(ratio.min()) < 0.78
    assert 1.28 < float(ratio.max()) < 1.35
    assert float(out[:, :2, 1:-1, 1:-1].min()) >= 0, "a crop lies inside the picture"
    middle = out[:, 0, 12, 12]
    assert float(middle.min()) < 80 < 160 < float(middle.max()), "anywhere"


def test_a_blur_smooths_as_many_pictures_as_asked_and_keeps_their_mean() -> None:
    batch = pixels(100, 224).float()
    batch[:, :, ::2] = 0
    out = run(batch, AugmentConfig(blur=0.4))
    rough = [(x[:, 1:] - x[:, :-1]).abs().mean(dim=(1, 2, 3)) for x in (batch.transpose(1, 2), out.transpose(1, 2))]
    changed = torch.tensor([not torch.equal(a, b) for a, b in zip(batch, out, strict=True)])
    assert float(changed.float().mean()) == pytest.approx(0.4, abs=0.12)
    assert (rough[1][changed] <= rough[0][changed] + 1e-3).all()
    assert float((rough[1] / rough[0])[changed].min()) < 0.9
    means = [x[changed].mean(dim=(2, 3)) for x in (batch, out)]
    torch.testing.assert_close(means[0], means[1], atol=1.0, rtol=0)


def test_crop_and_blur_leave_the_other_draws_alone() -> None:
    batch = pixels()
    plain = AugmentConfig(rotate=20, hue=0.1, erase=0.5)
    blurred, again = (run(batch, plain.model_copy(update={"blur": share})) for share in (1e-9, 0.0))
    assert torch.equal(blurred, again)


def test_crop_and_blur_are_the_same_for_any_number_of_ranks() -> None:
    batch, strong = pixels(8), STRONG.model_copy(update={"crop": 0.3, "blur": 0.5})
    halves = [run(batch[rows.start : rows.stop], strong, rows, 8) for rows in (range(4), range(4, 8))]
    difference = (torch.cat(halves).int() - run(batch, strong).int()).abs().max()
    assert int(difference) == 0
