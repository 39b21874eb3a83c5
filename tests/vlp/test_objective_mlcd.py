"""MLCD: its loss by hand and by the definition, and how it stands beside CLIP."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import ConfigError
from vlp.models import instantiate
from vlp.objectives import base, clip, mlcd
from vlp.objectives._labels import same
from vlp.objectives.base import Dims, Features
from vlp.testing import MICRO, full_batch, network_input

IDS = torch.tensor([[0, 4, -1], [2, -1, -1], [-1, -1, -1], [6, 5, 1], [0, 1, 2]])
NOTHING = torch.full((5, 3), -1)


def made(**options: Any) -> mlcd.Mlcd:
    torch.manual_seed(0)
    return mlcd.build(mlcd.Config(**options), Dims(4, 2.0, clusters=9))


def features_of(ids: Tensor) -> Features:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 4, generator=generator), dim=1).requires_grad_() for _ in range(2))
    return Features(image, text, extra={"clusters": ids})


def test_loss_by_hand() -> None:
    """A = e^-1 from one positive at score 1, N = e^0 + e^-1 from negatives at 0 and -1.

    MLCD: log(1 + e^-1) + log(2 + e^-1) = 0.313262 + 0.861995 = 1.175257. MLC: log(1 + e^-1 + e^-2) = 0.407606.
    """
    positive, negative = torch.tensor([-1.0]), torch.tensor([math.log(1 + math.exp(-1))])
    assert mlcd.mlcd_loss(positive, negative).item() == pytest.approx(1.175257, abs=1e-5)
    assert mlcd.mlc_loss(positive, negative).item() == pytest.approx(0.407606, abs=1e-5)


def test_separation_is_the_plain_loss_and_absolute_terms() -> None:
    """log(1 + A) + log(1 + N) = log(1 + A N + A + N), at any size of A and N."""
    a, n = (10.0 ** torch.linspace(-4, 4, 9, dtype=torch.float64) for _ in range(2))
    expected = torch.log(1 + a[:, None] * n + a[:, None] + n)
    torch.testing.assert_close(mlcd.mlcd_loss(a.log()[:, None], n.log()), expected)


@pytest.mark.parametrize("kind", ["mlcd", "mlc"])
def test_term_equals_the_slow_definition_with_gradients(kind: str) -> None:
    """Straight from the paper, with scale and arc margin; the unlabelled third sample takes no part in the mean."""
    objective, features = made(loss=kind, negative_share=0.5), features_of(IDS)
    weight, drawn = objective.classifier.weight, objective.classifier.drawn(4).tolist()
    total = torch.zeros(())
    for feature, ids in zip(features.image_BD, IDS.tolist(), strict=True):
        cosine = [(feature @ F.normalize(row, dim=0)).clamp(-1, 1) for row in weight]
        own = [c for c in ids if c >= 0]
        if own:
            a = torch.stack([(-32 * torch.cos(torch.acos(cosine[c]) + 0.3)).exp() for c in own]).sum()
            n = torch.stack([(32 * cosine[c]).exp() for c in drawn if c not in own]).sum()
            total = total + (torch.log(1 + a) + torch.log(1 + n) if kind == "mlcd" else torch.log(1 + a * n)) / 4
    output = objective(features, torch.tensor(3.0))
    host = clip.clip_loss(features, torch.tensor(3.0), clip.Config(), ((IDS[:, 0],), same))[0]
    torch.testing.assert_close(output.loss, host + total)
    assert output.parts["positives"].item() == pytest.approx(0.8)
    leaves = (features.image_BD, weight)
    for ours, theirs in zip(
        torch.autograd.grad(output.loss - host, leaves), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_without_any_cluster_the_term_is_zero() -> None:
    objective, features = made(), features_of(NOTHING)
    output = objective(features, torch.tensor(3.0))
    output.loss.backward()
    assert output.parts["cluster"] == output.parts["positives"] == 0
    assert objective.classifier.weight.grad is not None
    assert not objective.classifier.weight.grad.any()
    torch.testing.assert_close(output.loss, clip.clip_loss(features, torch.tensor(3.0), clip.Config())[0])


def test_training_parts_positives_from_negatives() -> None:
    """Some steps on the classifier alone raise the positive cosine and lower the negatives' absolute one."""
    objective, features = made(negative_share=1.0), features_of(IDS)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    log = []
    for _ in range(60):
        optimizer.zero_grad()
        output = objective(features, torch.tensor(3.0))
        output.loss.backward()
        optimizer.step()
        objective.after_step(torch.nn.Module())
        log.append({name: float(value) for name, value in output.parts.items()})
    assert log[-1]["cluster"] < 0.5 * log[0]["cluster"]
    assert log[-1]["positive_cosine"] > log[0]["positive_cosine"]
    assert int(objective.classifier.draws) == 60


def test_only_as_many_clusters_count_as_asked() -> None:
    one, all_three = (made(positives=count, negative_share=1.0) for count in (1, 3))
    first_only = IDS.clone()
    first_only[:, 1:] = -1
    expected = all_three(features_of(first_only), torch.tensor(3.0)).loss
    torch.testing.assert_close(one(features_of(IDS), torch.tensor(3.0)).loss, expected)


def test_clusters_alone_leave_the_text_tower_at_rest() -> None:
    model: Any = instantiate(MICRO)
    objective = mlcd.build(mlcd.Config(contrast=0), Dims(16, 2.0, clusters=5))
    output = objective(objective.encode(model, *network_input(full_batch())), model.logit_scale.exp())
    output.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all(name.startswith("visual.") for name in trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0, "scale": 10}, r"scale=10.0 has no effect with objective\.weight=0"),
        ({"margin": 0, "margin_kind": "arc"}, "margin_kind=arc has no effect"),
        ({"contrast": 0, "cluster_mask": False}, "cluster_mask=False has no effect"),
        ({"contrast": 0, "weight": 0}, "nothing is left to train"),
    ],
)
def test_options_without_effect_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base.load({"name": "mlcd", **options})


def test_clusters_must_be_there_and_enough() -> None:
    with pytest.raises(ConfigError, match=r"data\.clusters"):
        mlcd.build(mlcd.Config(), Dims(4, 2.0))
    objective = mlcd.build(mlcd.Config(positives=8), Dims(16, 2.0, clusters=5))
    model: Any = instantiate(MICRO)
    with pytest.raises(ConfigError, match="data.clusters holds 3 a picture.*--closest 8"):
        objective.encode(model, *network_input(full_batch()))
