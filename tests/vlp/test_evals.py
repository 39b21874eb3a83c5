"""Evaluation: ranks by hand, every right answer accepted, the same numbers in the loop and by command."""

from pathlib import Path

import pytest
import torch

from data_pipelines.errors import ConfigError
from vlp import evals
from vlp.bundle import load_bundle
from vlp.evals._scores import best_ranks
from vlp.runlog import RunLog
from vlp.testing import micro_bundle


def test_ranks_by_hand() -> None:
    """Query 0: right candidate 2 has the second-best score: rank 1. Query 1: two right ones, the better leads: rank 0.

    Query 2: the right one ties with two wrong ones, which count as ahead: rank 2.
    """
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3], [0.4, 0.4, 0.4]])
    right = torch.tensor([[False, False, True], [False, True, True], [True, False, False]])
    assert best_ranks(scores, right).tolist() == [1, 0, 2]


def test_retrieval_counts_every_picture_of_a_caption(starter_shards: Path) -> None:
    metrics = evals.evaluate(micro_bundle(), "retrieval", starter_shards / "val")
    assert metrics["pictures"] == 2 * metrics["captions"], "two vendors draw every concept"
    assert metrics["image_to_text/chance_R@1"] == pytest.approx(1 / metrics["captions"])
    assert metrics["skipped"] == 0
    assert metrics["image_to_text/R@1"] <= metrics["image_to_text/R@5"] <= metrics["image_to_text/R@10"] <= 1


def test_a_model_that_ties_everything_scores_nothing(starter_shards: Path) -> None:
    bundle = micro_bundle()
    for parameter in bundle.model.get_submodule("visual").parameters():
        torch.nn.init.zeros_(parameter)
    metrics = evals.evaluate(bundle, "retrieval", starter_shards / "unseen_concepts")
    assert metrics["image_to_text/R@10"] == 0.0


def test_zero_shot_reports_the_largest_class_beside_the_accuracy(starter_shards: Path) -> None:
    metrics = evals.evaluate(micro_bundle(), "zero-shot", starter_shards / "unseen_concepts")
    assert metrics["classes"] == 7
    assert metrics["pictures"] == 199
    assert 1 / 7 < metrics["largest_class"] < 1
    assert 0 <= metrics["mean_per_class_top1"] <= 1


def test_the_loop_and_the_command_agree(trained: Path, starter_shards: Path) -> None:
    in_loop = RunLog(trained).rows("evals.jsonl")[-1]
    afterwards = evals.evaluate(load_bundle(trained), "retrieval", starter_shards / "val")
    assert {f"val/{name}": value for name, value in afterwards.items()} == {
        key: value for key, value in in_loop.items() if key != "step"
    }


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'sing'.*retrieval, zero-shot"):
        evals.evaluate(micro_bundle(), "sing", Path())
