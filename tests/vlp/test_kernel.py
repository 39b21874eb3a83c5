"""The tiled losses against slow versions written straight from their definitions, gradients included."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.objectives import base, clip
from vlp.objectives._kernel import Job, Judge, Pairs, Side, pairwise_sigmoid, two_way
from vlp.objectives.base import Features

Leaves = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def leaves(count: int, scale: float = 4.0, seed: int = 0) -> Leaves:
    generator = torch.Generator().manual_seed(seed)
    image, text = F.normalize(torch.randn(2, count, 6, generator=generator), dim=2)
    return image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)


def with_gradients(loss: Loss, inputs: Leaves) -> list[Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def assert_equal(fast: Loss, slow: Loss, inputs: Leaves, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for found, expected in zip(with_gradients(fast, inputs), with_gradients(slow, inputs), strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def judged(rows: Side, columns: Side) -> Pairs:
    """Everything at once, as a pure function of two labels per sample: equal colours are no negatives, targets follow
    the distance of sizes, weights their product. A size of 9 has no target at all."""
    (colour_R, size_R), (colour_C, size_C) = rows, columns
    difference_RC = (size_R[:, None] - size_C).abs()
    target_RC = torch.where(size_R[:, None] == 9, 0.0, (1.0 - difference_RC / 2).clamp(min=0.0))
    return Pairs(colour_R[:, None] == colour_C, 0.1 * size_R[:, None] * size_C, target_RC)


def only_excluded(rows: Side, columns: Side) -> Pairs:
    return Pairs(judged(rows, columns).excluded_RC)


def slow_two_way(
    image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs, job: Job, weights: tuple[Tensor, Tensor]
) -> Tensor:
    """Entry by entry; 0.3 of the first direction, 0.7 of the second."""
    count, total = len(image), torch.zeros(())
    for direction, (queries, candidates) in enumerate(((image, text), (text, image))):
        at: Callable[[Tensor, int, int], Tensor] = (
            (lambda t, i, j: t[i, j]) if direction == 0 else lambda t, i, j: t[j, i]
        )
        for i in range(count):
            scores = [scale * (queries[i] * candidates[j]).sum() for j in range(count)]
            excluded = torch.zeros(count, count, dtype=torch.bool) if pairs.excluded_RC is None else pairs.excluded_RC
            inside = [j for j in range(count) if (not job.decoupled if j == i else not at(excluded, i, j))]
            target = torch.eye(count) if pairs.target_RC is None else pairs.target_RC
            targets = [at(target, i, j) for j in range(count)]
            if not inside or sum(targets) == 0:
                continue
            log_weight = torch.zeros(count, count) if pairs.log_weight_RC is None else pairs.log_weight_RC
            denominator = torch.stack([scores[j] + at(log_weight, i, j) for j in inside]).logsumexp(dim=0)
            mean = sum(t * s for t, s in zip(targets, scores, strict=True)) / sum(targets)
            even = torch.stack([scores[j] for j in inside]).mean()
            positive = (1.0 - job.smoothing) * mean + job.smoothing * even
            share = (0.3, 0.7)[direction] / count
            total = total + share * (denominator - weights[direction][i] * positive)
    return total


@pytest.mark.parametrize("tile", [2, 3, 100])
@pytest.mark.parametrize("judge", [None, only_excluded, judged])
@pytest.mark.parametrize(("smoothing", "decoupled"), [(0.0, False), (0.2, False), (0.0, True)])
@pytest.mark.parametrize("scale", [4.0, 100.0])
def test_tiles_equal_the_definition(
    tile: int, judge: Judge | None, smoothing: float, decoupled: bool, scale: float
) -> None:
    """At scale 100 scores lie up to 200 apart, more than float32's exponential bears with one offset."""
    inputs = leaves(7, scale)
    labels = torch.tensor([0, 0, 1, 2, 1, 3, 4]), torch.tensor([1, 2, 9, 1, 3, 2, 5])
    job = Job(judge=judge, smoothing=smoothing, decoupled=decoupled, tile=tile)
    weights = torch.linspace(0.5, 1.5, 7), torch.linspace(2.0, 1.0, 7)
    pairs = judge(labels, labels) if judge else Pairs()

    def fast(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
        forward, backward = two_way(image, text, factor, labels, job, weights)
        return 0.3 * forward + 0.7 * backward

    assert_equal(fast, lambda i, t, s: slow_two_way(i, t, s, pairs, job, weights), inputs, 2e-4, 1e-5)


def nothing_true(rows: Side, columns: Side) -> Pairs:
    return Pairs(target_RC=torch.zeros(len(rows[0]), len(columns[0])))


@pytest.mark.parametrize(("count", "job"), [(1, Job(decoupled=True)), (3, Job(judge=nothing_true))])
def test_rows_without_denominator_or_positive_count_nothing(count: int, job: Job) -> None:
    """One sample, decoupled: nothing is left to tell it from. And nobody has a positive: no loss, no gradient."""

    def both(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return torch.stack(two_way(image, text, scale, (torch.zeros(count),), job)).sum()

    loss, *gradients = with_gradients(both, leaves(count))
    assert loss == 0.0
    assert all((gradient == 0.0).all() for gradient in gradients)


def slow_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs) -> Tensor:
    """Entry by entry: -T log sigma(x) - (1 - T) log sigma(-x)."""
    count, total = len(image), torch.zeros(())
    for i in range(count):
        for j in range(count):
            x = scale * (image[i] * text[j]).sum() + bias
            target = float(i == j) if pairs.target_RC is None else pairs.target_RC[i, j]
            if i == j or pairs.excluded_RC is None or not pairs.excluded_RC[i, j]:
                total = total - target * F.logsigmoid(x) - (1.0 - target) * F.logsigmoid(-x)
    return total / count


def soft(rows: Side, columns: Side) -> Pairs:
    return Pairs(target_RC=judged(rows, columns).target_RC)


@pytest.mark.parametrize("tile", [2, 3, 100])
@pytest.mark.parametrize("judge", [None, only_excluded, soft])
def test_sigmoid_tiles_equal_the_definition(tile: int, judge: Judge | None) -> None:
    inputs = leaves(7)
    labels = torch.tensor([0, 0, 1, 2, 1, 3, 4]), torch.tensor([1, 2, 9, 1, 3, 2, 5])
    pairs = judge(labels, labels) if judge else Pairs()
    job = Job(judge=judge, tile=tile)
    bias = torch.tensor(-1.5, requires_grad=True)
    assert_equal(
        lambda i, t, s: pairwise_sigmoid(i, t, s, bias, labels, job),
        lambda i, t, s: slow_sigmoid(i, t, s, bias, pairs),
        inputs,
    )
    fast, slow = (
        torch.autograd.grad(loss, bias)[0]
        for loss in (pairwise_sigmoid(*inputs, bias, labels, job), slow_sigmoid(*inputs, bias, pairs))
    )
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1, "mask": "captions", "image_weight": 0.75}])
def test_one_piece_and_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch, options: dict[str, object]) -> None:
    """Both sides of the size from which batches are tiled, loss and gradients, and bfloat16 tiles near them."""
    inputs, ids = leaves(300, 14.0), (torch.arange(300) // 2)[:, None] if options else None

    def loss(image: Tensor, text: Tensor, scale: Tensor, precision: str = "fp32") -> Tensor:
        config = clip.Config.model_validate(options | {"precision": precision})
        return clip.clip_loss(Features(image, text, ids), scale, config)[0]

    whole = with_gradients(loss, inputs)
    monkeypatch.setattr(base, "UNTILED", 0)
    for found, expected in zip(with_gradients(loss, inputs), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    low = with_gradients(lambda i, t, s: loss(i, t, s, "bf16"), inputs)
    assert low[0].item() == pytest.approx(whole[0].item(), rel=2e-3)
    assert F.cosine_similarity(low[1], whole[1]).min() > 0.999
    assert low[1].norm().item() == pytest.approx(whole[1].norm().item(), rel=5e-3)


def test_decoupled_by_hand() -> None:
    """Two pairs on the axes, scale 2, own pairs not in the denominators: log e^0 - 2 = -2 in every row and column."""
    forward, backward = two_way(torch.eye(2), torch.eye(2), torch.tensor(2.0), (), Job(decoupled=True))
    assert (forward.item(), backward.item()) == (-2.0, -2.0)


def test_weighted_negatives_by_hand() -> None:
    """Scores [[2, 0], [0, 2]], negatives weigh 3: log(e^2 + 3) - 2 = log(1 + 3 e^-2) = 0.340752."""
    log_weight = math.log(3) * (1 - torch.eye(2))
    job = Job(judge=lambda rows, columns: Pairs(log_weight_RC=log_weight))
    forward, _ = two_way(torch.eye(2), torch.eye(2), torch.tensor(2.0), (), job)
    assert forward.item() == pytest.approx(math.log(1 + 3 * math.exp(-2)), abs=1e-6)
    assert forward.item() == pytest.approx(0.340752, abs=1e-5)


def test_soft_targets_by_hand() -> None:
    """Scores [[2, 0], [0, 2]], targets 1 and 1/2, so 2/3 and 1/3: log(e^2 + 1) - 4/3 = 0.793595."""
    target = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    job = Job(judge=lambda rows, columns: Pairs(target_RC=target))
    forward, backward = two_way(torch.eye(2), torch.eye(2), torch.tensor(2.0), (), job)
    assert forward.item() == pytest.approx(0.793595, abs=1e-5)
    assert backward.item() == pytest.approx(0.793595, abs=1e-5)


def test_an_excluded_own_pair_without_a_target_is_out_by_hand() -> None:
    """Two pairs on the axes, scale 2, bias 0; of the first sample nothing is known: its row and column are left out.

    The second's own pair, target 1, costs log(1 + e^2) - 2 = 0.126928; divided by 2 samples. In InfoNCE it is alone in
    its denominator and costs 0. Without targets own pairs stay in, whatever the judge says.
    """
    unknown = torch.tensor([[True, True], [True, False]])
    known = Job(judge=lambda rows, columns: Pairs(unknown, target_RC=torch.diag(torch.tensor([0.0, 1.0]))))
    plain = Job(judge=lambda rows, columns: Pairs(unknown))
    eye, scale = torch.eye(2).requires_grad_(), torch.tensor(2.0)
    loss = pairwise_sigmoid(eye, torch.eye(2), scale, torch.tensor(0.0), (), known)
    (grad,) = torch.autograd.grad(loss, eye)
    assert loss.item() == pytest.approx(0.126928 / 2, abs=1e-6)
    assert not grad[0].any()
    assert two_way(torch.eye(2), torch.eye(2), scale, (), known)[0].item() == 0.0
    expected = pairwise_sigmoid(torch.eye(2), torch.eye(2), scale, torch.tensor(0.0), (), plain).item()
    assert expected == pytest.approx(0.126928, abs=1e-6)


@pytest.mark.parametrize("way", ["two_way", "sigmoid"])
def test_texts_without_a_gradient_change_nothing_for_the_pictures(way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 3, generator=generator), dim=1) for _ in range(2))
    found = []
    for wanted in (True, False):
        leaves = image.clone().requires_grad_(), text.clone().requires_grad_(wanted)
        if way == "two_way":
            loss = two_way(*leaves, torch.tensor(3.0))[0]
        else:
            loss = pairwise_sigmoid(*leaves, torch.tensor(3.0), torch.tensor(-1.0))
        loss.backward()
        found.append(leaves)
    assert torch.equal(found[0][0].grad, found[1][0].grad)  # type: ignore[arg-type]
    assert found[1][1].grad is None
