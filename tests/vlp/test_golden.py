"""A recorded curve of 20 steps: a change of the numerics shows up here, and has to be meant."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vlp.recipe import Recipe
from vlp.runlog import RunLog
from vlp.train import train

GOLDEN = Path(__file__).parent.parent / "golden" / "clip_20_steps.json"


def test_twenty_steps_follow_the_recorded_curve(micro_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Accept a change: VLP_ACCEPT=1 pytest tests/vlp/test_golden.py. The tolerance is for other CPUs' rounding."""
    train(micro_recipe(steps=20), tmp_path / "run", show=False)
    rows = RunLog(tmp_path / "run").rows("metrics.jsonl")
    curve = {name: [round(row[name], 6) for row in rows] for name in ("loss", "grad_norm", "logit_scale", "lr")}
    if os.environ.get("VLP_ACCEPT"):
        GOLDEN.write_text(json.dumps(curve, indent=1) + "\n")
    recorded = json.loads(GOLDEN.read_text())
    assert len(recorded["loss"]) == 20
    for name, values in curve.items():
        assert values == pytest.approx(recorded[name], rel=5e-3), name
