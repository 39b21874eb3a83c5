"""The arithmetic of the evaluations by label: hand-derived values and slow references."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import MissingField
from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp import evals
from vlp.evals import _scores, label_alignment, label_retrieval, linear_probe
from vlp.evals._scores import mask_of, micro_average_precision
from vlp.testing import micro_bundle, picture


def rows_of(count: int, width: int = 6, seed: int = 0) -> Tensor:
    """Random L2-normalised rows."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_pictures_find_their_label_by_hand() -> None:
    """Four pictures at 0, 10, 50 and 90 degrees with the labels a, a, b, a.

    Query 0 sees a, b, a: (1/1 + 2/3) / 2. Query 1 (10 degrees away from 0, 40 from 2, 80 from 3) sees a, b, a as well.
    Query 2 has no partner and is left out. Query 3 sees b, a, a: (1/2 + 2/3) / 2. P@1 is 1, 1, 0; of the three others
    two are right for every query that counts.
    """
    angles = torch.tensor([0.0, 10.0, 50.0, 90.0]) * math.pi / 180
    image = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = dict(label_retrieval.among_pictures(image, [[0], [0], [1], [0]], 2, "x"))
    assert found == {
        "image/mAP": pytest.approx((5 / 6 + 5 / 6 + 7 / 12) / 3),
        "image/P@1": pytest.approx(2 / 3),
        "image/P@5": pytest.approx(2 / 5),
        "image/chance_mAP": pytest.approx(2 / 3),
        "image/queries": 3.0,
    }


def test_pictures_against_a_slow_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several labels, a tile of 3 queries, 41 pictures: precision at every right picture, read off a sorted list."""
    image, generator = rows_of(41), torch.Generator().manual_seed(1)
    classes = [torch.randperm(9, generator=generator)[: 1 + n % 3].tolist() for n in range(41)]
    expected = []
    for query in range(41):
        order = sorted((n for n in range(41) if n != query), key=lambda n: -float(image[query] @ image[n]))
        right = [bool(set(classes[n]) & set(classes[query])) for n in order]
        places = [place for place, is_right in enumerate(right, 1) if is_right]
        expected.append(sum(hit / place for hit, place in enumerate(places, 1)) / len(places))
    monkeypatch.setattr(label_retrieval, "TILE", 3 * 41)
    found = dict(label_retrieval.among_pictures(image, classes, 9, "x"))
    assert found["image/mAP"] == pytest.approx(sum(expected) / 41, rel=1e-6)


def test_names_of_labels_find_their_pictures_by_hand() -> None:
    """Text 0 sees the pictures 0 (right), 1 (wrong), 2 (right): (1 + 2/3) / 2. Text 2 sees 2 (wrong), 1 (right): 1/2.

    Nobody carries label 1. Of five places there are only three.
    """
    angles = torch.tensor([0.0, 30.0, 60.0]) * math.pi / 180
    image = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = dict(label_retrieval.from_texts(image[[0, 1, 2]], image, [[0], [2], [0]]))
    assert found["text/queries"] == 2
    assert found["text/mAP"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert found["text/P@5"] == pytest.approx((2 / 5 + 1 / 5) / 2)


def test_without_partners_there_is_nothing_to_find() -> None:
    with pytest.raises(MissingField, match="no two pictures share a label"):
        dict(label_retrieval.among_pictures(rows_of(3), [[0], [1], [2]], 3, "x"))


def test_spearman_by_hand() -> None:
    """1, 2, 2, 4 have the ranks 1, 2.5, 2.5, 4; 10, 20, 40, 30 have 1, 2, 4, 3.

    Less the mean 2.5: (-1.5, 0, 0, 1.5) and (-1.5, -0.5, 1.5, 0.5): 3 / sqrt(4.5 * 5).
    """
    first, second = torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([10.0, 20.0, 40.0, 30.0])
    assert label_alignment.mean_ranks(first).tolist() == [1, 2.5, 2.5, 4]
    assert label_alignment.spearman(first, second) == pytest.approx(3 / math.sqrt(22.5))
    assert label_alignment.spearman(first, -first) == pytest.approx(-1)
    assert label_alignment.spearman(first, torch.ones(4)) == 0


def test_pairs_are_all_of_them_or_as_many_as_asked_for() -> None:
    assert label_alignment.draw_pairs(4, 6, 0).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    drawn = label_alignment.draw_pairs(40, 200, 0)
    assert drawn.shape == (200, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert drawn.min() == 0
    assert drawn.max() == 39
    assert not torch.equal(drawn, label_alignment.draw_pairs(40, 200, 1))


@pytest.mark.parametrize("tile", [1 << 22, 64])
def test_micro_average_precision_is_that_of_one_long_list(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Scores of few distinct values, so that many tie: the precision at a score counts all that reach it."""
    monkeypatch.setattr(_scores, "TILE", tile)
    monkeypatch.setattr(_scores, "FEWEST", 2)
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 12, (17, 9), generator=generator).float()
    right = [torch.randperm(9, generator=generator)[: n % 4].tolist() for n in range(17)]
    flat, truth = scores.flatten(), mask_of(right, 9).flatten()
    expected = torch.stack([truth[flat >= score].double().mean() for score in flat[truth]]).mean()
    found = micro_average_precision(lambda run: scores[:, run.start : run.stop], right, 9)
    assert found == pytest.approx(float(expected))


def test_a_probe_learns_from_the_share_it_is_given() -> None:
    rows, targets = list(range(50)), [[n % 3] for n in range(50)]
    config = linear_probe.Config(train="x", share=0.2)
    few, fewer_targets = linear_probe.some(rows, targets, config)
    assert len(few) == 10
    assert fewer_targets == [targets[row] for row in few]
    assert few == sorted(set(few))
    assert linear_probe.some(rows, targets, linear_probe.Config(train="x")) == (rows, targets)
    assert few != linear_probe.some(rows, targets, linear_probe.Config(train="x", share=0.2, seed=1))[0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures with two labels and a column that says something else."""
    folder = tmp_path_factory.mktemp("shards") / "all"
    records = [
        Record(
            picture(n), (f"word {n}",), "test", f"{n}", labels=(f"a {n % 4}", f"b {n % 3}"), extra={"kind": f"k{n % 2}"}
        )
        for n in range(30)
    ]
    write_shards(records, folder, WriteOptions(), kind="test", licences={}, progress=False)
    return folder


def test_options_of_retrieval_by_label(shards: Path) -> None:
    bundle = micro_bundle()
    plain = evals.evaluate(bundle, "label-retrieval", shards)
    assert not any(name.startswith("text/") for name in plain)
    kinds = evals.evaluate(bundle, "label-retrieval", shards, {"column": "kind", "templates": ["a {}"]})
    assert kinds["image/chance_mAP"] == pytest.approx(14 / 29)
    assert kinds["text/queries"] == 2
    shared = evals.evaluate(bundle, "label-retrieval", shards, {"match": "any"})
    assert plain["image/chance_mAP"] == pytest.approx(sum((7, 7, 6, 6)[n % 4] for n in range(30)) / 30 / 29)
    assert shared["image/chance_mAP"] > plain["image/chance_mAP"]


def test_alignment_counts_the_pairs_that_share_a_label(shards: Path) -> None:
    found = evals.evaluate(micro_bundle(), "label-alignment", shards)
    alike = sum(a % 4 == b % 4 or a % 3 == b % 3 for a in range(30) for b in range(a))
    assert found["pairs"] == 435
    assert found["alike"] == pytest.approx(alike / 435)
    assert -1 <= found["spearman"] <= 1
