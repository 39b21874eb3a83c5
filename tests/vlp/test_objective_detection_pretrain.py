"""Random boxes, pooling over them, and the loss over levels: by hand, against slow versions, and in a run."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import BundleError, ConfigError
from vlp.bundle import save_bundle
from vlp.detection.model import NAME, PartsConfig, make_parts
from vlp.flops import count
from vlp.models import instantiate
from vlp.objectives import base, clip, detection_pretrain
from vlp.objectives.base import Dims, Features
from vlp.objectives.detection_pretrain import (
    Config,
    DetectionPretrain,
    attention_scores,
    build,
    pool_boxes,
    random_boxes,
    start_parts,
)
from vlp.testing import MICRO, MICRO_OPTIONS, full_batch, micro_bundle, network_input

DIMS = Dims(16, math.log(10))
PARTS = MICRO_OPTIONS["detection_pretrain"]["parts"]
SMALL = PartsConfig.model_validate(PARTS)


def made(dims: dict[str, Any] | None = None, /, **options: Any) -> tuple[Any, DetectionPretrain]:
    torch.manual_seed(0)
    model = instantiate(MICRO)
    objective = build(Config.model_validate({"boxes": 3, "parts": PARTS, **options}), replace(DIMS, **(dims or {})))
    objective.attach(model)
    return model, objective


def test_boxes_depend_on_key_update_and_seed_alone() -> None:
    config = Config(boxes=5)
    first = random_boxes(["a", "b", "c"], 7, config)
    assert torch.equal(random_boxes(["c", "a"], 7, config), first[[2, 0]])
    for other in (random_boxes(["a"], 8, config), random_boxes(["a"], 7, Config(boxes=5, seed=1))):
        assert not torch.equal(other[0, 1:], first[0, 1:])
    assert first[:, 0].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 3
    assert not (random_boxes(["a"], 7, Config(boxes=5, whole=False))[0, 0] == torch.tensor([0.0, 0, 1, 1])).all()


@pytest.mark.parametrize(("low", "high", "aspect"), [(0.15, 0.8, 2.0), (0.3, 0.3, 1.0), (0.01, 1.0, 9.0)])
def test_boxes_lie_in_the_picture_and_have_the_sides_asked_for(low: float, high: float, aspect: float) -> None:
    config = Config(boxes=64, min_side=low, max_side=high, max_aspect=aspect, whole=False)
    boxes = random_boxes([str(n) for n in range(50)], 0, config).flatten(0, 1)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0
    assert boxes.max() <= 1 + 1e-6
    assert sides.min() >= low - 1e-6
    assert sides.max() <= high + 1e-6
    ratio = (sides[:, 0] / sides[:, 1]).log().abs()
    assert ratio.max() <= math.log(aspect) + 1e-4
    if aspect > 1:
        assert ratio.max() > 0.9 * math.log(aspect), "the odd ones are drawn too"
        middle = (boxes[:, :2] + sides / 2).mean(dim=0)
        assert (middle - 0.5).abs().max() < 0.02, "they are spread evenly"


def test_pooling_by_hand() -> None:
    """Boxes (0.6, 0.8) and (0.8, -0.6): their maximum is (0.8, 0.8), of length one (0.7071, 0.7071).

    Their mean is (0.7, 0.1), of length 0.70711: (0.98995, 0.14142).
    """
    regions = torch.tensor([[[0.6, 0.8], [0.8, -0.6]]])
    torch.testing.assert_close(pool_boxes(regions, "max"), torch.full((1, 2), 0.5**0.5))
    torch.testing.assert_close(pool_boxes(regions, "mean"), torch.tensor([[0.98995, 0.14142]]), atol=1e-5, rtol=0)


def test_attention_by_hand() -> None:
    """Boxes on both axes, a text on the first, temperature 1 / log 3: weights 3 / 4 and 1 / 4.

    The sum (0.75, 0.25) has length 0.790569; its cosine with the text is 0.948683. At temperatures near zero the text
    sees its own box alone, 1; at very high ones their mean, 0.707107.
    """
    regions, text = torch.eye(2)[None], torch.tensor([[1.0, 0.0]])
    for temperature, expected in ((1 / math.log(3), 0.948683), (1e-3, 1.0), (1e6, 0.707107)):
        assert attention_scores(regions, text, temperature).item() == pytest.approx(expected, abs=1e-5)


def slow_scores(regions_RMD: Tensor, text_CD: Tensor, temperature: float) -> Tensor:
    """Pair by pair."""
    rows = []
    for regions in regions_RMD:
        row = []
        for text in text_CD:
            weights = torch.stack([(region * text).sum() / temperature for region in regions]).softmax(dim=0)
            pooled = sum((w * region for w, region in zip(weights, regions, strict=True)), torch.zeros_like(text))
            row.append((F.normalize(pooled, dim=0) * text).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_attention_equals_the_slow_definition_with_gradients() -> None:
    torch.manual_seed(0)
    values = F.normalize(torch.randn(3, 4, 5), dim=-1), F.normalize(torch.randn(6, 5), dim=-1)
    weight, grads = torch.randn(3, 6), []
    for function in (attention_scores, slow_scores):
        regions, text = (value.clone().requires_grad_() for value in values)
        found = function(regions, text, 0.3)
        (found * weight).sum().backward()
        assert regions.grad is not None
        assert text.grad is not None
        grads.append((found.detach(), regions.grad, text.grad))
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_the_loss_by_hand() -> None:
    """Two levels, scale 2: regions equal to their texts on the axes cost log(1 + e^-2) = 0.126928, all-equal ones ln 2.

    Their mean is 0.410038; CLIP between whole pictures that sit right adds half of 0.126928: 0.473502.
    """
    eye, same = torch.eye(2), torch.full((2, 2), 0.5**0.5)
    objective = build(Config(clip_weight=0.5), DIMS)
    output = objective(Features(eye, eye, extra={"level 0": eye, "level 1": same}), torch.tensor(2.0))
    assert output.loss.item() == pytest.approx(0.473502, abs=1e-5)
    assert {name: round(float(value), 5) for name, value in output.parts.items()} == {
        "image_to_text": 0.12693, "text_to_image": 0.12693, "level_0": 0.12693, "level_1": 0.69315,
    }  # fmt: skip


def test_the_crop_term_by_hand() -> None:
    """Cosines 1, 0.5, 0 and 0.5 of two pictures with two boxes each: 1 - 0.5, weighed 2; beside it one level's ln 2."""
    same, cosines = torch.full((2, 2), 0.5**0.5), torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    objective = build(Config(crop_weight=2), replace(DIMS, weights="x"))
    output = objective(Features(same, same, extra={"level 0": same, "crop": cosines}), torch.tensor(2.0))
    assert output.loss.item() == pytest.approx(1 + math.log(2), abs=1e-5)
    assert {name: round(float(value), 5) for name, value in output.parts.items()} == {"level_0": 0.69315, "crop": 0.5}


