"""The bench of attacks and defences: its stages as commands, going on where it stopped, its rows by hand."""

from pathlib import Path
from typing import Any

import click
import pytest
import torch
from backdoor_rows import rows_of
from bench_backdoor import BENCHES, EMOJI, FASHION, METHODS, TRIGGERS, Bench, further, stages_of
from bench_kit import table, write
from measure_scan import auroc
from stages import Runner, Stage

from vlp.cli import cli


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.name)
def test_every_stage_is_a_command_whose_needs_come_before_it(bench: Bench) -> None:
    """Words of the commands and their options are those of the command line; seeds share nothing but the shards."""
    seen: set[str] = set()
    for stage in stages_of(bench, 1):
        assert stage.needs <= seen, stage.name
        seen.add(stage.name)
        if not stage.script:
            name, *words = stage.command.split()
            command = cli.get_command(click.Context(cli), name)
            if isinstance(command, click.Group):  # `shard`, whose kinds have their own tests
                continue
            assert command is not None
            options = {text for param in command.params for text in param.opts}
            assert {word for word in words if word.startswith("--")} <= options, stage.name
    assert {name for name in seen if not name.startswith(f"{bench.name}/1/")} == set(bench.shards)
    assert {stage.name for stage in stages_of(bench, 0)} & seen == set(bench.shards)
    clean = [name for name in (*seen, *(stage.name for stage in further(bench, 3))) if "audit" in name]
    assert sum("twin" in name or "reference" in name for name in clean) == max(0, bench.audited - 4)


