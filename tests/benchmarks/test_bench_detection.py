"""The bench of detection: its stages as commands and recipes, its rows by hand, the time at micro size."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import pytest
from bench_detection import FULL, Bench, stages_of
from detection_rows import rows_of
from measure_detect import ratio_of
from stages import PLACE, Runner

from vlp.cli import cli
from vlp.recipe import load_recipe


def resolved(words: Sequence[str]) -> dict[str, Any]:
    """The recipe of a command's words, with names in the place of folders."""
    overrides = [PLACE.sub(r"at/\1", word) for word in words[1:] if PLAIN.match(word)]
    return load_recipe(words[0], overrides).model_dump(mode="json")


PLAIN = re.compile(r"[a-z.]+=")


def test_every_stage_is_a_command_whose_needs_come_before_it() -> None:
    """Options are those of the command line, overrides make a recipe; seeds share nothing but the shards."""
    seen: set[str] = set()
    for stage in stages_of(FULL, 1):
        assert stage.needs <= seen, stage.name
        seen.add(stage.name)
        name, *words = shlex.split(stage.command)
        command = cli.get_command(click.Context(cli), name)
        if isinstance(command, click.Group):  # `shard`, whose kinds have their own tests
            continue
        assert command is not None
        options = {text for param in command.params for text in param.opts}
        assert {word for word in words if word.startswith("--")} <= options, stage.name
        if name == "train":
            assert resolved(words)["run"]["seed"] == 1
    assert {name.partition("/")[0] for name in seen} == {"shards", "composed"}
    assert not {stage.name for stage in stages_of(FULL, 0)} & seen - {"shards"}


def test_arms_differ_in_what_is_compared_alone() -> None:
    """Same steps, batches and rates for regions and pictures; the shift is all that differs between both ViTs."""
    made = {}
    for stage in stages_of(FULL, 0):
        words = shlex.split(stage.command)
        if words[0] == "train":
            made[stage.name] = resolved(words[1:])
    longer, regions = made["composed/0/longer"], made["composed/0/regions"]
    assert longer.pop("objective") != regions.pop("objective")
    assert longer == regions
    fixed, shifted = made["composed/0/fixed"], made["composed/0/shifted"]
    assert fixed["objective"]["parts"]["window"].pop("shift") is False
    assert shifted["objective"]["parts"]["window"].pop("shift") is True
    assert fixed == shifted
    tuned = [made[f"composed/0/{name}/tuned"] for name in ("longer", "regions")]
    for recipe in tuned:
        recipe["model"].pop("weights")
    assert tuned[0] == tuned[1]


def results(changes: Mapping[str, float] = MappingProxyType({})) -> dict[str, dict[str, float]]:
    """Of three seeds, all alike but for the second of what `changes` names."""
    base: dict[str, dict[str, float]] = {
        "longer/read": {"region_top1_image": 0.30},
        "regions/read": {"region_top1": 0.40, "region_top1_image": 0.2},
        "longer/tuned/read": {"AP": 0.2, "AP50": 0.4, "AP50_base": 0.5, "AP50_novel": 0.25},
        "regions/tuned/read": {
            "AP": 0.25, "AP50_base": 0.55, "AP50_novel": 0.31, "alone/AP50_base": 0.56, "alone/AP50_novel": 0.2,
        },
        "fixed/tuned/read": {"AP": 0.05, "AP50": 0.1, "AP50_base": 0.1, "AP50_novel": 0.0, "shift_sensitivity": 0.2},
        "shifted/tuned/read": {"AP": 0.06, "AP50": 0.1, "AP50_base": 0.1, "AP50_novel": 0.0, "shift_sensitivity": 0.1},
    }  # fmt: skip
    found = {f"t/{seed}/{stage}": dict(row) for seed in range(3) for stage, row in base.items()}
    for path, value in changes.items():
        stage, _, key = path.partition("/read/")
        found[f"t/1/{stage}/read"][key] = value
    return found


