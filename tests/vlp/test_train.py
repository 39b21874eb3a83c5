"""The trainer: it learns, it resumes bit for bit, it survives signals, bad steps and bad checkpoints."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.errors import ConfigError, PipelineError
from vlp.bundle import load_bundle
from vlp.checkpoint import checkpoints, load_latest, step_of
from vlp.recipe import Recipe, dump, validate
from vlp.run import picture_side, prepare
from vlp.runlog import RunLog
from vlp.step import compute_loss, train_step
from vlp.train import train

Make = Callable[..., Recipe]


def rows(folder: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "samples_per_second", "data_wait", "mfu")
    return [{k: v for k, v in row.items() if k not in timed} for row in RunLog(folder).rows("metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_bundle(folder).model.state_dict())


def test_a_run_learns_and_leaves_everything_behind(trained: Path) -> None:
    metrics = rows(trained)
    assert [row["step"] for row in metrics] == list(range(1, 13))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    evals = RunLog(trained).rows("evals.jsonl")
    assert [row["step"] for row in evals] == [6, 12]
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["metrics"] == {k: v for k, v in evals[-1].items() if k != "step"}
    assert {"recipe.yaml", "env.json", "checkpoints", "bundle"} <= {path.name for path in trained.iterdir()}
    ledger = json.loads((trained / "ledger.json").read_text())
    assert (ledger["seen"], ledger["trained"], ledger["quarantined"]) == (12 * 32, 12 * 32, {})
    assert {"packages", "revision", "device", "data"} <= set(json.loads((trained / "env.json").read_text()))


def test_the_same_seed_gives_the_same_weights(micro_recipe: Make, trained: Path, tmp_path: Path) -> None:
    train(micro_recipe(), tmp_path / "again", show=False)
    assert rows(tmp_path / "again") == rows(trained)
    again, first = weights(tmp_path / "again"), weights(trained)
    assert all(torch.equal(first[key], again[key]) for key in first)
    train(micro_recipe(seed=1, steps=2), tmp_path / "other", show=False)
    assert rows(tmp_path / "other")[0]["loss"] != rows(trained)[0]["loss"]


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_resume_is_bit_identical(micro_recipe: Make, trained: Path, tmp_path: Path, stop: int) -> None:
    """Killed after `stop` steps with checkpoints every 2: the rest of the curve equals the uninterrupted run's."""
    folder = tmp_path / "run"
    code = f"""
import os
from pathlib import Path
from vlp import train
from vlp.recipe import load_recipe
step = train.train_step
def kill_after(run, batch):
    values = step(run, batch)
    if run.step > {stop}:
        os._exit(9)
    return values
train.train_step = kill_after
train.train(load_recipe({str(tmp_path / "r.yaml")!r}), Path({str(folder)!r}), show=False)
"""
    (tmp_path / "r.yaml").write_text(dump(micro_recipe(save_every=2)))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(rows(folder)) == stop
    train(micro_recipe(save_every=2), folder, resume=True, show=False)
    assert rows(folder) == rows(trained)
    resumed, first = weights(folder), weights(trained)
    assert all(torch.equal(first[key], resumed[key]) for key in first)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_says_how_to_go_on(
    micro_recipe: Make, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "long.yaml").write_text(dump(micro_recipe(steps=100_000, save_every=0)))
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "vlp", "train", str(tmp_path / "long.yaml"), "--run-dir", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(rows(folder)) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "--resume" in message
    found = load_latest(folder / "checkpoints")
    assert found is not None
    assert found[1]["step"] == rows(folder)[-1]["step"], "no step is lost"


def test_a_run_folder_is_not_overwritten(micro_recipe: Make, trained: Path) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        train(micro_recipe(), trained, show=False)


def test_resume_with_other_data_is_refused(
    micro_recipe: Make, trained: Path, starter_shards: Path, tmp_path: Path
) -> None:
    settings = micro_recipe().model_dump()
    settings["data"]["train"] = starter_shards / "unseen_concepts"
    run = prepare(validate(settings), tmp_path)
    _, state = load_latest(trained / "checkpoints") or pytest.fail("no checkpoint")
    with pytest.raises(ConfigError, match="data: checkpoint"):
        run.loader.load_state_dict(state["loader"])


