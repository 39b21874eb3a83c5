"""Contrastive attraction and repulsion: its mathematics and its empty sets."""

import math

import pytest
import torch
import torch.nn.functional as F

from data_pipelines.errors import ConfigError
from vlp.objectives import base, cacr
from vlp.objectives.base import Dims, Features, LossOutput
from vlp.objectives.cacr import Config

EYE = torch.eye(2)


def output_of(views: list[torch.Tensor], **options: object) -> LossOutput:
    """Of the term alone, between views."""
    extra = {f"view {place}": view for place, view in enumerate(views[1:], start=1)}
    config = Config.model_validate({"clip_weight": 0.0, **options})
    return cacr.build(config, Dims(16, 0.0)).forward(Features(views[0], views[0], extra=extra), torch.tensor(10.0))


def unit(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_attraction_by_hand() -> None:
    """A query (1, 0) with positives (1, 0) and (0, 1): squared distances 0 and 2, weights 1 and e^2 over 1 + e^2.

    2 e^2 / (1 + e^2) = 1.761594: the farther one pulls harder. Uniform weights: 1.
    """
    query, positives = EYE[:1], EYE[None]
    assert cacr.attraction(query, positives, Config()).item() == pytest.approx(1.761594, abs=1e-6)
    assert cacr.attraction(query, positives, Config(t_pos=0.0)).item() == pytest.approx(1.0)


def test_repulsion_by_hand() -> None:
    """A row (1, 0) with negatives at squared distances 2 and 4, t_neg 1: weights e^-2 and e^-4, the nearer one more.

    -(2 e^-2 + 4 e^-4) / (e^-2 + e^-4) = -2.238406; uniform: -3. rbf, t 2: log of the weighted mean of e^-4 and e^-8
    = -4.110797.
    """
    near = cacr.nearness(EYE[:1], torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    allowed = torch.ones(1, 2, dtype=torch.bool)
    for options, expected in (({"t_neg": 1.0}, -2.238406), ({"t_neg": 0.0}, -3.0)):
        assert cacr.repulsion(near, allowed, Config(**options)).item() == pytest.approx(expected, abs=1e-6)
    share = 1 / (1 + math.exp(-2))
    expected = math.log(share * math.exp(-4) + (1 - share) * math.exp(-8))
    found = cacr.repulsion(near, allowed, Config(t_neg=1.0, cost="rbf")).item()
    assert found == pytest.approx(expected, abs=1e-5)


def slow_cacr(views: list[torch.Tensor], config: Config) -> torch.Tensor:
    """Straight from the definition, sample by sample."""

    def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x - y) ** 2).sum()

    count, number = len(views[0]), len(views)
    pull, push, pairs = torch.zeros(()), torch.zeros(()), 0
    for query in range(number):
        for i in range(count):
            far = torch.stack([apart(views[query][i], views[p][i]) for p in range(number) if p != query])
            weight = torch.exp(config.t_pos * far)
            pull = pull + (weight / weight.sum() * far).sum() / (count * number)
    for first in range(number):
        for second in range(first + 1, number):
            rows = []
            for i in range(count):
                others = [apart(views[first][i], views[second][j]) for j in range(count) if j != i]
                if others:
                    far = torch.stack(others)
                    weight = torch.exp(-config.t_neg * far)
                    cost = -far if config.cost == "euclidean" else torch.exp(-config.rbf_t * far)
                    rows.append((weight / weight.sum() * cost).sum())
            if rows:
                mean = torch.stack(rows).mean()
                push = push + (mean if config.cost == "euclidean" else mean.log())
            pairs += 1
    return config.alpha * pull + config.beta * push / pairs


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("cost", ["euclidean", "rbf"])
def test_cacr_equals_the_slow_definition_with_gradients(count: int, number: int, cost: str) -> None:
    options = {"alpha": 0.7, "beta": 1.3, "t_pos": 0.8, "t_neg": 2.0, "cost": cost}
    found = []
    for way in ("fast", "slow"):
        raw = [
            torch.randn(count, 5, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in range(number)
        ]
        views = [F.normalize(view, dim=1) for view in raw]
        loss = output_of(views, **options).loss if way == "fast" else slow_cacr(views, Config.model_validate(options))
        found.append([loss, *torch.autograd.grad(loss, raw)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_detached_weights_give_the_same_loss_and_other_gradients() -> None:
    found = []
    for detach in (False, True):
        views = [unit(6, seed=seed).requires_grad_() for seed in range(3)]
        loss = output_of(views, detach=detach).loss
        found.append((loss, torch.autograd.grad(loss, views)[0]))
    assert found[0][0].item() == pytest.approx(found[1][0].item())
    assert not torch.allclose(found[0][1], found[1][1])


def test_with_one_positive_the_attraction_has_no_weights() -> None:
    views = [unit(6, seed=seed) for seed in range(2)]
    assert output_of(views, t_pos=0.0).loss.item() == pytest.approx(output_of(views, t_pos=5.0).loss.item())
    views.append(unit(6, seed=2))
    assert output_of(views, t_pos=0.0).loss.item() != pytest.approx(output_of(views, t_pos=5.0).loss.item())


def test_between_texts_samples_with_a_true_text_are_no_negatives() -> None:
    """Three samples, the first two with equal captions, so that each has the third alone; then all equal: no repulsion.

    Pictures are the axes, their texts the same: the attraction is 0, and every negative is at squared distance 2.
    """
    eye = torch.eye(3)
    config = Config(clip_weight=0.0, between="texts", mask="captions")
    module = cacr.build(config, Dims(3, 0.0))
    for ids, expected in (([7, 7, 9], -2.0), ([7, 7, 7], 0.0)):
        image = eye.clone().requires_grad_()
        output = module(Features(image, eye, torch.tensor(ids)[:, None]), torch.tensor(10.0))
        output.loss.backward()
        assert output.parts["attraction"].item() == pytest.approx(0.0, abs=1e-6)
        assert output.parts["repulsion"].item() == pytest.approx(expected, abs=1e-6)
        assert image.grad is not None
        assert torch.isfinite(image.grad).all()


def test_between_texts_further_texts_are_positives() -> None:
    """A picture (1, 0) with texts (1, 0) and (0, 1), as in the attraction by hand; one sample has no negatives."""
    config = Config(clip_weight=0.0, between="texts")
    features = Features(EYE[:1], EYE[:1], extra={"text 1": EYE[1:]})
    output = cacr.build(config, Dims(2, 0.0))(features, torch.tensor(10.0))
    assert output.loss.item() == pytest.approx(1.761594, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0, "clip_weight": 0}, "leave nothing to train"),
        ({"clip_weight": 0, "mask": "labels"}, r"objective\.mask='labels' has no effect between views"),
        ({"rbf_t": 3.0}, r"objective\.rbf_t=3\.0 has no effect with cost='euclidean'"),
    ],
)
def test_options_that_do_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base.load({"name": "cacr", **options})
