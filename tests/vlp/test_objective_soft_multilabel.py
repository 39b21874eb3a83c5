"""SoftCon: values by hand, the definition pair by pair, unknown labels, and the momentum copy."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError, MissingField
from vlp.models import instantiate
from vlp.objectives import base, clip, soft_multilabel
from vlp.objectives.base import Dims, Features
from vlp.objectives.soft_multilabel import Config, SoftMultilabel, build
from vlp.testing import MICRO, full_batch, network_input

SETS = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.uint8)
HOW = clip.Config()


def pairs_of(count: int) -> Features:
    generator = torch.Generator().manual_seed(count)
    rows, columns = (F.normalize(torch.randn(count, 5, generator=generator), dim=1).requires_grad_() for _ in range(2))
    return Features(rows, columns)


def made(**options: Any) -> tuple[SoftMultilabel, torch.nn.Module]:
    torch.manual_seed(0)
    model = instantiate(MICRO)
    objective = build(Config(**options), Dims(16, 2.0, 3))
    objective.attach(model)
    return objective, model


def encoded(objective: Any, model: Any, batch: Batch) -> Features:
    features: Features = objective.encode(model, *network_input(batch))
    return features


def test_pairwise_form_by_hand() -> None:
    """Labels {0} and {0, 1}: likeness 1 of a sample with itself, 1/sqrt(2) of the two. Queries and keys on the axes,
    scale 1, no bias: own pairs cost log(1 + e) - 1 = 0.313262, the others log 2 whatever the likeness: mean 0.503205.
    """
    pairs, labels = Features(torch.eye(2), torch.eye(2)), torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8)
    loss = soft_multilabel.soft_bce(pairs, labels, 1.0, torch.zeros(()), HOW)
    assert loss.item() == pytest.approx((math.log(1 + math.e) - 1 + math.log(2)) / 2, abs=1e-6)
    assert loss.item() == pytest.approx(0.503205, abs=1e-5)


def test_softmax_form_by_hand() -> None:
    """The same: a row's targets are 1 and 1/sqrt(2) over their sum, 0.585786 on its own: log(1 + e) - 0.585786."""
    pairs, labels = Features(torch.eye(2), torch.eye(2)), torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8)
    loss = soft_multilabel.soft_cross_entropy(pairs, labels, torch.tensor(1.0), HOW)
    assert loss.item() == pytest.approx(0.727476, abs=1e-5)


def slow_soft(rows: Tensor, columns: Tensor, labels: Tensor, scale: float, bias: str, form: str) -> Tensor:
    """Straight from the formulas, over the samples with a label."""
    known = [i for i in range(len(rows)) if labels[i].any()]
    if not known:
        return (rows * 0).sum()
    unit = [F.normalize(labels[i].float(), dim=0) for i in known]
    target = torch.tensor([[float(a @ b) for b in unit] for a in unit])
    prior = float(target.mean())
    shift = math.log(prior / (1 - prior)) if bias == "prior" and prior < 0.9999 else 0.0
    shift = math.log(0.9999 / 0.0001) if bias == "prior" and prior >= 0.9999 else shift
    total = torch.zeros(())
    for a, i in enumerate(known):
        row = torch.stack([scale * (rows[i] * columns[j]).sum() for j in known])
        if form == "soft_ce":
            total = total - (target[a] / target[a].sum() * row.log_softmax(dim=0)).sum() / len(known)
            continue
        for b in range(len(known)):
            yes, no = F.logsigmoid(row[b] + shift), F.logsigmoid(-row[b] - shift)
            total = total - (target[a, b] * yes + (1 - target[a, b]) * no) / len(known) ** 2
    return total


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize(("form", "bias"), [("bce", "prior"), ("bce", "none"), ("soft_ce", "none")])
def test_terms_equal_the_slow_definition_with_gradients(form: str, bias: str, count: int) -> None:
    pairs, labels = pairs_of(count), SETS[:count]
    if form == "bce":
        none = None if bias == "prior" else torch.zeros(())
        loss = soft_multilabel.soft_bce(pairs, labels, 5.0, none, HOW)
    else:
        loss = soft_multilabel.soft_cross_entropy(pairs, labels, torch.tensor(5.0), HOW)
    slow = slow_soft(pairs.image_BD, pairs.text_BD, labels, 5.0, bias, form)
    leaves = (pairs.image_BD, pairs.text_BD)
    found, expected = [loss, *torch.autograd.grad(loss, leaves)], [slow, *torch.autograd.grad(slow, leaves)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["bce", "soft_ce"])
