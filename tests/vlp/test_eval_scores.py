"""The arithmetic of the evaluations: hand-derived values, slow references, tiles against the whole."""

import math
import resource
import sys

import pytest
import torch
from torch import Tensor

from vlp.evals import _scores, geometry
from vlp.evals._encode import Encoder
from vlp.evals._scores import (
    accuracies,
    average_precision,
    best_ranks,
    mask_of,
    mean_average_precision,
    neighbours,
    tiled_ranks,
)
from vlp.evals.knn import Votes
from vlp.evals.linear_probe import Config, Probe, choose, measure
from vlp.testing import micro_bundle, run_ranks


def directions(rows: int, width: int = 16, seed: int = 0) -> Tensor:
    """Random L2-normalised rows."""
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def labels(rows: int, classes: int, most: int = 3, seed: int = 0) -> list[list[int]]:
    """One to `most` random classes for each row."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most + 1, (rows,), generator=generator).tolist()
    return [torch.randperm(classes, generator=generator)[:count].tolist() for count in counts]


def test_ranks_by_hand() -> None:
    """Query 0: right candidate 2 has the second-best score: rank 1. Query 1: two right ones, the better leads: rank 0.

    Query 2: the right one ties with two wrong ones, which count as ahead: rank 2.
    """
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3], [0.4, 0.4, 0.4]])
    right = mask_of([[2], [1, 2], [0]], 3)
    assert best_ranks(scores, right).tolist() == [1, 0, 2]


def test_accuracies_by_hand() -> None:
    """Ranks 0, 0, 1, 7 of pictures of the classes 0, 0, 0, 2: top1 2/4, top5 3/4; class 0 has 2/3, class 2 has 0."""
    found = dict(accuracies(torch.tensor([0, 0, 1, 7]), [[0, 2], [0], [0], [2]], 4))
    assert found == {
        "top1": 0.5, "top5": 0.75, "mean_per_class_top1": pytest.approx(1 / 3), "largest_class": 0.75,
        "classes": 4.0, "pictures": 4.0,
    }  # fmt: skip


def test_average_precision_by_hand() -> None:
    """Class 0: right at the places 1 and 3: (1/1 + 2/3) / 2. Class 1: its right picture ties with a wrong one for the
    first place, so its precision is 1/2, in whichever order they stand. Class 2 has no picture: NaN.
    """
    scores = torch.tensor([[0.9, 0.7, 0.5], [0.8, 0.7, 0.1], [0.7, 0.1, 0.3], [0.1, 0.2, 0.2]])
    for order in ([0, 1, 2, 3], [1, 0, 3, 2]):
        found = average_precision(scores[order], mask_of([[0], [1], [0], []], 3)[order])
        assert found[:2].tolist() == pytest.approx([5 / 6, 1 / 2])
        assert math.isnan(found[2])


def slow_average_precision(scores: list[float], right: list[bool]) -> float:
    """Steps of the precision-recall curve, threshold by threshold, from its definition."""
    total, before = 0.0, 0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [hit for score, hit in zip(scores, right, strict=True) if score >= threshold]
        total += (sum(chosen) - before) / sum(right) * sum(chosen) / len(chosen)
        before = sum(chosen)
    return total


def test_mean_average_precision_equals_the_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ties (scores of one digit), several labels per picture, a class that never occurs; a tile is 16 classes."""
    monkeypatch.setattr(_scores, "TILE", 100)
    targets = labels(60, 39)
    scores = (torch.rand(60, 40, generator=torch.Generator().manual_seed(1)) * 10).round() / 10
    right = mask_of(targets, 40)
    assert not right[:, 39].any()
    slow = [
        slow_average_precision(scores[:, number].tolist(), right[:, number].tolist())
        for number in range(40)
        if right[:, number].any()
    ]
    found = dict(mean_average_precision(lambda run: scores[:, run.start : run.stop], targets, 40))
    assert found["mAP"] == pytest.approx(sum(slow) / len(slow), abs=1e-12)
    assert found["mAP_classes"] == len(slow) < 40
    assert found["chance_mAP"] == pytest.approx(float(right.double().mean(dim=0)[:39].sum()) / len(slow))


