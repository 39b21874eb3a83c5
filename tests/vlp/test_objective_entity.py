"""MOFI's multi-task loss: by the definition, with pictures of several entities and of none."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import ConfigError
from vlp.objectives import base, clip, entity
from vlp.objectives._labels import same
from vlp.objectives.base import Dims, Features

IDS = torch.tensor([[0, 4], [2, -1], [-1, -1], [6, 5], [0, 1]])


def made(**options: Any) -> entity.Entity:
    torch.manual_seed(0)
    return entity.build(entity.Config(**options), Dims(4, 2.0, clusters=9))


def features_of(ids: Tensor) -> Features:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 4, generator=generator), dim=1).requires_grad_() for _ in range(2))
    return Features(image, text, extra={"entities": ids})


def slow_softmax(features: Features, weight: Tensor, ids: Tensor, drawn: list[int], margin: float) -> Tensor:
    """Cross-entropy of every entity of a picture against itself and the drawn ones that are not the picture's."""
    losses = []
    for feature, own in zip(features.image_BD, [[c for c in row if c >= 0] for row in ids.tolist()], strict=True):
        score = [32 * (feature @ F.normalize(row, dim=0)) for row in weight]
        right = [score[c] - 32 * margin for c in own]
        rest = [score[c] for c in drawn if c not in own]
        if own:
            losses.append(torch.stack([torch.stack([r, *rest]).logsumexp(dim=0) - r for r in right]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("samples", [1, 7, 512_000])
def test_loss_equals_the_slow_definition_with_gradients(samples: int) -> None:
    objective, features = made(samples=samples, alpha=0.3), features_of(IDS)
    drawn = objective.classifier.drawn(samples, IDS).tolist()
    assert len(drawn) == {1: 6, 7: 7, 512_000: 9}[samples]
    output = objective(features, torch.tensor(3.0))
    host = clip.clip_loss(features, torch.tensor(3.0), clip.Config(), ((IDS,), same))[0]
    slow = 0.7 * host + 0.3 * slow_softmax(features, objective.classifier.weight, IDS, drawn, 0.1)
    leaves = (features.image_BD, features.text_BD, objective.classifier.weight)
    found = [output.loss, *torch.autograd.grad(output.loss, leaves, retain_graph=True)]
    for ours, theirs in zip(found, [slow, *torch.autograd.grad(slow, leaves)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert output.parts["positives"].item() == pytest.approx(0.8)


def test_pictures_that_share_an_entity_are_no_negatives() -> None:
    """0 and 4 share entity 0: as if their captions were equal, for clip's own mask."""
    features = features_of(IDS)
    captions = Features(features.image_BD, features.text_BD, torch.tensor([[1], [2], [3], [4], [1]]))
    expected = clip.clip_loss(captions, torch.tensor(3.0), clip.Config(mask="captions"))[0]
    assert torch.equal(made(alpha=0)(features, torch.tensor(3.0)).loss, expected)


def test_without_any_entity_contrast_alone_is_left() -> None:
    objective, features = made(), features_of(torch.full((5, 2), -1))
    output = objective(features, torch.tensor(3.0))
    output.loss.backward()
    assert output.parts["entity"] == output.parts["positives"] == 0
    assert objective.classifier.weight.grad is not None
    assert not objective.classifier.weight.grad.any()
    plain = clip.clip_loss(features, torch.tensor(3.0), clip.Config())[0]
    torch.testing.assert_close(output.loss, 0.5 * plain)


def test_entities_must_be_there_and_options_have_an_effect() -> None:
    with pytest.raises(ConfigError, match=r"data\.clusters"):
        entity.build(entity.Config(), Dims(4, 2.0))
    with pytest.raises(ConfigError, match=r"margin=\S+ has no effect with objective\.alpha=0"):
        base.load({"name": "entity", "alpha": 0, "margin": 0.2})
    assert not list(entity.build(entity.Config(alpha=0, entity_mask=False), Dims(4, 2.0)).parameters())