@pytest.mark.parametrize("region_weight", [0.0, 0.3])
def test_boxes_are_compared_with_what_the_first_tower_makes_of_them_as_pictures(region_weight: float) -> None:
    """Box by box, every crop read off the picture by its own grid of points."""
    sides = {"min_side": 0.5, "max_side": 0.5, "max_aspect": 1.0, "whole": False}
    model, objective = made({"weights": "x"}, crop_weight=1.0, region_weight=region_weight, boxes=2, **sides)
    first = copy.deepcopy(model.visual)
    with torch.no_grad():  # the teacher stays what the tower was
        for parameter in model.parameters():
            parameter.add_(0.05)
    pixels, batch = network_input(full_batch(3))
    features = objective.encode(model, pixels, batch)
    assert ("level 0" in features.extra) == bool(region_weight)
    assert objective.parts is not None
    boxes = random_boxes(batch.keys, 0, objective.config)
    side = pixels.shape[-1]
    regions = objective.parts.embed(objective.parts.levels(objective._tower[0], pixels), boxes)
    for row, found in enumerate(features.extra["crop"]):
        for box, cosine in zip(boxes[row], found, strict=True):
            grid = [
                (low + (high - low) * (torch.arange(side) + 0.5) / side) * 2 - 1
                for low, high in zip(box[:2], box[2:], strict=True)
            ]
            places = torch.stack(torch.meshgrid(grid[1], grid[0], indexing="ij")[::-1], dim=-1)
            crop = F.grid_sample(pixels[row : row + 1], places[None], padding_mode="border", align_corners=False)
            taught = F.normalize(first.eval()(crop), dim=-1)[0]
            number = [torch.equal(box, other) for other in boxes[row]].index(True)
            expected = torch.stack([level[row, number] @ taught for level in regions]).mean()
            torch.testing.assert_close(cosine, expected, rtol=1e-4, atol=1e-5)
    objective(features, torch.tensor(10.0)).loss.backward()
    assert all(parameter.grad is None for parameter in objective._teacher[0].parameters())
    moved = {name.partition(".")[0] for name, value in objective.parts.named_parameters() if value.grad is not None}
    assert moved == {"pyramid", "region"}
    assert not any("teacher" in name for name in objective.state_dict())


