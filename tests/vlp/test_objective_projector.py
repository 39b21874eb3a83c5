"""The projector that terms between views share: shapes, neutrality, gradients, and where it has no effect."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_pipelines.errors import ConfigError
from vlp.objectives import _beside as beside
from vlp.objectives import base
from vlp.objectives.base import Dims, Features

WITH_VIEWS: dict[str, dict[str, Any]] = {
    "cacr": {"clip_weight": 0.0},
    "decoupled": {"between": "views"},
    "groco": {"clip_weight": 0.0},
    "pair_gate": {"clip_weight": 0.0},
}


def features(count: int = 12, width: int = 16) -> Features:
    """Two views, and what pair_gate asks for besides."""
    views = F.normalize(torch.randn(2, count, width, generator=torch.Generator().manual_seed(0)), dim=2)
    extra = {"label": torch.arange(count) % 3, "draw": torch.arange(count)}
    extra |= {f"view {place}": view for place, view in enumerate(views[1:], start=1)}
    return Features(views[0].requires_grad_(), views[0], extra=extra)


def built(name: str, **options: Any) -> Any:
    module, config = base.load({"name": name, **WITH_VIEWS[name], **options})
    return module.build(config, Dims(16, 0.0, classes=3))


def test_two_layers_by_hand() -> None:
    """Unit vectors times sqrt(2), each entry through max(0, .), the two then swapped: (0.6, -0.8) becomes (0, 1)."""
    project = beside.Project(2, (2, 2))
    zeros = torch.zeros(2)
    project.mlp.load_state_dict({
        "0.weight": torch.eye(2), "0.bias": zeros, "2.weight": torch.eye(2).flip(0), "2.bias": zeros
    })  # fmt: skip
    found = project(torch.tensor([[0.6, -0.8], [0.6, 0.8]]))
    assert torch.allclose(found, torch.tensor([[0.0, 1.0], [0.8, 0.6]]))


@pytest.mark.parametrize("name", WITH_VIEWS)
def test_views_are_compared_behind_it_and_both_learn(name: str) -> None:
    torch.manual_seed(0)
    plain, projected = built(name), built(name, projector=[32, 8])
    assert not list(plain.project.parameters())
    given = features()
    scale = torch.tensor(10.0)
    loss = projected(given, scale).loss
    assert loss.item() != pytest.approx(plain(given, scale).loss.item(), abs=1e-4)
    loss.backward()
    assert given.image_BD.grad is not None
    assert given.image_BD.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in projected.project.parameters() if parameter.dim() > 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "groco", "between": "texts"}, "between=texts"),
        ({"name": "cacr", "weight": 0.0}, "weight=0"),
        ({"name": "pair_gate", "weight": 0.0}, "weight=0"),
        ({"name": "decoupled"}, "between='texts'"),
    ],
)
def test_a_projector_without_effect_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=rf"projector=.*{match}"):
        base.load({**options, "projector": [32, 8]})
