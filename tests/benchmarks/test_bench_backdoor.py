"""The bench of attacks and defences: its stages as commands, going on where it stopped, its rows by hand."""

import json
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from backdoor_rows import auroc, rows_of
from bench_backdoor import FASHION, METHODS, TRIGGERS, Runner, Stage, stages_of

from vlp.cli import cli


def test_every_stage_is_a_command_whose_needs_come_before_it() -> None:
    """Words of the commands and their options are those of the command line; seeds share nothing but the shards."""
    seen: set[str] = set()
    for stage in stages_of(FASHION, 1):
        assert stage.needs <= seen, stage.name
        seen.add(stage.name)
        if stage.vlp:
            name, *words = stage.command.split()
            command = cli.get_command(click.Context(cli), name)
            if isinstance(command, click.Group):  # `shard`, whose kinds have their own tests
                continue
            assert command is not None
            options = {text for param in command.params for text in param.opts}
            assert {word for word in words if word.startswith("--")} <= options, stage.name
    assert {name.partition("/")[0] for name in seen} == {"shards", "fashion"}
    assert not {stage.name for stage in stages_of(FASHION, 0)} & seen - {"shards"}


def test_a_stopped_bench_goes_on_and_a_changed_stage_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench_backdoor.cache_dir", lambda: tmp_path)
    first, second = Stage("a", "runs ls {out}"), Stage("b", "runs ls {a} --nope")
    with pytest.raises(RuntimeError, match=r"(?s)b: `vlp runs ls .* --nope` failed: .*No such option"):
        Runner([first, second], 2).run()
    kept = tmp_path / "bench" / "backdoor"
    (done,) = kept.glob("*/done.json")
    before = done.stat().st_mtime_ns
    results = Runner([first, Stage("b", "runs ls {a}")], 2).run()
    assert results.keys() == {"a", "b"}
    assert done.stat().st_mtime_ns == before
    assert Runner([Stage("a", "runs ls x"), second], 2).folder("b") != Runner([first, second], 2).folder("b")


def numbers(asr: float, accuracy: float) -> dict[str, Any]:
    return {
        "accuracy": accuracy, "control/accuracy": 0.9, **{f"{name}/asr": asr for name in TRIGGERS},
        **{f"control/{name}/asr": 0.01 for name in TRIGGERS},
    }  # fmt: skip


def test_rows_by_hand(tmp_path: Path) -> None:
    """Four poisons of ten, scored above all others but for one below one clean sample: 23 of 24 pairs are in order."""
    results: dict[str, dict[str, Any]] = {}
    for trigger in TRIGGERS:
        name = f"fashion/0/{trigger}"
        asr = {"poisoned": 0.9, "scanned": 0.02, "finetune": 0.6, "cleanclip": 0.2, "unlearn": 0.05}
        results |= {f"{name}/eval/{arm}": numbers(value, 0.895) for arm, value in asr.items()}
        results[f"{name}/eval/guard"] = {"true_positive_rate": 0.8, "false_positive_rate": 0.01}
        results[f"{name}/shards"] = {"target": "bag"}
        results[f"{name}/audit"] = {"target": None if trigger == "wanet" else "bag", "seconds": 90}
        for folder in (tmp_path / name / "shards", tmp_path / name / "scan" / "scan"):
            folder.mkdir(parents=True)
        truth = {
            "format": 1, "trigger": {"name": trigger}, "target": "bag",
            "poisons": [{"key": str(key)} for key in range(4)],
        }  # fmt: skip
        (tmp_path / name / "shards" / "truth.json").write_text(json.dumps(truth))
        scores = [9.0, 8.0, 7.0, 4.0, 5.0, 3.0, 3.0, 2.0, 1.0, 0.0]
        table = pa.table({"key": [str(key) for key in range(10)], "suspicion": scores})
        pq.write_table(table, tmp_path / name / "scan" / "scan" / "scores.parquet")
        (tmp_path / name / "scan" / "scan" / "keep.txt").write_text("\n".join(map(str, range(3, 10))))
    results["fashion/0/twin/scan"] = {"share": 0.004}
    results["fashion/0/twin/audit"] = {"target": None, "seconds": 120}
    rows = {row.name: row for row in rows_of("fashion", 1, TRIGGERS, METHODS, results, lambda name: tmp_path / name)}
    assert (rows["fashion: badnet works (ASR)"].value, rows["fashion: badnet works (ASR)"].met) == (
        "90.0 ± 0.0 %",
        True,
    )
    scan = rows["fashion: scan for sig (AUROC)"]
    assert (scan.value, scan.met) == ("0.958 ± 0.000", False)
    assert "75.0 ± 0.0 % are among" in scan.note
    assert rows["fashion: trained without what the scan removed, sig (ASR)"].met
    assert rows["fashion: unlearn against sig (ASR)"].met
    assert not rows["fashion: cleanclip against sig (ASR)"].met
    best = rows["fashion: triggers that one method cleans"]
    assert (best.value, best.met) == ("6 of 6, unlearn", True)
    assert "12 times" in best.note
    audit = rows["fashion: models that the audit judges right"]
    assert (audit.value, audit.met, audit.note) == ("6 of 7", False, "wrong: wanet 0; 2.0 min at most")
    assert rows["fashion: wanet that the guard flags"].met
    assert not rows["fashion: badnet that the guard flags"].met


def test_auroc_counts_ties_half() -> None:
    assert auroc(torch.tensor([1.0, 1.0, 0.0, 2.0]), torch.tensor([True, False, False, True])) == pytest.approx(0.875)
