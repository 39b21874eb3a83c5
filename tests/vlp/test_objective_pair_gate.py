"""Hydra: gated contrast between any two classes, the draw of second classes, and the gate."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_pipelines.errors import ConfigError, MissingField
from vlp.heads.pair_gate import PairGate
from vlp.models import instantiate
from vlp.objectives import pair_gate
from vlp.objectives.base import Dims, Features
from vlp.objectives.pair_gate import Config, draws, gated_contrast, partner_labels
from vlp.testing import MICRO, full_batch, network_input


def unit(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_gated_contrast_by_hand() -> None:
    """Classes 0, 1, 2 on three axes, both views the same, scale 2; sample 0 is told class 1, 1 class 2, 2 class 0.

    Open gates: sample 0 has positive 1 at score 0, and of the others, 0 is its own class and masked, 2 a negative at 0:
    log(e^0 + e^0) - 0 = log 2 for each. Gates of 1/2 on views all (1, 1) / sqrt 2: scores 2 / 4, log 2 again, for the
    positive and the negative are alike. Sample 0 told its own class: positive itself at 2, negatives two at 0:
    log(e^2 + 2) - 2 = 0.239545.
    """
    eye, scale, labels = torch.eye(3), torch.tensor(2.0), torch.tensor([0, 1, 2])
    told = labels.roll(-1)
    loss, share = gated_contrast(eye, eye, torch.ones(3, 3), (labels, told), scale, False)
    assert loss.item() == pytest.approx(math.log(2))
    assert share.item() == 1.0
    alike = torch.full((3, 2), 0.5**0.5)
    loss, _ = gated_contrast(alike, alike, torch.full((3, 2), 0.5), (labels, told), scale, False)
    assert loss.item() == pytest.approx(math.log(2))
    loss, _ = gated_contrast(eye, eye, torch.ones(3, 3), (labels, labels), scale, False)
    assert loss.item() == pytest.approx(0.239545, abs=1e-6)


def slow_hydra(
    first: torch.Tensor, second: torch.Tensor, gate: torch.Tensor, own: list[int], told: list[int], unit_length: bool
) -> torch.Tensor:
    """Straight from the definition, pair by pair, at scale 4."""
    terms = []
    for i in range(len(own)):
        scores = []
        for j in range(len(own)):
            a, b = first[i] * gate[i], second[j] * gate[i]
            scores.append(4.0 * (a @ b) / (a.norm() * b.norm() if unit_length else 1.0))
        negative = sum(
            (torch.exp(scores[j]) for j in range(len(own)) if own[j] not in (own[i], told[i])), torch.zeros(())
        )
        terms += [torch.log(torch.exp(scores[p]) + negative) - scores[p] for p in range(len(own)) if own[p] == told[i]]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("unit_length", [False, True])
@pytest.mark.parametrize("own", [[0, 1], [0, 1, 1, 2, 3, 0, 2]])
def test_gated_contrast_equals_the_slow_definition_with_gradients(own: list[int], unit_length: bool) -> None:
    told = own[1:] + own[:1]
    found = []
    for way in ("fast", "slow"):
        first, second = (unit(len(own), seed=seed).requires_grad_() for seed in range(2))
        gate = torch.rand(len(own), 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
        if way == "fast":
            labels = torch.tensor(own), torch.tensor(told)
            loss, _ = gated_contrast(first, second, gate, labels, torch.tensor(4.0), unit_length)
        else:
            loss = slow_hydra(first, second, gate, own, told, unit_length)
        found.append([loss, *torch.autograd.grad(loss, (first, second, gate))])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_empty_sets_by_hand() -> None:
    """One class alone: all are positives, nobody is a negative: loss 0, and no gradient that is not finite."""
    first, second = (unit(3, seed=seed).requires_grad_() for seed in range(2))
    labels = torch.zeros(3, dtype=torch.int64)
    loss, share = gated_contrast(first, second, torch.ones(3, 5), (labels, labels), torch.tensor(4.0), False)
    loss.backward()
    assert (loss.item(), share.item()) == (0.0, 1.0)
    assert first.grad is not None
    assert torch.equal(first.grad, torch.zeros(3, 5))
    loss, share = gated_contrast(first, second, torch.ones(3, 5), (labels, labels + 1), torch.tensor(4.0), False)
    assert (loss.item(), share.item()) == (0.0, 0.0)


def test_second_classes_depend_on_keys_and_step_alone() -> None:
    """Whatever the order of the batch, the same sample is told the same class; another one at the next step."""
    keys, labels = tuple(f"k{number}" for number in range(40)), torch.arange(40)
    told = partner_labels(labels, draws(keys, 3))
    assert sorted(told.tolist()) == labels.tolist(), "every sample hands its class on once"
    assert not torch.any(told == labels), "never to itself"
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    moved = partner_labels(labels[order], draws(tuple(keys[place] for place in order), 3))
    assert torch.equal(moved, told[order])
    again = partner_labels(labels, draws(keys, 4))
    assert (again == told).sum() < 8


def module_of(dims: Dims | None = None, **options: Any) -> pair_gate.Hydra:
    torch.manual_seed(0)
    return pair_gate.build(Config.model_validate(options), dims or Dims(16, 0.0, 3, 5))


def test_samples_without_a_class_take_no_part() -> None:
    """Their features get no gradient of the term, and leaving them out changes neither loss nor gate."""
    generator = torch.Generator().manual_seed(0)
    first, second = (F.normalize(torch.randn(6, 16, generator=generator), dim=1) for _ in range(2))
    label, draw = torch.tensor([0, -1, 1, 2, -1, 1]), draws(tuple("abcdef"), 0)
    known, losses = label >= 0, []
    for rows in (torch.ones(6, dtype=torch.bool), known):
        image = first[rows].requires_grad_()
        extra = {"view 1": second[rows], "label": label[rows], "draw": draw[rows]}
        output = module_of(clip_weight=0.0)(Features(image, image, extra=extra), torch.tensor(10.0))
        output.loss.backward()
        assert image.grad is not None
        losses.append((output.loss.item(), output.parts["positives"].item(), image.grad[label[rows] >= 0]))
        assert not image.grad[label[rows] < 0].any()
    assert losses[0][0] == pytest.approx(losses[1][0])
    assert losses[0][1:2] == (pytest.approx(4 / 6),)
    torch.testing.assert_close(losses[0][2], losses[1][2])


@pytest.mark.parametrize("fuse", ["mean", "product"])
def test_the_gate_is_symmetric(fuse: Any) -> None:
    torch.manual_seed(0)
    gate = PairGate(4, 6, 8, 12, fuse)
    first, second = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 0, 2, 3])
    found = gate(first, second)
    assert torch.allclose(found, gate(second, first))
    assert found.shape == (5, 6)
    assert bool(((found > 0) & (found < 1)).all())


def test_the_scale_stays_within_its_bounds_and_updates_are_counted() -> None:
    module = module_of()
    with torch.no_grad():
        module.gate_scale.fill_(9.0)
    module.after_step(instantiate(MICRO))
    assert module.gate_scale.exp().item() == pytest.approx(100.0)
    assert int(module.state_dict()["updates"]) == 1


def test_what_the_data_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"objective\.source='labels' needs data\.labels"):
        module_of(Dims(16, 0.0))
    with pytest.raises(ConfigError, match=r"objective\.source='clusters' needs data\.clusters"):
        module_of(Dims(16, 0.0, 3), source="clusters")
    pixels, batch = network_input(full_batch())
    for field, message in (("label_ids", "pair_gate with source=labels needs"), ("views", r"set data\.views=2")):
        with pytest.raises(MissingField, match=message):
            module_of().encode(instantiate(MICRO), pixels, replace(batch, **{field: None}))  # type: ignore[arg-type]
