"""Resumed runs equal undisturbed ones whatever the recipe; changes, failures and signals lose nothing."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlp.train
from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError, PipelineError
from vlp import run as runs
from vlp.bundle import load_bundle
from vlp.checkpoint import checkpoints, load_latest
from vlp.guard import Guard
from vlp.models import locking
from vlp.recipe import Recipe, dump, merge, validate
from vlp.run import Run, prepare, restore
from vlp.runlog import RunLog
from vlp.step import train_step
from vlp.train import Interrupted, train

Make = Callable[..., Recipe]
Step = Callable[[Run, Batch], dict[str, float]]
TIMED = ("seconds", "samples_per_second", "data_wait", "mfu")


class Kill(BaseException):
    """Stands for kill -9: nothing after the last checkpoint is saved."""


def changed(recipe: Recipe, **parts: Any) -> Recipe:
    return validate(merge(recipe.model_dump(), parts))


def curve(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in RunLog(folder).rows("metrics.jsonl")]


def spoiled(step: Step, bad: set[int]) -> Step:
    """Steps after which the count is in `bad` have a loss that is not a number."""

    def spoil(run: Run, batch: Batch) -> dict[str, float]:
        healthy = run.objective.forward

        def forward(*args: Any) -> Any:
            output = healthy(*args)
            return type(output)(output.loss * math.nan, output.parts)

        if run.step + 1 in bad:
            run.objective.forward = forward
        values = step(run, batch)
        run.objective.forward = healthy
        return values

    return spoil


def killed(recipe: Recipe, folder: Path, after: int, step: Step, patch: pytest.MonkeyPatch) -> None:
    def kill(run: Run, batch: Batch) -> dict[str, float]:
        values = step(run, batch)
        if run.step > after:
            raise Kill
        return values

    patch.setattr(vlp.train, "train_step", kill)
    with pytest.raises(Kill):
        train(recipe, folder, show=False)
    patch.setattr(vlp.train, "train_step", step)


LABELS = {"names": ["red", "yellow", "animal", "food", "face", "happy", "round", "square"], "multi": True}
BATCH_NORM = {
    "embed_dim": 16, "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "test_resnet", "timm_model_args": {"channels": [8, 8, 8, 16]},
        "timm_pool": "avg", "timm_proj": "linear",
    },
    "text_cfg": {"width": 32, "heads": 2, "layers": 1},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "thawing": {"model": {"lock_image": True, "thaw_image_at": 0.5}},
    "thawing a batch norm": {"model": {"config": BATCH_NORM, "lock_image": True, "thaw_image_at": 0.5}},
    "accumulation": {"optim": {"accumulate": 4, "layer_decay": 0.8}},
    "sizes": {"model": {"config": BATCH_NORM}, "run": {"sizes": {0.4: 8, 0.7: 12}}},
    "lamb": {"optim": {"name": "lamb"}},
    "pairs": {"data": {"labels": LABELS, "sampler": {"name": "label_paired", "k": 2}}, "objective": {"name": "supcon"}},
    "stateful": {"data": {"labels": LABELS, "views": 2}, "objective": {"name": "soft_multilabel", "momentum": 0.9}},
    "batch norm": {"model": {"config": BATCH_NORM}},
    "after going back": {"run": {"save_every": 1}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_bit_identical_whatever_the_recipe(
    micro_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed in step 9, resumed from step 7. Going back: steps 3 to 5 are refused, on with the weights of step 2."""
    recipe = changed(micro_recipe(save_every=7), **SETTINGS[name])
    step = spoiled(train_step, {3, 4, 5} if name == "after going back" else set())
    monkeypatch.setattr(vlp.train, "train_step", step)
    train(recipe, tmp_path / "whole", show=False)
    killed(recipe, tmp_path / "run", 8, step, monkeypatch)
    train(recipe, tmp_path / "run", resume=True, show=False)
    assert len(curve(tmp_path / "whole")) == 12
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    one, other = (load_bundle(tmp_path / run).model.state_dict() for run in ("run", "whole"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    refused = [RunLog(tmp_path / run).rows("refused.jsonl") for run in ("run", "whole")]
    assert refused[0] == refused[1]


def test_a_thawed_tower_is_thawed_when_read_back(micro_recipe: Make, tmp_path: Path) -> None:
    recipe = changed(micro_recipe(save_every=8), model={"lock_image": True, "thaw_image_at": 0.5})
    train(recipe, tmp_path / "run", show=False)
    run = prepare(recipe, tmp_path / "run")
    restore(run)
    assert not locking.apply(run.model, recipe.model, run.step / run.total), "nothing is left to thaw"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"optim": {"ema": 0.0}}, r"optim\.ema: the run began with 0\.9 and cannot be resumed with 0\.0"),
        ({"optim": {"name": "lion"}}, r"optim\.name: the run began with 'adamw' .* 'lion': leave it as in .*model\.w"),
        ({"objective": {"mask": "none"}}, r"objective\.mask: the run began with 'labels'"),
        ({"run": {"precision": "bf16"}}, r"run\.precision"),
        ({"model": {"lock_text": True}}, r"model\.lock_text"),
    ],
)
def test_a_recipe_that_leads_elsewhere_is_refused(
    micro_recipe: Make, trained: Path, part: dict[str, Any], message: str
) -> None:
    before = (trained / "recipe.yaml").read_bytes()
    with pytest.raises(ConfigError, match=message):
        train(changed(micro_recipe(), **part), trained, resume=True, show=False)
    assert (trained / "recipe.yaml").read_bytes() == before


