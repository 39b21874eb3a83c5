"""Decoupled contrastive learning: its mathematics, and the scale that must not run away."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_pipelines.errors import ConfigError, MissingField
from vlp.models import instantiate
from vlp.objectives import base, decoupled
from vlp.objectives.base import Dims, Features
from vlp.testing import MICRO, full_batch, network_input

EYE = torch.eye(2)


def loss_of(features: Features, *, at: float = 10.0, **options: Any) -> torch.Tensor:
    """With the model's scale `at`."""
    config = decoupled.Config.model_validate(options)
    return decoupled.build(config, Dims(16, 0.0)).forward(features, torch.tensor(at)).loss


def unit(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_between_texts_by_hand() -> None:
    """Two pairs on the axes, scale 2: logits [[2, 0], [0, 2]], one negative per row: -2 + log e^0 = -2, below 0."""
    assert loss_of(Features(EYE, EYE), temperature=0.5).item() == pytest.approx(-2.0, abs=1e-6)


def test_between_views_by_hand() -> None:
    """The same as views: each of the four has its partner at 2 and two negatives, of either view, at 0.

    -2 + log 2 = -1.306853; with the positive in the denominator, SimCLR, log(e^2 + 2) - 2 = 0.239545.
    """
    features = Features(EYE, EYE, extra={"view 1": EYE})
    views: dict[str, Any] = {"between": "views", "temperature": 0.5}
    assert loss_of(features, **views).item() == pytest.approx(-1.306853, abs=1e-6)
    assert loss_of(features, decoupled=False, **views).item() == pytest.approx(0.239545, abs=1e-6)


def test_von_mises_fisher_weights_by_hand() -> None:
    """Cosines 1 and 0, sigma 0.5: e^2 and 1 with mean 4.194528; weights 2 - 1.761594 and 2 - 0.238406.

    Texts (1, 0) for both pictures of the axes, scale 2: logits [[2, 2], [0, 0]]. Rows: -0.238406 * 2 + 2 and
    -1.761594 * 0 + 0, mean 0.761594; columns: -0.238406 * 2 + 0 and -1.761594 * 0 + 2, the same mean.
    """
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    weight = decoupled.vmf_weights(EYE, text, 0.5)
    assert weight.tolist() == pytest.approx([0.238406, 1.761594], abs=1e-6)
    assert weight.mean().item() == pytest.approx(1.0)
    found = loss_of(Features(EYE, text), temperature=0.5, positive_weight="vmf").item()
    assert found == pytest.approx(0.761594, abs=1e-6)


def slow_views(
    views: list[torch.Tensor], scale: torch.Tensor, with_positive: bool, sigma: float | None
) -> torch.Tensor:
    """Straight from the definition, entry by entry, over all pairs of views."""
    totals = []
    for first, second in combinations(views, 2):
        count = len(first)
        weights = torch.ones(count)
        if sigma is not None:
            close = torch.stack([torch.exp(first[i] @ second[i] / sigma) for i in range(count)]).detach()
            weights = 2 - close / close.mean()
        total = 0.0 * (first.sum() + second.sum())
        for own, other in ((first, second), (second, first)):
            for i in range(count):
                positive = scale * (own[i] @ other[i])
                sums = [torch.exp(scale * (own[i] @ side[j])) for side in (own, other) for j in range(count) if j != i]
                sums += [torch.exp(positive)] if with_positive else []
                if sums:
                    total = total + torch.log(torch.stack(sums).sum()) - weights[i] * positive
        totals.append(total / (2 * count))
    return torch.stack(totals).mean()


def slow_texts(sides: list[torch.Tensor], scale: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """DCL of pictures and texts; samples with equal captions are no negatives."""
    total, count = torch.zeros(()), len(ids)
    for own, other in (sides, sides[::-1]):
        for i in range(count):
            sums = [torch.exp(scale * (own[i] @ other[j])) for j in range(count) if ids[j] != ids[i]]
            if sums:
                total = total + 0.5 * (torch.log(torch.stack(sums).sum()) - scale * (own[i] @ other[i])) / count
    return total


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("options", [{}, {"decoupled": False}, {"positive_weight": "vmf", "sigma": 0.3}])
def test_views_equal_the_slow_definition_with_gradients(count: int, number: int, options: dict[str, Any]) -> None:
    found = []
    for way in ("fast", "slow"):
        views = [unit(count, seed=seed).requires_grad_() for seed in range(number)]
        if way == "fast":
            extra = {f"view {place}": view for place, view in enumerate(views[1:], start=1)}
            loss = loss_of(Features(views[0], views[0], extra=extra), between="views", temperature=0.25, **options)
        else:
            sigma = 0.3 if "sigma" in options else None
            loss = slow_views(views, torch.tensor(4.0), "decoupled" in options, sigma)
        found.append([loss, *torch.autograd.grad(loss, views)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 7])
def test_texts_equal_the_slow_definition_with_gradients(count: int) -> None:
    ids = [number // 2 for number in range(count)]  # with two samples nobody has a negative
    found = []
    for way in ("fast", "slow"):
        sides = [unit(count, seed=seed).requires_grad_() for seed in range(2)]
        scale = torch.tensor(4.0, requires_grad=True)
        if way == "fast":
            config = decoupled.Config(temperature=None, max_scale=20.0, mask="captions")
            features = Features(sides[0], sides[1], torch.tensor(ids)[:, None])
            loss = decoupled.build(config, Dims(16, 0.0))(features, scale).loss
        else:
            loss = slow_texts(sides, scale, ids) + 0.0 * (sides[0].sum() + sides[1].sum() + scale)
        found.append([loss, *torch.autograd.grad(loss, [*sides, scale])])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert torch.any(found[0][1] != 0) == (count > 2)


@pytest.mark.parametrize("count", [2, 33])
def test_the_gradient_of_infonce_is_that_of_dcl_times_the_probability_of_the_negatives(count: int) -> None:
    """In the anchor, exactly: q = 1 - softmax(positive). For close pairs in small batches it is nearly 0."""
    text = unit(count, seed=1)
    image = F.normalize(text + 0.3 * unit(count, seed=2), dim=1).requires_grad_()
    features, scale = Features(image, text), torch.tensor(10.0)
    grads = [torch.autograd.grad(base.contrast(features, scale, decoupled=flag)[0], image)[0] for flag in (False, True)]
    q = 1 - (10.0 * image.detach() @ text.T).softmax(dim=1).diagonal()
    torch.testing.assert_close(grads[0], q[:, None] * grads[1], rtol=1e-4, atol=1e-6)
    assert q.mean() < (0.01 if count == 2 else 1.0)


def test_a_single_sample_has_no_negatives_and_no_loss() -> None:
    image = unit(1).requires_grad_()
    loss = loss_of(Features(image, image, extra={"view 1": unit(1, seed=3)}), between="views")
    loss.backward()
    assert loss.item() == 0.0
    assert image.grad is not None
    assert not image.grad.any()


def test_the_scale_cannot_run_away() -> None:
    """Well separated pairs, whose loss falls with the scale for ever: no gradient beyond the bound, none when fixed."""
    features = Features(EYE, EYE)
    for scale, falls in ((5.0, True), (30.0, False)):
        leaf = torch.tensor(scale, requires_grad=True)
        module = decoupled.build(decoupled.Config(temperature=None, max_scale=20.0), Dims(2, 0.0))
        loss = module(features, leaf).loss
        loss.backward()
        assert leaf.grad is not None
        assert bool(leaf.grad < 0) == falls
        assert loss.item() == pytest.approx(-min(scale, 20.0))
    assert loss_of(features, at=1.0).item() == loss_of(features, at=99.0).item() == pytest.approx(-1 / 0.07)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": None}, r"no lower bound.*objective\.max_scale"),
        ({"max_scale": 20.0}, r"objective\.max_scale=20\.0 has no effect beside a fixed"),
        ({"sigma": 0.3}, r"objective\.sigma=0\.3 has no effect without positive_weight='vmf'"),
        ({"between": "views", "mask": "labels"}, r"objective\.mask='labels' has no effect between='views'"),
    ],
)
def test_options_that_harm_or_do_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base.load({"name": "decoupled", **options})


def test_between_views_the_text_tower_rests_and_single_views_are_refused() -> None:
    model, batch = instantiate(MICRO), full_batch()
    module = decoupled.build(decoupled.Config(between="views"), Dims(16, math.log(10)))
    module(module.encode(model, *network_input(batch)), torch.tensor(1.0)).loss.backward()  # type: ignore[arg-type]
    named = dict(model.named_parameters())
    assert named["visual.conv1.weight"].grad is not None
    assert named["token_embedding.weight"].grad is None
    pixels, batch = network_input(batch)
    alone = type(batch)(batch.keys, batch.pixels, batch.tokens)
    with pytest.raises(MissingField, match=r"decoupled needs 1 of the batch field 'views'.*data\.views=2"):
        module.encode(model, pixels, alone)  # type: ignore[arg-type]