def test_tiles_equal_the_whole() -> None:
    """3,000 queries by 3,000 candidates are three tiles of ranks; neighbours have twelve of queries and one of rows."""
    image, text = directions(3000), directions(3000, seed=1)
    right = labels(3000, 3000)
    whole = image @ text.T
    ranks = tiled_ranks(lambda run: image[run.start : run.stop] @ text.T, right, 3000)
    assert whole.numel() > _scores.TILE
    assert torch.equal(ranks, best_ranks(whole, mask_of(right, 3000)))
    near = whole.topk(7)
    cosine, rows = neighbours(image, text, 7)
    assert torch.equal(rows, near.indices)
    torch.testing.assert_close(cosine.float(), near.values)


def test_neighbours_are_merged_over_tiles_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scores, "TILE", 256 * 10)
    image, text = directions(30), directions(95, seed=1)
    assert torch.equal(neighbours(image, text, 7)[1], (image @ text.T).topk(7).indices)
    assert neighbours(image, text[:3], 7)[1].shape == (30, 3), "fewer rows than neighbours asked for"


def peak_of(rank: int) -> float:
    """MiB that the tiled work adds to this process' highest resident size, on 12,000 by 12,000 rows."""
    query, candidate = directions(12_000), directions(12_000, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tiled_ranks(lambda run: query[run.start : run.stop] @ candidate.T, [[row] for row in range(12_000)], 12_000)
    neighbours(query, candidate, 20)
    geometry.uniformity(query, 2.0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has another unit elsewhere")
def test_memory_does_not_grow_with_the_square() -> None:
    """All similarities at once would take 549 MiB in float32, before anything is compared."""
    (peak,) = run_ranks(peak_of, 1)
    assert peak < 250


def test_votes_by_hand() -> None:
    """Temperature 1/ln 2, so a cosine less by 1 halves a vote. Neighbours 2, 0, 1 at 1, 0, 0 of the classes 1, 0, 0:
    class 1 has 1, class 0 has 1/2 + 1/2 = 1; with several labels, neighbour 1 also votes for class 2.
    """
    cosine, near = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[2, 0, 1]])
    votes = Votes(cosine, near, [[0], [0, 2], [1]], 1 / math.log(2))
    assert votes.count(range(1), range(3))[0].tolist() == pytest.approx([1.0, 1.0, 0.5])
    assert votes.count(range(1), range(2, 4))[0].tolist() == pytest.approx([0.5, 0.0])


def test_votes_equal_the_slow_ones() -> None:
    train, test = directions(50), directions(20, seed=1)
    voters = labels(50, 6)
    cosine, near = neighbours(test, train, 8)
    slow = torch.zeros(20, 6, dtype=torch.float64)
    for query in range(20):
        cosines = [float(test[query] @ train[row]) for row in range(50)]
        for row in sorted(range(50), key=lambda row: -cosines[row])[:8]:
            for number in voters[row]:
                slow[query, number] += math.exp(cosines[row] / 0.07)
    found = Votes(cosine, near, voters, 0.07).count(range(20), range(6))
    slow /= (cosine[:, :1] / 0.07).exp()
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-6)


def test_a_logistic_regression_by_hand() -> None:
    """x = 1 and -1 with and without the label: b = 0 by symmetry, and the mean loss ln(1 + e^-w) + penalty / 2 w^2 is
    least where 1 / (1 + e^w) = penalty w. With penalty 1 / (1 + e) that is w = 1.
    """
    probe = Probe(torch.tensor([[1.0], [-1.0]]), [[0], []], 1, multi=True, iterations=100)
    score = probe.fit(1 / (1 + math.e))
    assert probe.weight_DC.flatten().tolist() == pytest.approx([1.0, 0.0], abs=1e-4)
    assert score(torch.tensor([[3.0]]))(range(1), range(1)).item() == pytest.approx(3.0, abs=1e-3)


def test_a_softmax_regression_by_hand() -> None:
    """The same pictures with the classes 0 and 1: w and -w, by symmetry, differ by 2w, the loss is
    ln(1 + e^-2w) + penalty w^2, least where 1 / (1 + e^2w) = penalty w. With penalty 1 / (1 + e^2) that is w = 1.
    """
    probe = Probe(torch.tensor([[1.0], [-1.0]]), [[0], [1]], 2, multi=False, iterations=100)
    probe.fit(1 / (1 + math.e**2))
    assert probe.weight_DC.flatten().tolist() == pytest.approx([1.0, -1.0, 0.0, 0.0], abs=1e-4)


