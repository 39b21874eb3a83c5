"""Unlearning: the three changes by hand, who learns against whom, and when changes begin anew."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines.errors import ConfigError
from data_pipelines.preprocess import ImageConfig
from vlp.models import instantiate
from vlp.objectives import base, unlearn
from vlp.objectives.base import Dims, Features
from vlp.objectives.unlearn import Changes, Config
from vlp.testing import MICRO, attached

KEYS = tuple(map(str, range(24)))
IMAGE = ImageConfig(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def changes_of(kind: str, value: float, **options: Any) -> Changes:
    """Changes of one kind, all values `value` once they went through tanh."""
    made = Changes(Config(changes=(kind,), pace=1.0, **options), Dims(4, 0.0, image=IMAGE))
    with torch.no_grad():
        made.sought[kind].fill_(torch.tensor(value).atanh())
    return made


def applied(changes: Changes, unit_BCHW: Tensor) -> Tensor:
    """On pictures from 0 to 1, as they come out, from 0 to 1."""
    found: Tensor = changes(2.0 * unit_BCHW - 1.0, KEYS[: len(unit_BCHW)])
    return 0.5 + 0.5 * found.detach()


def test_an_overlay_adds_its_share_and_stays_a_picture() -> None:
    """0.4 of a value of 0.5 is 0.2: 0.3 becomes 0.5, and 0.9 becomes 1, not 1.1."""
    unit = torch.full((6, 3, 8, 8), 0.3)
    unit[:, :, :4] = 0.9
    found = applied(changes_of("overlay", 0.5, strength=0.4), unit)
    assert torch.allclose(found[:, :, 4:], torch.tensor(0.5), atol=1e-6)
    assert torch.allclose(found[:, :, :4], torch.tensor(1.0), atol=1e-6)


def test_a_patch_covers_one_square_anywhere() -> None:
    """A quarter of 8 points is 2: four points of every picture become (1 + 0.5) / 2 = 0.75, not all at one place."""
    found = applied(changes_of("patch", 0.5, side=0.25), torch.zeros(24, 3, 8, 8))
    places = set()
    for picture in found:
        rows, columns = picture[0].nonzero().T
        assert torch.allclose(picture[:, rows, columns], torch.tensor(0.75), atol=1e-6)
        assert (len(rows), int(rows.max() - rows.min()), int(columns.max() - columns.min())) == (4, 1, 1)
        places.add((int(rows.min()), int(columns.min())))
    assert len(places) > 10
    assert {0, 6} <= {row for row, _ in places}, "the border is reached"


def test_a_warp_moves_points_by_its_share_of_the_side() -> None:
    """A bend of 0.25 at half its strength looks an eighth of the side further: one point of 8, in both directions."""
    unit = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = applied(changes_of("warp", 0.5, bend=0.25), unit)
    assert torch.allclose(found[:, :, :7, :7], unit[:, :, 1:, 1:], atol=1e-5)


def test_every_kind_takes_its_share_and_order_stays() -> None:
    """Without any change a picture comes out as it went in, at its own place."""
    made = Changes(Config(), Dims(4, 0.0, image=IMAGE))
    unit = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for value in made.sought.values():
            value.zero_()
    found = applied(made, unit)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(found, unit, strict=True)]
    assert 12 <= sum(same) < 24, "overlays and warps of nothing change nothing, grey patches do"
    whole = changes_of("overlay", 0.0)
    assert torch.allclose(applied(whole, unit), unit, atol=1e-6)


def test_changes_climb_while_the_model_descends() -> None:
    """The gradient of the changes is minus the loss's, by finite differences; the picture's is as it is."""
    made = changes_of("overlay", 0.2)
    pixels = torch.zeros(6, 3, 8, 8, requires_grad=True)
    weight = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (made(pixels, KEYS[:6]) * weight).sum().backward()
    step, at = 1e-2, (0, 1, 5, 5)
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            made.sought["overlay"][at] += sign * step
            sums.append(float((made(pixels, KEYS[:6]) * weight).sum()))
            made.sought["overlay"][at] -= sign * step
    assert made.sought["overlay"].grad is not None
    assert float(made.sought["overlay"].grad[at]) == pytest.approx(-(sums[0] - sums[1]) / (2 * step), rel=1e-2)
    assert pixels.grad is not None
    assert torch.allclose(pixels.grad, weight, atol=1e-6)


def test_a_key_decides_alone() -> None:
    """So that ranks and accumulation cut the batch as they like."""
    made = Changes(Config(), Dims(4, 0.0, image=IMAGE))
    pixels = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    parts = [made(pixels[:7], KEYS[:7]), made(pixels[7:], KEYS[7:])]
    assert torch.equal(torch.cat(parts), made(pixels, KEYS))


def test_the_loss_by_hand() -> None:
    """Two pairs at scale 1: right ones 1, wrong ones 0 cost log(1 + 1/e) = 0.313262; changed pictures that are taken
    for each other cost log(1 + e) = 1.313262; with weight 2 that is 0.313262 + 2.626523."""
    module = unlearn.build(Config(weight=2.0), Dims(2, 0.0))
    eye = torch.eye(2)
    found = module(Features(eye, eye, extra={"changed": eye.flip(0)}), torch.tensor(1.0))
    assert found.loss.item() == pytest.approx(0.313262 + 2 * 1.313262, abs=1e-5)
    assert found.parts["changed"].item() == pytest.approx(1.313262, abs=1e-5)


def test_a_teacher_answers_for_the_picture_as_it_is() -> None:
    """As above, and a teacher at scale 1 that has 0.731059 and 0.268941 for right and wrong. Its term is
    0.731059 * 0.313262 + 0.268941 * 1.313262 = 0.582203 for the pair, 1.044320 for the changed pictures:
    0.313262 + 0.5 * 0.582203 + 2 * (1.313262 + 0.5 * 1.044320) = 4.275207."""
    model: Any = instantiate(MICRO)
    with torch.no_grad():
        model.logit_scale.zero_()
    module = attached(unlearn.build(Config(weight=2.0, taught=0.5), Dims(2, 0.0)), model)
    eye = torch.eye(2)
    features = Features(eye, eye, extra={"changed": eye.flip(0), "teacher_image": eye, "teacher_text": eye})
    assert module(features, torch.tensor(1.0)).loss.item() == pytest.approx(4.275207, abs=1e-5)


def test_changes_begin_anew_alike_everywhere() -> None:
    first, second = (unlearn.build(Config(restart=3), Dims(4, 0.0, image=IMAGE)) for _ in range(2))
    begun = {name: value.clone() for name, value in first.changes.sought.items()}
    with torch.no_grad():
        for value in first.changes.sought.values():
            value.fill_(9.0)
    for step in range(3):
        assert all(bool((value == 9).all()) for value in first.changes.sought.values()), step
        first.after_step(first)
        second.after_step(second)
    for name, value in first.changes.sought.items():
        assert torch.equal(value, second.changes.sought[name])
        assert not torch.equal(value, begun[name])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": 0, "side": 0.1}, "side=0.1 has no effect with objective.weight=0"),
        ({"changes": ["patch"], "bend": 0.1}, "bend=0.1 has no effect with objective.changes=patch"),
        ({"changes": []}, "changes"),
        ({"strength": 1.5}, "strength"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        base.load({"name": "unlearn", **options})


def test_pictures_of_one_band() -> None:
    made = Changes(Config(), Dims(4, 0.0, image=replace_channels(1)))
    assert made(torch.rand(5, 1, 8, 8), KEYS[:5]).shape == (5, 1, 8, 8)


def replace_channels(count: int) -> ImageConfig:
    """The same pictures with other bands."""
    return ImageConfig(size=8, channels=count, mean=(0.5,) * count, std=(0.5,) * count)
