"""`vlp profile` on the real step: the parts sum to the whole, on one rank and on two."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from vlp.cli import cli
from vlp.phases import OTHER, PHASES
from vlp.recipe import Recipe, dump


def profiled(recipe: Recipe, tmp_path: Path, *arguments: str) -> dict[str, object]:
    (tmp_path / "r.yaml").write_text(dump(recipe))
    command = ["profile", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--json", *arguments]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_phases_sum_to_the_step(ranks: int, micro_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = micro_recipe(processes=ranks)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"partitions": 2})})
    result = profiled(recipe, tmp_path, "--steps", "4", "--trace")
    assert (result["ranks"], result["steps"], result["batch_per_rank"]) == (ranks, 4, 32 // ranks)
    phases, step = result["phases"], result["step_seconds"]
    assert isinstance(phases, dict)
    assert isinstance(step, dict)
    assert "data" in phases
    assert OTHER in phases
    assert set(phases) <= {*PHASES, OTHER}
    assert sum(part["seconds"] for part in phases.values()) == pytest.approx(step["mean"])
    assert sum(part["share"] for part in phases.values()) == pytest.approx(1)
    assert isinstance(result["mfu"], float)
    assert 0 < result["mfu"] < 1
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert {event.get("name") for event in events} >= {"data", "aten::mm"}
    pixels = np.asarray(Image.open(tmp_path / "out" / "profile.png").convert("L"))
    assert pixels.std() > 20
    assert json.loads((tmp_path / "out" / "profile.json").read_text())["steps"] == 4


def test_no_steps_is_an_error(micro_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(dump(micro_recipe()))
    done = CliRunner().invoke(cli, ["profile", str(tmp_path / "r.yaml"), "--steps", "0"])
    assert done.exit_code == 1
    assert "--steps 0" in done.stderr
