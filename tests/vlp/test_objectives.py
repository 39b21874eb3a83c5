"""The contract every objective fulfils, tried on every module of vlp/objectives; then the mathematics of `clip`."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError, MissingField
from vlp.models import instantiate
from vlp.objectives import base, clip
from vlp.objectives.base import Dims, Features, LossOutput
from vlp.recipe import load_recipe, recipe_names
from vlp.testing import (
    FULL_BOX_LABELS,
    FULL_CLASSES,
    FULL_CLUSTERS,
    MICRO,
    MICRO_OPTIONS,
    attached,
    full_batch,
    micro_bundle,
    micro_model,
    network_input,
)

NAMES = base.names()
DIMS = Dims(
    16, math.log(10), FULL_CLASSES, FULL_CLUSTERS, tokenizer=micro_bundle().tokenizer, box_labels=FULL_BOX_LABELS
)


def encode(name: str, batch: Batch, **options: object) -> tuple[base.Objective, Features]:
    """An objective and what it encodes with a model of fixed weights; its own weights are fixed too."""
    module, config = base.load({"name": name, **MICRO_OPTIONS.get(name, {}), **options})
    torch.manual_seed(0)
    model = micro_model(name)
    objective = attached(module.build(config, DIMS), model)
    torch.manual_seed(1)
    return objective, objective.encode(model, *network_input(batch))


def loss_of(name: str, features: Features, scale: float = 10.0, **options: object) -> LossOutput:
    """The loss of an objective without modules of its own."""
    module, config = base.load({"name": name, **options})
    output: LossOutput = module.build(config, DIMS)(features, torch.tensor(scale))
    return output


def test_there_are_objectives() -> None:
    assert "clip" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_module_has_the_five_names_and_a_recipe(name: str) -> None:
    module = importlib.import_module(f"vlp.objectives.{name}")
    assert issubclass(module.Config, StrictModel)
    assert set(module.NEEDS) <= set(Batch.__slots__)
    assert module.COUPLING in ("global", "local", "stateful")
    assert module.NEUTRAL is None or isinstance(base.load({"name": name, **module.NEUTRAL})[1], StrictModel)
    assert any(load_recipe(recipe).objective["name"] == name for recipe in recipe_names())
    assert "arXiv" in (module.__doc__ or ""), "the header names the paper"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 6])
def test_forward_and_backward_are_finite(name: str, count: int) -> None:
    objective, features = encode(name, full_batch(count))
    output = objective(features, torch.tensor(10.0))
    output.loss.backward()
    assert output.loss.ndim == 0
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(value).all() for value in output.parts.values())


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_batch_does_not_matter(name: str) -> None:
    objective, features = encode(name, full_batch())
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.manual_seed(0)
    expected = objective(features, torch.tensor(10.0)).loss.item()
    torch.manual_seed(0)
    other = objective(features.map(lambda tensor: tensor[order]), torch.tensor(10.0)).loss.item()
    assert other == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_features_give_nearly_the_same_loss(name: str) -> None:
    objective, features = encode(name, full_batch())
    low = features.map(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    torch.manual_seed(0)
    expected = objective(features, torch.tensor(10.0)).loss
    torch.manual_seed(0)
    found = objective(low, torch.tensor(10.0)).loss
    assert found.item() == pytest.approx(expected.item(), rel=0.03)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_bfloat16_can_be_trained(name: str) -> None:
    """As under run.precision=bf16: the model's weights are rounded, the objective's are not."""
    module, config = base.load({"name": name, **MICRO_OPTIONS.get(name, {})})
    torch.manual_seed(0)
    model = micro_model(name).bfloat16()
    objective = attached(module.build(config, DIMS), model)
    pixels, batch = network_input(full_batch())
    batch = replace(batch, views=tuple(view.bfloat16() for view in batch.views or ()))
    loss = objective(objective.encode(model, pixels.bfloat16(), batch), torch.tensor(10.0)).loss
    assert loss.dtype == torch.float32
    loss.backward()
    touched = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert touched
    assert all(gradient.isfinite().all() for gradient in touched)
    if hasattr(objective, "after_step"):
        objective.after_step(model)


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_round_trip(name: str) -> None:
    first, features = encode(name, full_batch())
    second, _ = encode(name, full_batch())
    assert isinstance(first, torch.nn.Module)
    assert isinstance(second, torch.nn.Module)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    second.load_state_dict(first.state_dict())
    losses = []
    for objective in (first, second):
        torch.manual_seed(0)
        losses.append(objective(features, torch.tensor(10.0)).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_scale_at_its_clamps(name: str, scale: float) -> None:
    objective, features = encode(name, full_batch())
    leaves = features.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
    output = objective(leaves, torch.tensor(scale))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.tensors() if leaf.grad is not None)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if importlib.import_module(f"vlp.objectives.{n}").NEUTRAL is not None]
)
def test_neutral_setting_is_plain_clip_bit_for_bit(name: str) -> None:
    """Loss and gradients of the towers; no modules of its own, no random numbers, whatever else the batch holds."""
    options = importlib.import_module(f"vlp.objectives.{name}").NEUTRAL
    found = []
    for setting in ({"name": name, **options}, {"name": "clip"}):
        torch.manual_seed(0)
        model = instantiate(MICRO)
        module, config = base.load(setting)
        objective = attached(module.build(config, DIMS), model)
        features = objective.encode(model, *network_input(full_batch()))
        output = objective(features, model.logit_scale.exp())  # type: ignore[operator]
        output.loss.backward()
        found.append([output.loss, *(p.grad for p in model.parameters())])
    for own, plain in zip(*found, strict=True):
        assert torch.equal(own, plain)


def test_clip_by_hand() -> None:
    """Two pairs, features on the axes, scale 2: logits are [[2, 0], [0, 2]].

    Each row's loss is -log(e^2 / (e^2 + 1)) = log(1 + e^-2) = 0.126928; so is each column's, and their mean.
    """
    eye = torch.eye(2)
    output = loss_of("clip", Features(eye, eye), scale=2.0)
    assert output.loss.item() == pytest.approx(0.126928, abs=1e-6)


def test_smoothing_by_hand() -> None:
    """The same logits with smoothing 0.2: 0.8 * 0.126928 + 0.2 * (0.126928 + 2.126928) / 2 = 0.326928."""
    eye = torch.eye(2)
    assert loss_of("clip", Features(eye, eye), scale=2.0, smoothing=0.2).loss.item() == pytest.approx(
        0.326928, abs=1e-6
    )


def test_masking_by_hand() -> None:
    """Three pairs, the first two with equal captions: logits 0 everywhere (scale 0).

    Rows 1 and 2 choose between 2 entries, row 3 between 3: (2 log 2 + log 3) / 3 = 0.828302.
    """
    ids = torch.tensor([[7], [7], [9]])
    features = Features(torch.eye(3), torch.eye(3), ids)
    assert loss_of("clip", features, scale=0.0).loss.item() == pytest.approx((2 * math.log(2) + math.log(3)) / 3)


def slow_clip(
    image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, weight: float, smooth: float
) -> torch.Tensor:
    """Straight from the definition, entry by entry."""
    total = torch.zeros(())
    count = len(image)
    for share, (queries, candidates) in ((weight, (image, text)), (1 - weight, (text, image))):
        for i in range(count):
            allowed = [j for j in range(count) if j == i or ids[i] != ids[j]]
            logits = [scale * (queries[i] * candidates[j]).sum() for j in allowed]
            log_z = torch.log(sum((torch.exp(z) for z in logits), torch.zeros(())))
            own = log_z - logits[allowed.index(i)]
            even = sum((log_z - z for z in logits), torch.zeros(())) / len(logits)
            total = total + share * ((1 - smooth) * own + smooth * even) / count
    return total


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize(("weight", "smooth"), [(0.5, 0.0), (0.75, 0.1), (0.0, 0.3)])
def test_clip_equals_the_slow_definition_with_gradients(count: int, weight: float, smooth: float) -> None:
    generator = torch.Generator().manual_seed(count)
    raw = torch.randn(2, count, 5, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, max(1, count // 2), (count,), generator=generator)
    grads = []
    for way in ("fast", "slow"):
        image, text = (F.normalize(raw[k].float(), dim=1).requires_grad_() for k in (0, 1))
        scale = torch.tensor(4.0, requires_grad=True)
        config = clip.Config(image_weight=weight, smoothing=smooth, mask="captions")
        if way == "fast":
            loss = clip.clip_loss(Features(image, text, ids[:, None]), scale, config)[0]
        else:
            loss = slow_clip(image, text, ids, scale, weight, smooth)
        loss.backward()
        assert image.grad is not None
        assert text.grad is not None
        assert scale.grad is not None
        grads.append((loss.detach(), image.grad, text.grad, scale.grad))
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_neutral_settings_are_open_clips_loss() -> None:
    from open_clip.loss import ClipLoss

    _, features = encode("clip", full_batch())
    expected = ClipLoss()(features.image_BD, features.text_BD, torch.tensor(10.0))
    assert features.phrase_ids_BP is None
    torch.testing.assert_close(loss_of("clip", features).loss, expected, rtol=1e-6, atol=0)


def test_a_text_of_labels_is_true_of_every_picture_that_carries_them() -> None:
    """Picture 0 is (1: apple, 2: fruit, 3: red), picture 1 (4: car, 3: red), picture 2 (5: pear, 2: fruit).

    The texts are 0: "fruit, red", 1: "red", 2: "pear": true of picture 0; of 0 and 1; of 2.
    """
    known = torch.tensor([[1, 2, 3], [4, 3, -1], [5, 2, -1]])
    chosen = torch.tensor([[2, 3], [3, -1], [5, -1]])
    expected = [[True, True, False], [False, True, False], [False, False, True]]
    assert base.true_texts(known, chosen).tolist() == expected
    logits = base.mask_pairs(torch.zeros(3, 3), base.true_texts(known, chosen))
    assert torch.isinf(logits).nonzero().tolist() == [[0, 1]]


def test_fixed_temperature_ignores_the_learned_scale() -> None:
    _, features = encode("clip", full_batch())
    fixed = loss_of("clip", features, scale=55.0, fixed_temperature=0.1).loss
    assert torch.equal(fixed, loss_of("clip", features, scale=10.0).loss)


def test_missing_field_and_unknown_option_are_named() -> None:
    batch = full_batch()
    without = Batch(batch.keys, batch.pixels, batch.tokens)
    with pytest.raises(MissingField, match="clip with mask=labels.*phrase_ids"):
        encode("clip", without, mask="labels")
    with pytest.raises(ConfigError, match=r"objective\.unknown key 'smoothness'.*smoothing"):
        base.load({"name": "clip", "smoothness": 1})
    with pytest.raises(ConfigError, match="'clop' is unknown; known: .*clip"):
        base.load({"name": "clop"})


def test_siglip_by_hand() -> None:
    """Two pairs on the axes, scale 2, bias -1: x is [[1, -1], [-1, 1]], each of the four answers costs log(1 + e^-1).

    Summed over pairs and divided by 2 samples: 2 log(1 + e^-1) = 0.626523.
    """
    eye = torch.eye(2)
    output = loss_of("siglip", Features(eye, eye), scale=2.0, init_bias=-1.0)
    assert output.loss.item() == pytest.approx(0.626523, abs=1e-6)


def test_siglip_trains_the_bias_of_a_model_that_has_one() -> None:
    """What SigLIP weights bring stays and is exported; without one the objective holds it."""
    module, config = base.load({"name": "siglip"})
    torch.manual_seed(0)
    model = instantiate({**MICRO, "init_logit_bias": -7.0})
    objective = attached(module.build(config, DIMS), model)
    assert [*objective.parameters()] == []
    output = objective(objective.encode(model, *network_input(full_batch())), torch.tensor(10.0))
    output.loss.backward()
    assert output.parts["logit_bias"] == -7.0
    assert isinstance(model.logit_bias, torch.nn.Parameter)
    assert model.logit_bias.grad is not None
    with pytest.raises(ConfigError, match=r"objective\.init_bias=-5\.0 has no effect"):
        attached(module.build(base.load({"name": "siglip", "init_bias": -5})[1], DIMS), model)


def test_neutral_siglip_is_open_clips_with_gradients() -> None:
    from open_clip.loss import SigLipLoss

    objective, features = encode("siglip", full_batch())
    image, text = (side.detach().requires_grad_() for side in (features.image_BD, features.text_BD))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    output = objective(Features(image, text), scale)
    (own_bias,) = objective.parameters()  # type: ignore[attr-defined]
    found = [output.loss, *torch.autograd.grad(output.loss, (image, text, scale, own_bias))]
    loss = SigLipLoss()(image, text, scale, bias)
    expected = [loss, *torch.autograd.grad(loss, (image, text, scale, bias))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