def test_a_bad_step_changes_no_weight_and_three_in_a_row_stop(micro_recipe: Make, tmp_path: Path) -> None:
    run = prepare(micro_recipe(on_bad_steps="stop"), tmp_path)
    batch = next(iter(run.loader))
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.recipe = validate({**run.recipe.model_dump(), "data": {**run.recipe.data.model_dump(), "image": {
        "size": 16, "resize": "longest", "std": (0.0, 0.0, 0.0)}}})  # fmt: skip  # division by zero: NaN everywhere
    assert all(math.isnan(train_step(run, batch)["loss"]) for _ in range(2))
    assert all(torch.equal(before[key], value) for key, value in run.model.state_dict().items())
    assert run.guard.in_a_row == 2
    with pytest.raises(PipelineError, match="3 steps in a row"):
        train_step(run, batch)
    refused = run.log.rows("refused.jsonl")
    assert [row["step"] for row in refused] == [1, 2, 3]
    assert refused[0]["keys"] == list(batch.keys)


def test_mixed_precision_is_close_to_float32(micro_recipe: Make, tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "amp_bf16"):
        run = prepare(micro_recipe(precision=precision), tmp_path)
        losses.append(float(compute_loss(run, next(iter(run.loader))).loss.detach()))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_progressive_sizes_end_at_full_size(micro_recipe: Make) -> None:
    recipe = micro_recipe(sizes={0.4: 8, 0.75: 12})
    assert [picture_side(recipe, share) for share in (0.0, 0.39, 0.4, 0.74, 0.75, 1.0)] == [8, 8, 12, 12, 16, 16]


def saved_steps(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(folder / "checkpoints")]


def test_checkpoints_are_due_by_epochs_and_by_minutes(micro_recipe: Make, tmp_path: Path) -> None:
    epoch = prepare(micro_recipe(), tmp_path / "look").loader.plan.steps
    settings = micro_recipe(save_every=0, save_epochs=0.5, steps=2 * epoch)
    assert settings.run.save_steps(epoch) == (round(epoch / 2),)
    train(micro_recipe(save_every=0, save_epochs=4 / epoch, keep=9), tmp_path / "epochs", show=False)
    assert saved_steps(tmp_path / "epochs") == [4, 8, 12]
    train(micro_recipe(save_every=0, save_minutes=1e-6, steps=5, keep=9), tmp_path / "minutes", show=False)
    assert saved_steps(tmp_path / "minutes") == [1, 2, 3, 4, 5]


def keeping(recipe: Recipe, best: str) -> Recipe:
    settings = recipe.model_dump()
    settings["run"]["keep_best"] = best
    settings["evals"] = [{"name": "val", "data": recipe.data.train, "every": 2}]
    return validate(settings)


def test_the_best_checkpoint_stays(micro_recipe: Make, tmp_path: Path) -> None:
    name = "val/image_to_text/R@10"
    summary = train(keeping(micro_recipe(save_every=1), name), tmp_path / "run", show=False)
    values = {row["step"]: row[name] for row in RunLog(tmp_path / "run").rows("evals.jsonl")}
    best = max(values, key=lambda step: (values[step], -step))
    assert summary["best"] == {"metric": name, "step": best, "value": values[best]}
    assert set(saved_steps(tmp_path / "run")) == {best, 11, 12}


def test_a_best_metric_that_nothing_measures_is_named(micro_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="begin with the name of an evaluation; there are: val"):
        keeping(micro_recipe(), "test/R@1")
    with pytest.raises(ConfigError, match="run.keep_best='val/nonsense' is no metric.*image_to_text/R@1"):
        train(keeping(micro_recipe(), "val/nonsense"), tmp_path / "run", show=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns about its own insides
def test_compiled_towers_train_as_the_plain_ones_do(micro_recipe: Make, trained: Path, tmp_path: Path) -> None:
    train(micro_recipe(compile=True, loggers=()), tmp_path / "run", show=False)
    found, expected = (
        [row["loss"] for row in RunLog(folder).rows("metrics.jsonl")] for folder in (tmp_path / "run", trained)
    )
    assert found == pytest.approx(expected, rel=1e-3)