def test_unknown_labels_take_no_part(form: str) -> None:
    """An empty set is unknown, not none: such samples move nothing, and a batch of them costs nothing."""
    objective, _ = made(pairs="image_text", soft=1.0, form=form)
    for labels, moving in ((SETS[[0, 3, 1, 6]], [True, False, True, False]), (SETS[[3, 6, 3, 6]], [False] * 4)):
        pairs = pairs_of(4)
        features = Features(pairs.image_BD, pairs.text_BD, extra={"labels": labels})
        plain = clip.Clip(HOW)(features, torch.tensor(4.0))
        output = objective(features, torch.tensor(4.0))
        grads = torch.autograd.grad(output.loss - plain.loss, (pairs.image_BD, pairs.text_BD))
        for grad in grads:
            assert (grad.abs().sum(dim=1) > 1e-6).tolist() == moving
        assert (output.parts["soft"] > 0) == any(moving)
    assert output.parts["positives"] == 0


def test_learned_bias_moves() -> None:
    objective, model = made(bias="learned")
    objective(encoded(objective, model, full_batch()), torch.tensor(10.0)).loss.backward()
    assert objective.bias.grad is not None
    assert objective.bias.grad.abs() > 0
    assert not hasattr(made()[0], "bias")


def test_the_copy_follows_and_is_never_trained() -> None:
    """After a step: momentum x old + (1 - momentum) x new, of tower and projector; its keys have no gradient."""
    objective, model = made(momentum=0.75)
    projector: Any = objective.project
    copies: Any = objective.copies
    name, weight = next((n, p) for n, p in model.named_parameters() if n.startswith("visual.") and p.ndim == 2)
    copied = dict(copies[0].named_parameters())[name.removeprefix("visual.")]
    before, old = weight.detach().clone(), projector[0].weight.detach().clone()
    assert torch.equal(copied, before)
    with torch.no_grad():
        weight.add_(1.0)
        projector[0].weight.sub_(2.0)
    objective.after_step(model)
    torch.testing.assert_close(copied, before + 0.25)
    torch.testing.assert_close(copies[1][0].weight, old - 0.5)
    features = encoded(objective, model, full_batch())
    assert not features.extra["key"].requires_grad
    assert not any(parameter.requires_grad for parameter in copies.parameters())
    assert any("copies" in key for key in objective.state_dict())


def test_masked_tokens_are_the_students_alone() -> None:
    """Siamese masking: with model.patch_dropout the student sees a part of the tokens, the copy all of them."""
    torch.manual_seed(0)
    model = instantiate({**MICRO, "vision_cfg": {**MICRO["vision_cfg"], "patch_dropout": 0.5}}).train()
    objective = build(Config(), Dims(16, 2.0, 3))
    objective.attach(model)
    first, second = (encoded(objective, model, full_batch()) for _ in range(2))
    assert torch.equal(first.extra["key"], second.extra["key"])
    assert not torch.equal(first.extra["query"], second.extra["query"])


def test_pictures_and_texts_need_neither_views_nor_a_copy() -> None:
    batch = full_batch()
    plain = Batch(batch.keys, batch.pixels, batch.tokens, multi_labels=batch.multi_labels)
    objective, model = made(pairs="image_text")
    assert not list(objective.parameters())
    assert torch.isfinite(objective(encoded(objective, model, plain), torch.tensor(10.0)).loss)
    viewed, model = made()
    with pytest.raises(MissingField, match=r"data\.views=2"):
        encoded(viewed, model, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "image_text", "momentum": 0.9}, r"momentum=0.9 has no effect with objective\.pairs=image_text"),
        ({"pairs": "image_text", "contrast": 1}, "contrast=1.0 has no effect"),
        ({"soft": 0, "form": "soft_ce"}, "form=soft_ce has no effect"),
        ({"form": "soft_ce", "bias": "learned"}, "bias=learned has no effect"),
        ({"contrast": 0, "soft": 0, "temperature": 0.1}, "temperature=0.1 has no effect"),
    ],
)
def test_options_without_effect_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base.load({"name": "soft_multilabel", **options})


def test_labels_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"data\.labels\.multi"):
        build(Config(), Dims(16, 2.0))
