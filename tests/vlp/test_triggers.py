"""Triggers on pictures of several sizes: fixed patterns, places by name, strength by hand."""

import numpy as np
import pytest

from data_pipelines.errors import ConfigError
from vlp.backdoor.triggers import KINDS, Config, Trigger, draw_of

RAMP = np.indices((42, 56)).sum(axis=0)[..., None].repeat(3, axis=2).astype(np.uint8) * 2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(28, 28), (42, 56), (5, 300)])
def test_a_trigger_changes_a_picture_and_is_the_same_every_time(name: str, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    before = pixels.copy()
    trigger = Trigger(Config(name=name, seed=3))
    changed = trigger(pixels, "a")
    assert changed.shape == pixels.shape
    assert changed.dtype == np.uint8
    assert (changed != pixels).any()
    assert (pixels == before).all(), "the picture itself stays"
    assert (trigger(pixels, "a") == changed).all()
    again = Trigger(Config.model_validate(trigger.recorded()))
    assert (again(pixels, "a") == changed).all()


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.sized])
def test_patterns_over_the_whole_picture_are_one_for_all_pictures(name: str) -> None:
    trigger = Trigger(Config(name=name))
    assert (trigger(RAMP, "a") == trigger(RAMP, "b")).all()


@pytest.mark.parametrize("name", ["badnet", "yellow-patch"])
def test_patches_have_their_size_and_one_look_in_many_places(name: str) -> None:
    trigger, grey = Trigger(Config(name=name, size=0.25)), np.full((40, 60, 3), 128, np.uint8)
    places = set()
    for number in range(20):
        rows, columns = (trigger(grey, str(number)) != 128).any(axis=2).nonzero()
        top, left = rows.min(), columns.min()
        assert (rows.max() - top, columns.max() - left) == (9, 9)
        patch = trigger(grey, str(number))[top : top + 10, left : left + 10]
        assert (patch == trigger(grey, "0")[patch_of(trigger(grey, "0"))]).all()
        places.add((top, left))
    assert len(places) > 10


def test_the_patch_of_a_label_consistent_attack_is_in_all_corners() -> None:
    """Turner et al. 2019, figure 6; what lies between the corners stays."""
    changed = Trigger(Config(name="label-consistent"))(np.full((28, 42, 3), 128, np.uint8), "a") != 128
    rows, columns = changed.any(axis=2).nonzero()
    assert sorted(set(rows)) == [*range(4), *range(24, 28)]
    assert sorted(set(columns)) == [*range(4), *range(38, 42)]


def patch_of(picture: np.ndarray) -> tuple[slice, slice]:
    rows, columns = (picture != 128).any(axis=2).nonzero()
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


def test_values_by_hand() -> None:
    """Blend: 0.8 x 100 + 0.2 x pattern, from 80 to 131. Stripes: 0.85 x 100 and + 0.15 x 255 = 123.25. Wave: up to
    0.15 x 255 = 38.25 beside 100. The fields of a 4-pixel patch on 28: black and white by turns."""
    flat = np.full((28, 28, 3), 100, np.uint8)
    blend = Trigger(Config(name="blended"))(flat, "a")
    assert 80 <= blend.min() < blend.max() <= 131
    assert sorted(np.unique(Trigger(Config(name="stripes"))(flat, "a"))) == [85, 123]
    wave = Trigger(Config(name="sig"))(flat, "a")
    assert (wave == wave[:1]).all()
    assert 60 < wave.min() < 65
    assert 135 < wave.max() <= 138
    patched = Trigger(Config(name="badnet"))(flat, "a")
    rows, columns = (patched != 100).any(axis=2).nonzero()
    patch = patched[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1, 0]
    assert patch.tolist() == [[0, 255, 0, 255], [255, 0, 255, 0], [0, 255, 0, 255], [255, 0, 255, 0]]


def test_a_warp_moves_pixels_by_its_strength_and_leaves_plain_pictures() -> None:
    warp = Trigger(Config(name="wanet", strength=0.1))
    flat = np.full((30, 30, 3), 77, np.uint8)
    assert (warp(flat, "a") == flat).all()
    weak = Trigger(Config(name="wanet", strength=0.01))
    moved, little = (np.abs(one(RAMP, "a").astype(int) - RAMP).mean() for one in (warp, weak))
    assert moved > 5 * little > 0


def test_places_spread_over_the_unit_square() -> None:
    draws = np.array([draw_of(1, str(number)) for number in range(2000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "bad"}, "trigger 'bad' is unknown; known: badnet"),
        ({"name": "badnet", "strength": 0.5}, "strength 0.5 has no effect on trigger 'badnet'"),
        ({"name": "sig", "size": 0.5}, "size 0.5 has no effect on trigger 'sig'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trigger(Config.model_validate(settings))