@pytest.mark.parametrize("multi", [False, True])
def test_a_probe_ends_where_the_gradient_is_zero(multi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The objective of the module's head, written out for all pictures at once; the probe goes through tiles of 10."""
    monkeypatch.setattr("vlp.evals.linear_probe.TILE", 50)
    features, targets = directions(95, 4) + 3.0, labels(95, 5)
    probe = Probe(features, targets, 5, multi, iterations=300)
    probe.fit(0.01)
    weight = probe.weight_DC.double().requires_grad_()
    x = (features - features.mean(dim=0)).double()
    x = x / x.square().mean().sqrt()
    logits = x @ weight[:-1] + weight[-1]
    if multi:
        wanted = mask_of(targets, 5).double()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1).mean()
    else:
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([found[0] for found in targets]))
    (loss + 0.01 / 2 * weight[:-1].square().sum()).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-4


def test_the_penalty_is_chosen_on_training_pictures_alone() -> None:
    """Labels that one direction decides, and some wrong ones: both extremes lose, and the test set is never asked."""
    features = directions(400, 8)
    noise = torch.rand(400, generator=torch.Generator().manual_seed(3)) < 0.25
    targets = [[int((row[0] > 0) ^ wrong)] for row, wrong in zip(features, noise, strict=True)]
    config = Config(train="x", penalties=(1e-6, 1e3, 1e-2))
    assert config.penalties == (1e3, 1e-2, 1e-6)
    penalty, reached = choose(features, targets, 2, False, config)
    assert penalty < 1e3
    by_hand = []
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    for strength in config.penalties:
        probe = Probe(features[order[80:]], [targets[row] for row in order[80:]], 2, False, 100)
        score = probe.fit(strength)(features[order[:80]])
        by_hand.append(dict(measure(score, [targets[row] for row in order[:80]], 2, False))["top1"])
    assert reached == pytest.approx(max(by_hand), abs=0.02)


def test_geometry_by_hand() -> None:
    """Singular values 3 and 1: shares 3/4 and 1/4, exp of their entropy is 4 / 3^(3/4); equal ones: their number.

    RankMe adds 1e-7 to each of the three shares of (1, 0, 0): exp(-1e-7 - 2e-7 ln 1e-7), 1 + 3.12e-6 or so.
    """
    assert geometry.effective_rank(torch.tensor([3.0, 1.0, 0.0]).double()) == pytest.approx(4 / 3**0.75)
    assert geometry.effective_rank(torch.ones(7).double()) == pytest.approx(7)
    rankme = geometry.effective_rank(torch.tensor([1.0, 0.0, 0.0]).double(), 1e-7)
    assert rankme == pytest.approx(math.exp(-1e-7 - 2e-7 * math.log(1e-7)), abs=1e-12)
    values = geometry.singular_values(torch.tensor([[3.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 0]]))
    assert values.tolist() == pytest.approx([0, math.sqrt(2), 3])
    low = directions(500, 3) @ directions(3, 16, seed=1)
    torch.testing.assert_close(geometry.singular_values(low)[13:], torch.linalg.svdvals(low.double()).flip(0)[13:])
    assert geometry.singular_values(low)[:13].abs().max() < 1e-3


def test_alignment_and_uniformity_by_hand() -> None:
    """Points of the unit circle at 0, 90 and 180 degrees: squared distances 2, 2 and 4.

    Uniformity with t = 2: ln((2 e^-4 + e^-8) / 3). Alignment of 0 with 90 and 0 with 180: (2 + 4) / 2, and with
    alpha = 1 (sqrt 2 + 2) / 2.
    """
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert geometry.uniformity(points, 2.0) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    pairs = torch.tensor([0, 0]), torch.tensor([1, 2])
    assert geometry.alignment(points, points, *pairs, alpha=2.0) == pytest.approx(3.0)
    assert geometry.alignment(points, points, *pairs, alpha=1.0) == pytest.approx((math.sqrt(2) + 2) / 2)
    many = directions(700)
    expected = torch.pdist(many.double()).square().mul(-2).exp().mean().log()
    assert geometry.uniformity(many, 2.0) == pytest.approx(float(expected))


def test_a_prompt_head_is_that_of_the_server() -> None:
    from vlp.infer import label_head, make_prompts

    bundle, templates = micro_bundle(), ("a {}", "the {} there", "{}")
    names = ["red circle", "cat", "tall tree"]
    found = Encoder(bundle).prompts([make_prompts([name], templates) for name in names])
    torch.testing.assert_close(found, label_head(bundle, names, templates), atol=1e-6, rtol=0)
    assert Encoder(bundle).texts([]).shape == (0, 16)
