"""Runs of two real ranks, started by `vlp train` itself and by torchrun."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import ConfigError, PipelineError
from vlp.bundle import load_bundle
from vlp.checkpoint import load_latest
from vlp.distributed import placed
from vlp.evals import evaluate
from vlp.launch import local_ranks
from vlp.recipe import Recipe, dump, validate
from vlp.run import prepare, restore
from vlp.runlog import RunLog
from vlp.testing import run_ranks
from vlp.train import train

Make = Callable[..., Recipe]
BATCH = 32
"""Samples of a step of the micro recipe."""
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in RunLog(folder).rows("metrics.jsonl")]


def ledger(folder: Path) -> Any:
    return json.loads((folder / "ledger.json").read_text())


def start(recipe: Recipe, folder: Path, *launcher: str) -> "subprocess.Popen[str]":
    file = folder.with_suffix(".yaml")
    file.write_text(dump(recipe))
    command = [sys.executable, *launcher, "-m", "vlp", "train", str(file), "--run-dir", str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def ranks_below(process: "subprocess.Popen[Any]") -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def wait_for_steps(process: "subprocess.Popen[str]", folder: Path, steps: int) -> None:
    until = time.monotonic() + 120
    while len(losses(folder)) < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_below_torchrun_train_as_one_process_does(
    micro_recipe: Make, trained: Path, tmp_path: Path, strategy: str
) -> None:
    """And one process goes on from a checkpoint of the two as they would have."""
    process = start(micro_recipe(strategy=strategy, keep=3), tmp_path / "run", *TORCHRUN)
    message = process.communicate(timeout=180)[1]
    assert process.returncode == 0, message
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-4)
    assert ledger(tmp_path / "run") == ledger(trained), "one account of all ranks"
    assert (tmp_path / "run" / "bundle" / "bundle.json").is_file()
    first, *later = sorted((tmp_path / "run" / "checkpoints").glob("step*"))
    assert "5" in first.name
    assert len(later) == 2
    for folder in later:
        shutil.rmtree(folder)
    train(micro_recipe(keep=3), tmp_path / "run", resume=True, show=False)
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-4)


def test_a_signal_to_the_first_rank_stops_both_and_resume_goes_on(micro_recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(micro_recipe(steps=100_000, save_every=0, processes=2), folder)
    wait_for_steps(process, folder, 3)
    others = ranks_below(process)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert message.count("--resume") == 1
    assert others
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)
    _, state = load_latest(folder / "checkpoints") or pytest.fail("nothing saved")
    steps = state["step"]
    assert steps == len(losses(folder))
    train(micro_recipe(steps=steps + 2, processes=2), folder, resume=True, show=False)
    assert len(losses(folder)) == steps + 2
    assert ledger(folder)["seen"] == ledger(folder)["trained"] == (steps + 2) * BATCH, "stops do not split the account"


def test_the_death_of_a_rank_ends_the_run_and_is_named(micro_recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(micro_recipe(steps=100_000, save_every=0, processes=2), folder)
    wait_for_steps(process, folder, 3)
    for pid in ranks_below(process):
        os.kill(pid, signal.SIGKILL)
    message = process.communicate(timeout=60)[1]
    assert process.returncode not in (0, None)
    assert "rank 1 ended with exit code -9" in message


def test_ranks_share_running_statistics_and_give_what_vlp_eval_gives(micro_recipe: Make, tmp_path: Path) -> None:
    """Batch norms see other samples on every rank; the means over the ranks are saved, evaluated and gone on with."""
    from tests.vlp.test_step import NORMED

    recipe = validate({**micro_recipe(processes=2).model_dump(), "model": {"config": NORMED}})
    evals_ = [{"name": "val", "data": recipe.data.train}]
    recipe = validate({**recipe.model_dump(), "evals": evals_})
    train(recipe, tmp_path / "run", show=False)
    bundle = load_bundle(tmp_path / "run")
    again = evaluate(bundle, "retrieval", Path(str(recipe.data.train)))
    rows = RunLog(tmp_path / "run").rows("evals.jsonl")
    assert {key: value for key, value in rows[-1].items() if key != "step"} == {
        f"val/{key}": value for key, value in again.items()
    }


@pytest.mark.parametrize(
    ("message", "expected"),
    [("shapes cannot be multiplied", RuntimeError), ("Connection closed by peer", PipelineError)],
)
def test_an_error_of_rank_0_is_its_own(message: str, expected: type[Exception], tmp_path: Path) -> None:
    """Only a broken connection is laid at the door of a rank that ended."""
    with pytest.raises(expected) as caught, local_ranks(2, tmp_path, False, ["train", "nowhere.yaml"]):
        raise RuntimeError(message)
    assert ("rank 1 ended" in str(caught.value)) == (expected is PipelineError)


@pytest.mark.parametrize(
    ("name", "gpus", "local", "ranks", "found"),
    [
        ("auto", 0, 1, 2, "cpu"), ("auto", 1, 0, 1, "cuda"), ("auto", 8, 3, 8, "cuda:3"), ("cuda", 2, 1, 2, "cuda:1"),
        ("cuda:1", 2, 0, 1, "cuda:1"), ("cpu", 8, 3, 8, "cpu"), ("auto", 1, 1, 2, ConfigError),
        ("cuda", 0, 0, 2, ConfigError),
    ],
)  # fmt: skip
def test_every_rank_has_a_gpu_of_its_own(name: str, gpus: int, local: int, ranks: int, found: Any) -> None:
    if isinstance(found, str):
        assert placed(name, gpus, local, ranks) == found
    else:
        with pytest.raises(found, match=f"run.device={name}: {ranks} ranks on a machine with {gpus} GPUs"):
            placed(name, gpus, local, ranks)


def test_ranks_that_see_other_checkpoints_say_so(trained: Path, micro_recipe: Make, tmp_path: Path) -> None:
    """As without a shared file system: one rank would go on at its step, the other from the start."""
    for rank in (0, 1):
        shutil.copytree(trained, tmp_path / f"rank{rank}" / "run")
    shutil.rmtree(tmp_path / "rank1" / "run" / "checkpoints")
    found = run_ranks(_resumed, 2, (str(tmp_path), micro_recipe().model_dump(mode="json")))
    assert all("rank 0: 12, rank 1: none" in message for message in found), found


def _resumed(rank: int, folder: str, settings: dict[str, Any]) -> str:
    run = prepare(validate(settings), Path(folder) / f"rank{rank}" / "run")
    try:
        restore(run)
    except PipelineError as error:
        return str(error)
    return "went on"