def test_a_stopped_bench_goes_on_and_a_changed_stage_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine where only the record is: then what an open stage needs is made again, and nothing else."""
    monkeypatch.setattr("stages.cache_dir", lambda: tmp_path)
    record = tmp_path / "record.json"

    def runner(*stages: Stage) -> Runner:
        return Runner("trial", stages, 2, record)

    first, second, third = Stage("a", "runs ls {out}"), Stage("b", "runs ls {a} --nope"), Stage("c", "runs ls {a}")
    with pytest.raises(RuntimeError, match=r"(?s)b: `vlp runs ls .* --nope` failed: .*No such option"):
        runner(first, second).run()
    done = runner(first).folder("a") / "done.json"
    before = done.stat().st_mtime_ns
    assert runner(first, third).open() == ["c"]
    assert runner(first, third).run() == {"a": {}, "c": {}}
    assert done.stat().st_mtime_ns == before
    done.unlink()
    assert runner(first, third).open() == []
    assert runner(first, second, third).open() == ["a", "b"]
    assert runner(Stage("a", "runs ls x"), third).open() == ["a", "c"]


def test_rows_by_hand(tmp_path: Path) -> None:
    """One of two seeds known for all triggers but one, which is not known at all."""
    results: dict[str, dict[str, Any]] = {}
    for trigger in TRIGGERS[:-1]:
        name = f"fashion/0/{trigger}"
        asr = {"poisoned": 0.9, "scanned": 0.02, "finetune": 0.6, "cleanclip": 0.2, "unlearn": 0.05, "control": 0.01}
        arms = {f"{arm}/asr": value for arm, value in asr.items()}
        arms |= {f"{arm}/accuracy": 0.9 if arm == "control" else 0.895 for arm in asr}
        results[f"{name}/arms"] = arms | {"poisoned/triggered_accuracy": 0.1}
        results[f"{name}/found"] = {"auroc": 0.958, "removed": 0.75 if trigger == "sig" else 1.0}
        results[f"{name}/flags"] = {"true_positive_rate": 0.8, "false_positive_rate": 0.01}
        results[f"{name}/shards"] = {"target": "bag"}
        results[f"{name}/audit"] = {"target": None if trigger == "wanet" else "bag", "seconds": 90}
    results["fashion/0/twin/scan"] = {"share": 0.004}
    results["fashion/0/twin/audit"] = {"target": None, "seconds": 120}
    results["fashion/0/stripes/judged"] = {"target": "bag", "seconds": 120}
    results["fashion/5/twin/audit"] = {"target": "bag", "seconds": 120}
    rows = {row.name: row for row in rows_of("fashion", 2, FASHION.audited, TRIGGERS, tuple(METHODS), results)}
    attack = rows["fashion: badnet works (ASR)"]
    assert (attack.value, attack.met) == ("90.0 %", True)
    assert attack.note.startswith("1 of 2 seeds; clean twin 1.0 %")
    assert not any("label-consistent" in name for name in rows)
    scan = rows["fashion: scan for sig (AUROC)"]
    assert (scan.value, scan.met) == ("0.958", False)
    assert "75.0 % are among" in scan.note
    assert rows["fashion: scan for stripes (AUROC)"].met
    assert not rows["fashion: scan for badnet (AUROC)"].met
    assert rows["fashion: trained without what the scan removed, sig (ASR)"].met
    assert rows["fashion: unlearn against sig (ASR)"].met
    assert not rows["fashion: cleanclip against sig (ASR)"].met
    best = rows["fashion: triggers that one method cleans"]
    assert (best.value, best.met) == ("5 of 5 that work, unlearn", True)
    assert "12 times" in best.note
    assert rows["fashion: models that the audit judges right, beside the audit of a clean model"].value == "1 of 1"
    audit = rows["fashion: models that the audit judges right by itself"]
    assert (audit.value, audit.met) == ("5 of 7", False)
    assert audit.note == "2 clean, 5 poisoned; wrong: wanet 0, twin 5; 2.0 min at most"
    assert rows["fashion: wanet that the guard flags"].met
    assert not rows["fashion: badnet that the guard flags"].met
    lines = table(write("backdoor", list(rows.values()), tmp_path)).splitlines()
    assert lines[0].startswith("| fashion | badnet, 1 of 2 seeds | blended, 1 of 2 seeds |")
    assert "| cleaned by unlearn: ASR / points of clean accuracy lost | 5.0 / 0.0 |" in "\n".join(lines)
    (guard,) = (line for line in lines if line.startswith("| guard"))
    assert guard.endswith("| 80.0 / 1.0 ✗ | 80.0 / 1.0 ✗ | 80.0 / 1.0 ✗ | 80.0 / 1.0 | 80.0 / 1.0 | >= 90% or >= 70% |")
    assert len([line for line in lines if line.startswith("| fashion: ")]) == 4


def test_a_bench_of_few_triggers_has_a_table_of_its_own(tmp_path: Path) -> None:
    """What an attack may cost and what cleaning must reach is asked of few triggers, too; without audits, none are."""
    results: dict[str, dict[str, Any]] = {}
    for trigger in EMOJI.triggers:
        arms = {f"{arm}/accuracy": 0.3 for arm in ("poisoned", "scanned", "control", *METHODS)}
        arms |= {f"{arm}/asr": 0.0 for arm in ("scanned", "control", "cleanclip")}
        arms |= {"poisoned/asr": 0.9, "finetune/asr": 0.8, "unlearn/asr": 0.05 if trigger == "sig" else 0.2}
        results[f"emoji/0/{trigger}/arms"] = arms | {"poisoned/triggered_accuracy": 0.1}
        results[f"emoji/0/{trigger}/found"] = {"auroc": 0.98, "removed": 1.0}
        results[f"emoji/0/{trigger}/flags"] = {"true_positive_rate": 0.95, "false_positive_rate": 0.01}
    rows = rows_of("emoji", 1, EMOJI.audited, EMOJI.triggers, tuple(METHODS), results)
    best, *audits = [row for row in rows if not row.case]
    assert (best.value, best.goal, best.met) == ("3 of 3 that work, cleanclip", ">= 3 of 3, 5 x", True)
    assert [(row.value, row.met) for row in audits] == [("0 of 0", False)] * 2
    lines = table(write("backdoor", rows, tmp_path)).splitlines()
    assert lines[0] == "| emoji | badnet | blended | sig | goal |"
    assert any(line.startswith("| guard") and "| 95.0 / 1.0 |" in line for line in lines)


def test_auroc_counts_ties_half() -> None:
    assert auroc(torch.tensor([1.0, 1.0, 0.0, 2.0]), torch.tensor([True, False, False, True])) == pytest.approx(0.875)