def test_the_first_tower_must_have_learned_something_and_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"crop_weight=1\.0 teaches .* set model\.weights"):
        made(crop_weight=1)
    monkeypatch.setattr(detection_pretrain, "any_sharded", lambda _parameters: True)
    with pytest.raises(ConfigError, match="run.strategy=ddp"):
        made({"weights": "x"}, crop_weight=1)


@pytest.mark.parametrize("pool", ["max", "mean", "attention"])
def test_every_pool_masks_and_smooths_as_clip_does(pool: str) -> None:
    """One box a picture: whatever the pool, the loss of its level is CLIP's on that box."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    ids = torch.tensor([[1], [2], [1], [3], [4]])
    options = {"mask": "captions", "smoothing": 0.1, "image_weight": 0.7}
    expected = clip.clip_loss(Features(image, text, ids), torch.tensor(9.0), clip.Config.model_validate(options))[0]
    objective = build(Config.model_validate({"pool": pool, "clip": options}), DIMS)
    level = image[:, None] if pool == "attention" else image
    found = objective(Features(text, text, ids, extra={"level 0": level}), torch.tensor(9.0)).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pool", ["max", "attention"])
def test_encode_gives_each_level_its_pooled_regions(pool: str) -> None:
    model, objective = made(pool=pool)
    pixels, batch = network_input(full_batch())
    features = objective.encode(model, pixels, batch)
    assert objective.parts is not None
    levels = objective.parts.levels(objective._tower[0], pixels)
    regions = objective.parts.embed(levels, random_boxes(batch.keys, 0, objective.config))
    for number, own in enumerate(regions):
        expected = own if pool == "attention" else pool_boxes(own, "max")
        torch.testing.assert_close(features.extra[f"level {number}"], expected)


def test_boxes_change_with_updates_which_are_resumed() -> None:
    model, objective = made()
    inputs = network_input(full_batch())
    first = objective.encode(model, *inputs).extra["level 0"]
    objective.after_step(model)
    second = objective.encode(model, *inputs).extra["level 0"]
    assert not torch.allclose(first, second)
    _, other = made()
    other.load_state_dict(objective.state_dict())
    assert int(other.updates) == 1
    torch.testing.assert_close(other.encode(model, *inputs).extra["level 0"], second)


def test_parts_of_a_batch_see_the_boxes_of_the_whole() -> None:
    model, objective = made()
    pixels, batch = network_input(full_batch(6))
    whole = objective.encode(model, pixels, batch)
    parts = batch.split(3)
    found = Features.cat([objective.encode(model, p, b) for p, b in zip(pixels.split(2), parts, strict=True)])
    for own, expected in zip(found.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(own, expected)


def test_what_is_trained_and_what_is_handed_over() -> None:
    """Regions train tower, pyramid and region head; the dense head and the classifier wait for fine-tuning."""
    model, objective = made()
    objective(objective.encode(model, *network_input(full_batch())), torch.tensor(10.0)).loss.backward()
    parts = objective.extra_parts()[NAME]
    moved = {name for name, value in parts.named_parameters() if value.grad is not None}
    assert {name.partition(".")[0] for name in moved} == {"pyramid", "region"}
    assert all(value.requires_grad == (name in moved) for name, value in parts.named_parameters())
    assert model.visual.conv1.weight.grad is not None


def test_a_run_goes_on_with_the_parts_of_its_weights(tmp_path: Path) -> None:
    bundle = micro_bundle()
    parts = make_parts(SMALL, bundle.model, 16)
    bundle.parts[NAME] = parts
    folder = save_bundle(bundle, tmp_path / "bundle")
    from_weights = start_parts(None, None, replace(DIMS, weights=str(tmp_path)), bundle.model)
    from_start = start_parts(SMALL, folder, DIMS, bundle.model)
    for found in (from_weights, from_start):
        assert all(torch.equal(found.state_dict()[name], value) for name, value in parts.state_dict().items())
    with pytest.raises(ConfigError, match=r"objective\.parts\.width=9, but the parts in .* have 8"):
        start_parts(SMALL.model_copy(update={"width": 9}), folder, DIMS, bundle.model)
    with pytest.raises(ConfigError, match="ends in 16 numbers, the model's space has 8"):
        start_parts(None, folder, replace(DIMS, embed=8), bundle.model)
    plain = save_bundle(micro_bundle(), tmp_path / "plain")
    fresh = start_parts(SMALL, None, replace(DIMS, weights=str(plain)), bundle.model)
    assert fresh.config == SMALL
    with pytest.raises(BundleError, match=r"holds no detection\.json"):
        start_parts(None, plain, DIMS, bundle.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"region_weight": 0}, "all 0"),
        ({"min_side": 0.5, "max_side": 0.4}, "min_side=0.5 is above"),
        ({"pool_temperature": 0.2}, "pool_temperature=0.2 has no effect with objective.pool=max"),
        (
            {"region_weight": 0, "clip_weight": 1, "boxes": 4},
            "boxes=4 has no effect with objective.region_weight=0 and",
        ),
        ({"region_weight": 0, "crop_weight": 1, "pool": "mean"}, "pool=mean has no effect"),
        ({"pool": "attention", "clip": {"exchange": "ring"}}, "no effect with objective.pool=attention"),
        ({"parts": {"windows": 4}}, "parts.*windows"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base.load({"name": "detection_pretrain", **options})


def test_flops_by_hand() -> None:
    """MICRO at 16 px: a token grid of 2 x 2 and width 32, levels 2 and 3, parts of width 8, three boxes of 2 x 2 bins.

    Level 2, doubled: transposed 2 x 2 kernel from 32 to 16 channels on 4 places, 1 x 1 from 16 to 8 and 3 x 3 from 8 to
    8 on 16. Level 3: 1 x 1 from 32 to 8 and 3 x 3 on 4. Per level and box: RoIAlign's 4 bins x places x 8 channels, a
    3 x 3 convolution on 4 bins, 32 to 16 hidden, 16 to 16. Forward and backward three times that, two FLOPs a product.
    """
    model, objective = made()
    fine = 4 * 4 * 32 * 16 + 16 * (16 * 8 + 9 * 8 * 8)
    coarse = 4 * (32 * 8 + 9 * 8 * 8)
    boxes = 3 * (4 * (16 + 4) * 8 + 2 * (4 * 9 * 8 * 8 + 32 * 16 + 16 * 16))
    found = objective.more_flops(model.to("meta").eval().requires_grad_(False), 16, 3, 3)
    assert found == 3 * 2 * (fine + coarse + boxes)
    _, with_crops = made({"weights": "x"}, crop_weight=1)
    picture = torch.empty(1, 3, 16, 16, device="meta")
    assert with_crops.more_flops(model, 16, 3, 3) - found == 3 * count(lambda: model.encode_image(picture))


def test_the_recipe_says_how_its_parts_are_made() -> None:
    from vlp.recipe import load_recipe

    recipe = load_recipe("detection/pretrain")
    _, options = base.load(recipe.objective)
    assert isinstance(options, Config)
    assert json.loads(options.model_dump_json())["parts"] is not None
