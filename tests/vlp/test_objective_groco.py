"""Group ordering constraints: the sorting network, the loss of a wrong order, and who gets a gradient."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlp.objectives import groco
from vlp.objectives.base import Dims, Features, LossOutput
from vlp.objectives.groco import Config, landing, sorting_loss


def output_of(views: list[torch.Tensor], **options: Any) -> LossOutput:
    """Of the term alone, between views."""
    extra = {f"view {place}": view for place, view in enumerate(views[1:], start=1)}
    config = Config.model_validate({"clip_weight": 0.0, **options})
    return groco.build(config, Dims(16, 0.0)).forward(Features(views[0], views[0], extra=extra), torch.tensor(10.0))


def unit(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_one_negative_and_one_positive_by_hand() -> None:
    """Cosines 0 and 1, steepness 1: they stay in order with probability arctan(1) / pi + 1/2 = 3/4.

    Both land in their own group with 3/4, so the loss is -log 0.75 = 0.287682; equal cosines: -log 0.5; the wrong way
    round: -log 0.25 = 1.386294. Perfectly apart, 2, it is -log 0.852416 = 0.159681: never 0.
    """
    for negative, positive, expected in ((0.0, 1.0, 0.287682), (0.3, 0.3, 0.693147), (1.0, 0.0, 1.386294)):
        found = sorting_loss(torch.tensor([[negative]]), torch.tensor([[positive]]), 1.0).item()
        assert found == pytest.approx(expected, abs=1e-6)
    floor = sorting_loss(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 1.0).item()
    assert floor == pytest.approx(0.159681, abs=1e-6)


def slow_permutation(values: torch.Tensor, beta: float) -> torch.Tensor:
    """N x N: probability that a value (row) ends at a place (column), layer by layer through the odd-even network."""
    count = len(values)
    permutation = torch.eye(count, dtype=values.dtype)
    for layer in range(count):
        after, mixed = list(values), permutation.clone()
        for left in range(layer % 2, count - 1, 2):
            a, b = values[left], values[left + 1]
            stay = torch.arctan(beta * (b - a)) / math.pi + 0.5
            after[left], after[left + 1] = stay * a + (1 - stay) * b, (1 - stay) * a + stay * b
            mixed[:, left] = stay * permutation[:, left] + (1 - stay) * permutation[:, left + 1]
            mixed[:, left + 1] = (1 - stay) * permutation[:, left] + stay * permutation[:, left + 1]
        values, permutation = torch.stack(after), mixed
    return permutation


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_network_equals_its_permutation_matrix_with_gradients(count: int) -> None:
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).requires_grad_()
    weights = torch.randn(3, count, dtype=torch.float64)
    for first in range(count + 1):
        slow = torch.stack([slow_permutation(row, 2.0)[:, :first].sum(dim=1) for row in values])
        fast = landing(values, first, 2.0)
        torch.testing.assert_close(fast, slow)
        if 0 < first < count:
            found = [torch.autograd.grad((part * weights).sum(), values)[0] for part in (fast, slow)]
            torch.testing.assert_close(*found)


def slow_groco(views: list[torch.Tensor], k: int, beta: float) -> torch.Tensor:
    """The authors' way: the whole permutation, both groups' columns summed, the mean of two cross-entropies."""
    losses = []
    count = len(views[0])
    k = min(k, count - 1)
    for at, anchors in enumerate(views):
        for i in range(count):
            positives = torch.stack([anchors[i] @ views[p][i].detach() for p in range(len(views)) if p != at])
            others = torch.stack([anchors[i] @ anchors[j].detach() for j in range(count) if j != i])
            values = torch.cat([others.sort().values[-k:], positives.sort().values])
            permutation = slow_permutation(values, beta)
            target = (torch.arange(len(values)) < k).float()
            groups = ((permutation[:, :k].sum(dim=1), target), (permutation[:, k:].sum(dim=1), 1 - target))
            losses.append(sum(F.binary_cross_entropy(found.clamp(0, 1), wanted) for found, wanted in groups) / 2)
    return torch.stack(losses).mean()  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("number", [2, 3])
def test_groco_equals_the_slow_definition_with_gradients(count: int, number: int) -> None:
    found = []
    for way in ("fast", "slow"):
        views = [unit(count, seed=seed).requires_grad_() for seed in range(number)]
        loss = output_of(views, k=4, beta=1.5).loss if way == "fast" else slow_groco(views, 4, 1.5)
        found.append([loss, *torch.autograd.grad(loss, views)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


def test_right_order_costs_less_than_any_swap_of_the_groups() -> None:
    negative, positive = torch.tensor([[-0.2, 0.0, 0.3]]), torch.tensor([[0.5, 0.9]])
    right = sorting_loss(negative, positive, 1.0)
    for i in range(3):
        for j in range(2):
            low, high = negative.clone(), positive.clone()
            low[0, i], high[0, j] = positive[0, j], negative[0, i]
            assert sorting_loss(low, high, 1.0) > right
    assert torch.equal(sorting_loss(negative.flip(1), positive.flip(1), 1.0), right), "no order inside a group"


def test_only_the_nearest_negatives_count() -> None:
    anchor = torch.tensor([[1.0, 0.0, 0.0]])
    positive = F.normalize(torch.tensor([[1.0, 0.5, 0.0]]), dim=1)
    near = F.normalize(torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 2.0]]), dim=1)
    far = [F.normalize(torch.tensor([[-1.0, x, 0.0]]), dim=1) for x in (0.1, 3.0)]
    losses = [groco.order(anchor, [positive], torch.cat([anchor, near, item]), Config(k=2))[0] for item in far]
    assert torch.equal(*losses)
    nearer = F.normalize(torch.tensor([[1.0, 0.1, 0.0]]), dim=1)
    assert groco.order(anchor, [positive], torch.cat([anchor, near, nearer]), Config(k=2))[0] > losses[0]


def test_the_gradient_reaches_the_anchor_alone() -> None:
    anchor, positive, others = (unit(4, seed=seed).requires_grad_() for seed in range(3))
    groco.order(anchor, [positive], torch.cat([anchor, others]), Config(k=3))[0].backward()
    assert anchor.grad is not None
    assert anchor.grad.any()
    assert positive.grad is None
    assert others.grad is None


def test_empty_sets_give_no_loss() -> None:
    """A single sample has no negative; nor has anyone where all captions are equal."""
    alone = unit(1).requires_grad_()
    output = output_of([alone, unit(1, seed=1)])
    output.loss.backward()
    assert output.loss.item() == output.parts["ordered"].item() == 0.0
    config = Config(clip_weight=0.0, between="texts", mask="captions", k=1)
    module = groco.build(config, Dims(5, 0.0))
    for ids, some in (([7, 7, 9], True), ([7, 7, 7], False)):
        image, text = (unit(3, seed=seed).requires_grad_() for seed in range(2))
        output = module(Features(image, text, torch.tensor(ids)[:, None]), torch.tensor(10.0))
        output.loss.backward()
        assert image.grad is not None
        assert torch.isfinite(image.grad).all()
        assert bool(output.loss > 0) == some == bool(image.grad.any())


def test_between_texts_by_hand() -> None:
    """Pictures and texts on the axes: every anchor has its positive at 1 and one negative at 0: -log 0.75, in order."""
    config = Config(clip_weight=0.0, between="texts")
    eye = torch.eye(2)
    output = groco.build(config, Dims(2, 0.0))(Features(eye, eye), torch.tensor(10.0))
    assert output.loss.item() == pytest.approx(0.287682, abs=1e-6)
    assert output.parts["ordered"].item() == 1.0
