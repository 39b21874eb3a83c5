"""Runs listed and compared, as a user sees them."""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from vlp.curves import eval_curves, natural, training_curves
from vlp.recipe import Recipe, dump
from vlp.runlog import RunLog
from vlp.runs import describe


def vlp(*arguments: str) -> Result:
    from vlp.cli import cli

    return CliRunner().invoke(cli, list(arguments))


def last_json(result: Result) -> dict[str, object]:
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture
def runs(micro_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    """Two runs of different seeds in `runs`: `20260101-120000-starter-clip` of ten steps, and `b`, of five."""
    for name, seed, steps in (("20260101-120000-starter-clip", 0, 10), ("b", 1, 5)):
        folder = tmp_path / "runs" / name
        runlog = RunLog(folder, ())
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(dump(micro_recipe(seed=seed, steps=10)))
        for step in range(1, steps + 1):
            runlog.append("metrics.jsonl", {"step": step, "seconds": step / 2, "loss": 5.0 - step / 10 - seed})
        runlog.append("evals.jsonl", {"step": 5, "val/image_to_text/R@1": 0.1, "val/image_to_text/R@10": 0.5})
        if seed == 0:
            runlog.append("evals.jsonl", {"step": 10, "val/image_to_text/R@1": 0.2})
        runlog.close("finished" if seed == 0 else "interrupted")
    (tmp_path / "runs" / "no-run").mkdir()
    return tmp_path / "runs"


def test_ls_shows_every_run_and_nothing_else(runs: Path) -> None:
    result = last_json(vlp("runs", "ls", str(runs), "--json"))["runs"]
    assert isinstance(result, list)
    first, second = result
    assert first["recipe"] == "starter-clip"
    assert (first["steps"], first["total"], first["state"], first["seconds"]) == (10, 10, "finished", 5.0)
    assert first["loss"] == pytest.approx(4.0)
    assert first["metrics"] == {"val/image_to_text/R@1": 0.2, "val/image_to_text/R@10": 0.5}
    assert (second["name"], second["steps"], second["state"]) == ("b", 5, "interrupted")
    head, line, _ = vlp("runs", "ls", str(runs)).stdout.splitlines()
    assert head.split() == ["run", "steps", "state", "loss", "metrics", "time", "recipe"]
    assert "10/10" in line
    assert "val/image_to_text/R@1 20.0 %" in line


def test_a_run_without_a_goodbye_was_killed_unless_it_still_runs(runs: Path) -> None:
    status = {"state": "running", "host": platform.node(), "pid": os.getpid()}
    (runs / "b" / "status.json").write_text(json.dumps(status))
    assert describe(runs / "b").state == "running"
    (runs / "b" / "status.json").write_text(json.dumps({**status, "pid": 2**22 + 1}))
    assert describe(runs / "b").state == "killed"
    (runs / "b" / "status.json").write_text(json.dumps({**status, "pid": 1, "host": "elsewhere"}))
    assert describe(runs / "b").state == "running", "nobody here can tell"


def test_a_real_run_is_described(trained: Path) -> None:
    info = describe(trained)
    assert (info.steps, info.total) == (12, 12)
    assert info.loss is not None
    assert list(info.main) == ["val/image_to_text/R@1", "val/text_to_image/R@1"]


def test_compare_names_what_differs_and_draws_it(runs: Path, tmp_path: Path) -> None:
    folders = [str(runs / "20260101-120000-starter-clip"), str(runs / "b")]
    picture, page = tmp_path / "c.png", tmp_path / "c.html"
    result = last_json(vlp("runs", "compare", *folders, "--out", str(picture), "--json"))
    assert result["recipe"] == {"run.seed": [0, 1]}
    metrics = result["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["steps"] == [10, 5]
    assert metrics["val/image_to_text/R@1"] == [0.2, 0.1]
    assert list(metrics) == ["steps", "seconds", "loss", "val/image_to_text/R@1", "val/image_to_text/R@10"]
    assert np.asarray(Image.open(picture).convert("L")).std() > 10
    assert vlp("runs", "compare", *folders, "--out", str(page)).exit_code == 0
    text = page.read_text()
    assert "run.seed" in text
    assert "data:image/png;base64," in text
    assert "http" not in text.split("</style>")[1].split("base64")[0]
    shown = vlp("runs", "compare", *folders).stdout
    assert "run.seed" in shown
    assert "20.0 %" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ls", "/nowhere"], ["/nowhere", "--run-dir"]),
        (["compare", "b", "b"], ["different"]),
        (["compare", "b", "no-run"], ["no-run", "recipe.yaml"]),
        (["compare", "20260101-120000-starter-clip", "b", "--out", "c.gif"], [".png or .html"]),
    ],
    ids=str,
)
def test_mistakes_are_named(
    arguments: list[str], words: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    result = vlp("runs", *arguments)
    assert result.exit_code == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_metrics_stand_in_the_order_of_their_numbers() -> None:
    assert sorted(["R@10", "R@1", "a", "R@5", "2", "10"], key=natural) == ["2", "10", "R@1", "R@5", "R@10", "a"]
    figure = eval_curves([{"step": 1, "v/R@10": 0.5, "v/R@1": 0.1, "v/R@5": 0.3, "v/mean_rank": 7.0}])
    assert figure is not None
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == ["R@1", "R@5", "R@10"]
    assert eval_curves([{"step": 1, "v/mean_rank": 7.0}]) is None


def test_every_quantity_that_was_logged_has_a_panel() -> None:
    rows = [{"step": step, "loss": 1.0, "lr": 0.1, "samples_per_second": 5.0, "data_wait": 0.1} for step in range(100)]
    titles = [axis.get_title() for axis in training_curves(rows).axes if axis.lines]
    assert titles == ["training loss", "learning rate", "samples per second", "waiting for data, share of the time"]
    assert len(training_curves([]).axes) == 1
