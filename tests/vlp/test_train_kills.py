"""Runs that are killed, stopped and fed with bad steps again and again end where an undisturbed run ends."""

import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from vlp.bundle import load_bundle
from vlp.checkpoint import checkpoints, load_latest, step_of
from vlp.models.locking import set_training
from vlp.recipe import Recipe, dump, load_recipe
from vlp.run import prepare
from vlp.runlog import RunLog
from vlp.step import train_step
from vlp.train import train

Make = Callable[..., Recipe]
INTERVAL = 5
CAMPAIGN = pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
TIMED = ("seconds", "samples_per_second", "data_wait", "mfu")


def curve(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in RunLog(folder).rows("metrics.jsonl")]


def run_once(recipe: str, folder: str) -> None:
    """What `vlp train --resume` does, in a process that is there already."""
    train(load_recipe(recipe), Path(folder), resume=True, show=False)


def launch(recipe: Path, folder: Path) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlp.train"])
    process = context.Process(target=run_once, args=(str(recipe), str(folder)))
    process.start()
    return process


def wait_until(process: BaseProcess, due: Callable[[], bool]) -> bool:
    """True when it is due, False when the process ended first."""
    until = time.monotonic() + 120
    while not due():
        if not process.is_alive():
            return False
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.001)
    return True


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(folder: Path) -> int:
    return step_of(checkpoints(folder / "checkpoints")[-1]) if checkpoints(folder / "checkpoints") else 0


@CAMPAIGN
def test_kill_9_costs_at_most_one_interval_and_changes_nothing(micro_recipe: Make, tmp_path: Path, kills: int) -> None:
    """Half of the kills hit a save: they wait until its temporary folder is there."""
    chance = random.Random(kills)
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    settings = micro_recipe(steps=8 * kills, save_every=INTERVAL)
    recipe.write_text(dump(settings))
    done = 0
    while done < kills:
        before = saved(folder)
        process = launch(recipe, folder)
        target = max(before, 1) + chance.randrange(1, 12)
        if done % 2:
            ready = wait_until(process, lambda: any((folder / "checkpoints").glob(".saving-*")))
        else:
            ready = wait_until(process, lambda: steps_done(folder) >= target)  # noqa: B023 - asked at once
        process.kill()
        process.join()
        if not ready:
            assert process.exitcode == 0
            break
        done += 1
        found = load_latest(folder / "checkpoints")
        reached = steps_done(folder)
        kept = found[1]["step"] if found else 0
        assert kept >= before, "a checkpoint was lost"
        assert reached - kept < 2 * INTERVAL, "the last interval, and the one whose save was under way"
    assert done >= min(kills, 4)
    train(load_recipe(str(recipe)), folder, resume=True, show=False)
    train(settings, tmp_path / "whole", show=False)
    assert curve(folder) == curve(tmp_path / "whole")
    one, other = (load_bundle(path).model.state_dict() for path in (folder, tmp_path / "whole"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("signals", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_scheduler_loses_no_step(micro_recipe: Make, tmp_path: Path, signals: int) -> None:
    """SIGTERM or SIGUSR1 at any moment, some twice: gone within ten seconds, the very last step saved."""
    chance = random.Random(signals)
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(dump(micro_recipe(steps=100_000, save_every=INTERVAL)))
    for _ in range(signals):
        process = launch(recipe, folder)
        target = steps_done(folder) + chance.randrange(1, 9)
        assert wait_until(process, lambda: steps_done(folder) >= target)  # noqa: B023 - asked at once
        time.sleep(chance.random() * 0.03)
        number = chance.choice([signal.SIGTERM, signal.SIGUSR1])
        for _ in range(chance.choice([1, 2])):
            assert process.pid is not None
            os.kill(process.pid, number)
        process.join(10)
        assert not process.is_alive()
        assert saved(folder) == steps_done(folder)


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_bad_losses_never_reach_the_weights(micro_recipe: Make, tmp_path: Path, count: int) -> None:
    """NaN, infinity or a spike at random steps; and not one alarm in as many clean steps."""
    chance = random.Random(count)
    run = prepare(micro_recipe(steps=count * 6 + 20), tmp_path)
    set_training(run.model)
    bad = set(chance.sample(range(20, run.total), count))
    healthy = run.objective.forward
    for step, batch in zip(range(run.total), run.loader, strict=False):
        factor = chance.choice([math.nan, math.inf, -math.inf, 100.0]) if step in bad else 1.0
        run.guard.in_a_row = 0  # going back has its own test
        before = {key: value.clone() for key, value in run.model.state_dict().items()}

        def spoiled(*args: Any, factor: float = factor) -> Any:
            output = healthy(*args)
            return type(output)(output.loss * factor, output.parts)

        run.objective.forward = spoiled
        train_step(run, batch)
        same = all(torch.equal(before[key], value) for key, value in run.model.state_dict().items())
        assert same == (step in bad), step
    assert run.guard.refused == count
    assert [row["step"] for row in run.log.rows("refused.jsonl")] == [step + 1 for step in sorted(bad)]