def test_rows_by_hand() -> None:
    rows = {row.name: row for row in rows_of("t", 3, results())}
    assert len(rows) == 5
    assert all(row.met for row in rows.values())
    named = rows["t: regions named after pretraining by captions alone, over the image-level tower"]
    assert named.value == "10.0 ± 0.0 points"
    assert named.note == "40.0 ± 0.0 % of ground-truth boxes named, from the image-level tower 30.0 ± 0.0 %"
    shifted = rows["t: change of features under a shift that shifted windows take away"]
    assert shifted.value == "50.0 ± 0.0 %"
    assert "0.200 -> 0.100" in shifted.note
    assert rows["t: AP50 of novel categories, geometric ensemble over the detector alone"].value == "11.0 ± 0.0 points"
    assert rows["t: seeds in which pretraining by regions is better than by pictures at equal steps"].value == "3 of 3"
    assert rows["t: AP50 of novel categories"].value == "31.0 ± 0.0 %"


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"regions/read/region_top1": 0.34}, "regions named"),
        ({"shifted/tuned/read/shift_sensitivity": 0.15}, "change of features"),
        ({"shifted/tuned/read/AP": 0.01}, "change of features"),
        ({"regions/tuned/read/alone/AP50_novel": 0.29}, "geometric ensemble"),
        ({"longer/tuned/read/AP50_novel": 0.32}, "seeds in which"),
        ({"regions/tuned/read/AP50_novel": 0.249}, "AP50 of novel categories"),
    ],
    ids=str,
)
def test_one_seed_that_falls_short_is_enough(change: dict[str, float], missed: str) -> None:
    rows = rows_of("t", 3, results(change))
    short = [row.name for row in rows if not row.met]
    assert any(missed in name for name in short), short


def test_rows_come_from_the_seeds_that_are_known() -> None:
    found = {stage: row for stage, row in results().items() if stage.startswith("t/0/") and "fixed" not in stage}
    rows = rows_of("t", 3, found)
    assert len(rows) == 4
    assert all(row.note.startswith("1 of 3 seeds; ") for row in rows)
    assert not next(row for row in rows if "seeds in which" in row.name).met
    assert rows_of("t", 3, {}) == []


def test_the_makefile_knows_the_bench() -> None:
    text = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    assert "tests/benchmarks/bench_detection.py" in text


MICRO = Bench(
    "micro",
    "shard detection-starter --pictures pretrain=32,train=32,val=4,test=24 --side 128 --out {out}",
    more="run.steps=2 run.loggers=[] data.batch_size=8 data.image.size=128 optim.warmup=1 run.threads=1",
)


def run_micro(folder: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]) -> tuple[Any, Runner]:
    """Results of one seed at micro sizes, and its runner; stages whose names hold one of `without` are left out."""
    monkeypatch.setattr("stages.cache_dir", lambda: folder)
    stages = [stage for stage in stages_of(MICRO, 0) if not any(part in stage.name for part in without)]
    runner = Runner("detection", stages, 2, folder / "record.json")
    return runner.run(), runner


@pytest.mark.slow
def test_the_bench_runs_at_micro_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed of the convolutional arms, two steps each, from composed shards to rows and the time of detection."""
    results, runner = run_micro(tmp_path, monkeypatch, ("fixed", "shifted"))
    rows = rows_of("micro", 1, results)
    assert len(rows) == 4
    timed = ratio_of(runner.folder("micro/0/regions/tuned") / "run", side=128, rounds=2)
    assert "a batch gives what pictures alone do: yes" in timed.note
    assert 1.0 < float(timed.value.split()[0]) < 20
    assert runner.open() == []


@pytest.mark.slow
def test_the_bench_runs_at_micro_size_with_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, _ = run_micro(tmp_path, monkeypatch, ("image", "longer", "regions"))
    (row,) = rows_of("micro", 1, results)
    assert "under a shift" in row.name