def test_length_saves_logs_and_evaluations_may_change(micro_recipe: Make, tmp_path: Path) -> None:
    train(micro_recipe(steps=3), tmp_path / "run", show=False)
    recipe = micro_recipe(steps=5, save_every=1, keep=4, log_every=2, loggers=(), max_bad_steps=9)
    recipe = changed(
        recipe, description="longer", optim={"accumulate": 2}, data={"threads": 1}, objective={"exchange": "ring"}
    )
    recipe = validate({**recipe.model_dump(), "evals": [{"name": "val", "data": recipe.data.train}]})
    assert train(recipe, tmp_path / "run", resume=True, show=False)["steps"] == 5
    assert (tmp_path / "run" / "recipe.yaml").read_text() == dump(recipe)


def with_evals(recipe: Recipe, **changes: Any) -> Recipe:
    return validate({**recipe.model_dump(), "evals": [{"name": "val", "data": recipe.data.train, **changes}]})


def test_evaluations_without_data_are_refused_before_training(micro_recipe: Make, tmp_path: Path) -> None:
    recipe = with_evals(micro_recipe(), data=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"evals\.0\.data=.*nowhere"):
        train(recipe, tmp_path / "run", show=False)
    assert curve(tmp_path / "run") == []


@pytest.mark.parametrize("every", [0, 4])
def test_a_failing_evaluation_loses_no_step(
    micro_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Steps 12 and 4: the checkpoint is there, and a resume makes up for the evaluation."""

    def fail(*_: Any) -> Any:
        raise PipelineError("no disk, no shards")

    recipe = with_evals(micro_recipe(save_every=0), every=every)
    with monkeypatch.context() as broken:
        broken.setattr("vlp.evals.evaluate_all", fail)
        with pytest.raises(PipelineError, match="no shards"):
            train(recipe, tmp_path / "run", show=False)
    found = load_latest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found[1]["step"] == (every or 12)
    assert train(recipe, tmp_path / "run", resume=True, show=False)["metrics"]
    steps = [row["step"] for row in RunLog(tmp_path / "run").rows("evals.jsonl")]
    assert steps == ([4, 8, 12] if every else [12])


def test_a_best_metric_is_known_after_a_kill_in_the_evaluation(
    micro_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved at step 4 before the evaluation, which was the best; what is not a number never is."""
    name = "val/quality"
    values = iter([math.nan, 0.5, 0.9, 0.3])
    monkeypatch.setattr("vlp.evals.evaluate_all", lambda *_: {name: next(values)})
    recipe = changed(with_evals(micro_recipe(save_every=2), every=2), run={"keep_best": name})
    killed(recipe, tmp_path / "run", 6, train_step, monkeypatch)
    assert [row["step"] for row in RunLog(tmp_path / "run").rows("evals.jsonl")] == [2, 4, 6]
    values = iter([0.1, 0.2, math.nan])
    summary = train(recipe, tmp_path / "run", resume=True, show=False)
    assert summary["best"] == {"metric": name, "step": 6, "value": 0.9}
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-00000006"


def test_a_signal_skips_the_evaluations_that_are_due(
    micro_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in step 4: saved, not evaluated, and the command that the message gives continues the run."""

    def signalled(run: Run, batch: Batch) -> dict[str, float]:
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, batch)

    monkeypatch.setattr(vlp.train, "train_step", signalled)
    folder = tmp_path / "a run"
    recipe = with_evals(micro_recipe(steps=6, loggers=()), every=4)
    with pytest.raises(Interrupted, match=r"at step 4 and saved; to continue: vlp train '.*recipe\.yaml'") as stopped:
        train(recipe, folder, show=False)
    assert RunLog(folder).rows("evals.jsonl") == []
    command = shlex.split(str(stopped.value).partition("to continue: ")[2])
    subprocess.run([sys.executable, "-m", *command], check=True)
    assert [row["step"] for row in RunLog(folder).rows("evals.jsonl")] == [4, 6]


def test_a_signal_before_the_first_step_ends_the_run_at_once(
    micro_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(_: Recipe) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("the signal was put off")

    monkeypatch.setattr(runs, "make_tokenizer", slow)
    with pytest.raises(Interrupted, match="before the first step"):
        train(micro_recipe(), tmp_path / "run", show=False)


def test_a_full_disk_stops_logs_and_not_the_run(
    micro_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be written from step 3 to 6: two saves fail, rows are lost, and the run ends as another does."""
    open_file = Path.open
    full = False

    def check(*_: Any) -> None:
        if full:
            raise OSError(28, "No space left on device")

    def crowded(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "a":
            check()
        return open_file(path, mode, *args, **options)

    def watched(run: Run, batch: Batch) -> dict[str, float]:
        nonlocal full
        run.saver.wait()
        full = run.step in (2, 3, 4, 5)
        return train_step(run, batch)

    monkeypatch.setattr(Path, "open", crowded)
    monkeypatch.setattr(os, "fsync", check)
    monkeypatch.setattr(vlp.train, "train_step", watched)
    summary = train(micro_recipe(save_every=2, loggers=()), tmp_path / "run", show=False)
    assert summary["failed_saves"] == 2
    assert summary["steps"] == 12
    assert [row["step"] for row in curve(tmp_path / "run")] == [1, 2, 7, 8, 9, 10, 11, 12]


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, ())
    log.append("metrics.jsonl", {"step": 1})

    def cut(path: Path, *_: Any, **__: Any) -> Any:
        with open(path, "a") as handle:  # noqa: PTH123
            handle.write('{"st')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "open", cut)
        log.append("metrics.jsonl", {"step": 2})
    log.append("metrics.jsonl", {"step": 3})
    assert [row["step"] for row in log.rows("metrics.jsonl")] == [1, 3]
    assert log.failed == 1


def test_the_guard_remembers_how_often_the_run_went_back() -> None:
    guard = Guard(5.0)
    guard.check(1.0, 1.0)
    guard.rollbacks = 2
    other = Guard(5.0)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.rollbacks == 2
    for _ in range(48):
        other.check(1.0, 1.0)
    assert other.rollbacks == 2, "49 good steps"
    other.check(1.0, 1.0)
    assert other.rollbacks == 0
