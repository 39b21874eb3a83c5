"""The classifier of clusters and entities: its scores and gradients against the definition, margins, and the draw."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.heads.partial_fc import Margin, PartialFC, Scores, positive_mass, softmax_loss, with_margin
from vlp.objectives import _kernel

IDS = torch.tensor([[0, 4, -1], [2, -1, -1], [-1, -1, -1], [6, 5, 1], [0, 1, 2], [3, 0, -1], [8, 7, 6]])


def made(margin: float = 0.0, kind: Margin = "arc", scale: float = 5.0) -> PartialFC:
    torch.manual_seed(0)
    return PartialFC(9, 4, scale, margin, kind)


def features_of(count: int) -> Tensor:
    return F.normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(1)), dim=1).requires_grad_()


def slow_scores(classifier: PartialFC, feature_BD: Tensor, ids_BS: Tensor, drawn: list[int]) -> tuple[Tensor, Tensor]:
    """(BS positive scores, B log-sum-exp over drawn classes that are not a sample's own), one by one."""
    positives, negatives = [], []
    for feature, ids in zip(feature_BD, ids_BS.tolist(), strict=True):
        cosine = [feature @ F.normalize(weight, dim=0) for weight in classifier.weight]
        own = [classifier.scale * with_margin(cosine[c], classifier.margin, classifier.kind) for c in ids if c >= 0]
        positives.append(torch.stack([*own, *[torch.zeros(())] * (len(ids) - len(own))]))
        rest = [classifier.scale * cosine[c] for c in drawn if c not in ids]
        negatives.append(torch.stack(rest).exp().sum().log() if rest else torch.tensor(-math.inf))
    return torch.stack(positives), torch.stack(negatives)


def mixed(positive_BS: Tensor, negative_B: Tensor) -> Tensor:
    """A scalar in which every entry counts differently; -inf counts 0."""
    finite_B = negative_B.masked_fill(torch.isinf(negative_B), 0.0)
    return (positive_BS * torch.arange(1.0, positive_BS.numel() + 1).view_as(positive_BS)).sum() + finite_B @ (
        torch.arange(len(finite_B)) + 2.0
    )


@pytest.mark.parametrize("tile", [2, 1024])
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("drawn", [[1, 2, 5, 6, 8], [0], []])
@pytest.mark.parametrize(("margin", "kind"), [(0.0, "arc"), (0.3, "arc"), (0.2, "cosine")])
def test_scores_equal_the_slow_definition_with_gradients(
    count: int, drawn: list[int], margin: float, kind: Margin, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_kernel.TILE, "cpu", tile)
    classifier, feature_BD = made(margin, kind), features_of(count)
    scores = classifier(feature_BD, IDS[:count], torch.tensor(drawn, dtype=torch.int64))
    slow = slow_scores(classifier, feature_BD, IDS[:count], drawn)
    torch.testing.assert_close(scores.positive_BS, slow[0])
    torch.testing.assert_close(scores.negative_B, slow[1])
    leaves = (feature_BD, classifier.weight)
    found = torch.autograd.grad(mixed(scores.positive_BS, scores.negative_B), leaves)
    expected = torch.autograd.grad(mixed(*slow), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_cosines_for_the_log() -> None:
    """Sum and number of the positive cosines, and of the negatives' absolute values, own classes left out."""
    classifier, feature_BD = made(0.3), features_of(2)
    drawn = torch.tensor([0, 2, 3])
    cosine = (feature_BD @ F.normalize(classifier.weight, dim=1).T).detach()
    found = classifier(feature_BD, IDS[:2], drawn).cosines_4.tolist()
    positive = [cosine[0, 0], cosine[0, 4], cosine[1, 2]]
    negative = [cosine[0, 2], cosine[0, 3], cosine[1, 0], cosine[1, 3]]
    expected = [float(sum(positive)), 3.0, float(sum(value.abs() for value in negative)), 4.0]
    assert found == pytest.approx(expected, abs=1e-6)


def test_margins_by_hand() -> None:
    """Arc 0.3 at an angle of 60 degrees: cos(pi/3 + 0.3) = 0.221740; cosine 0.2: 0.5 - 0.2."""
    half = torch.tensor(0.5)
    assert with_margin(half, 0.3, "arc").item() == pytest.approx(math.cos(math.pi / 3 + 0.3), abs=1e-6)
    assert with_margin(half, 0.3, "arc").item() == pytest.approx(0.221740, abs=1e-5)
    assert with_margin(half, 0.2, "cosine").item() == pytest.approx(0.3)


def test_arc_margin_falls_with_the_angle_everywhere_and_its_slope_is_finite() -> None:
    cosine = torch.linspace(-1, 1, 2001).requires_grad_()
    moved = with_margin(cosine, 0.3, "arc")
    assert (moved.diff() > 0).all()
    (slope,) = torch.autograd.grad(moved.sum(), cosine)
    assert torch.isfinite(slope).all()


def test_softmax_loss_by_hand() -> None:
    """One sample at (1, 0), classes at (1, 0), (0, 1), (-1, 0), scale 2, cosine margin 1/2, the first is right: scores
    2 (1 - 1/2) = 1, 0 and -2: log(e + 1 + e^-2) - 1 = 0.349013. A sample without a class costs nothing.
    """
    classifier = PartialFC(3, 2, 2.0, 0.5, "cosine")
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5], [-1.0, 0.0]]))
    scores: Scores = classifier(torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0], [-1]]), torch.arange(3))
    loss = softmax_loss(scores)
    assert loss[0].item() == pytest.approx(math.log(math.e + 1 + math.exp(-2)) - 1, abs=1e-6)
    assert loss[0].item() == pytest.approx(0.349013, abs=1e-5)
    assert loss[1].item() == 0.0
    assert positive_mass(scores).tolist() == pytest.approx([-1.0, -math.inf])


def test_a_draw_is_equal_everywhere_and_another_one_after_a_step() -> None:
    first, second = made(), made()
    torch.manual_seed(99)
    assert torch.equal(first.drawn(4), second.drawn(4))
    assert len(first.drawn(4).unique()) == 4
    draws = []
    for _ in range(5):
        draws.append(first.drawn(4).tolist())
        first.advance()
    assert len(set(map(tuple, draws))) > 1
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.drawn(4), second.drawn(4))


def test_a_draw_holds_all_classes_of_the_batch() -> None:
    """`count` of them if they are fewer, else just them; -1 is no class."""
    classifier, batch = made(), torch.tensor([[7, 2], [-1, 2]])
    drawn = classifier.drawn(5, batch)
    assert {2, 7} <= set(drawn.tolist())
    assert len(drawn.unique()) == 5
    assert classifier.drawn(1, batch).tolist() == [2, 7]
    assert classifier.drawn(100, batch).tolist() == list(range(9))
