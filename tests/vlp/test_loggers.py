"""Dashboards with their real packages, writing local files that are read back."""

import importlib.util
import json
import logging
import math
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipelines.errors import ConfigError
from vlp.loggers import BACKENDS, TensorBoard, flat
from vlp.recipe import Recipe, dump
from vlp.runlog import RunLog, bar_note


def needs(package: str) -> pytest.MarkDecorator:
    """Only where the extra is installed."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the extra `{package}` is not installed")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def metrics(runlog: RunLog, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        runlog.append("metrics.jsonl", {"step": step, "loss": step / 2 + offset, "note": "text stays out"})


def test_rows_reach_tensorboard_under_their_names(tmp_path: Path) -> None:
    runlog = RunLog(tmp_path)
    metrics(runlog, range(1, 4))
    runlog.append("evals.jsonl", {"step": 3, "val/image_to_text/R@1": 0.25})
    runlog.append("metrics.jsonl", {"step": 4, "loss": math.nan})
    runlog.close("finished")
    found = scalars(tmp_path)
    assert set(found) == {"train/loss", "val/image_to_text/R@1"}
    assert found["train/loss"][:3] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert found["train/loss"][3][0] == 4
    assert math.isnan(found["train/loss"][3][1])
    assert found["val/image_to_text/R@1"] == [(3, 0.25)]


def test_a_folder_that_is_only_read_gets_no_event_file(tmp_path: Path) -> None:
    RunLog(tmp_path).rows("metrics.jsonl")
    RunLog(tmp_path).close("finished")
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_shows_every_step_once_in_tensorboard(tmp_path: Path) -> None:
    """Killed after step 7 with a checkpoint at step 5: steps 6 and 7 come again, with the values of the second time."""
    killed = RunLog(tmp_path)
    metrics(killed, range(1, 8))
    killed._loggers.close("failed")  # the events of a killed run that reached the disk, and no goodbye
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    runlog = RunLog(tmp_path)
    runlog.truncate("metrics.jsonl", 5)
    metrics(runlog, range(6, 10), offset=100.0)
    runlog.close("finished")
    expected = [(step, step / 2 + (100 if step > 5 else 0)) for step in range(1, 10)]
    assert scalars(tmp_path)["train/loss"] == expected
    assert [(row["step"], row["loss"]) for row in runlog.rows("metrics.jsonl")] == expected


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    runlog = RunLog(tmp_path, ())
    metrics(runlog, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 3, "lo')
    assert [row["step"] for row in runlog.rows("metrics.jsonl")] == [1, 2]
    runlog.truncate("metrics.jsonl", 1)
    assert [row["step"] for row in runlog.rows("metrics.jsonl")] == [1]


def wandb_records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format (blocks of 32 KiB, pieces of crc, length, type) behind 7 bytes."""
    content, place, record = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_rows(folder: Path) -> list[dict[str, float]]:
    """History of all offline W&B files of a run folder, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, wandb_records(path)):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@needs("wandb")
def test_wandb_offline_holds_the_rows_once_over_a_resume(
    tmp_path: Path, micro_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "recipe.yaml").write_text(dump(micro_recipe()))
    first = RunLog(tmp_path, ["wandb"])
    metrics(first, range(1, 4))
    first.close("interrupted")
    second = RunLog(tmp_path, ["wandb"])
    second.truncate("metrics.jsonl", 2)
    metrics(second, range(3, 6))
    second.append("evals.jsonl", {"step": 5, "val/R@1": 0.5})
    second.close("finished")
    rows = [row for row in wandb_rows(tmp_path) if "train/loss" in row]
    assert [(row["_step"], row["train/loss"]) for row in rows] == [(step, step / 2) for step in range(1, 6)]
    assert rows[-1]["val/R@1"] == 0.5
    runs = {path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}
    assert runs == {f"{json.loads((tmp_path / 'loggers.json').read_text())['wandb']}.wandb"}, "one run, two files"


@needs("mlflow")
def test_mlflow_holds_the_rows_once_over_a_resume(
    tmp_path: Path, micro_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump(micro_recipe()))
    first = RunLog(folder, ["mlflow"])
    metrics(first, range(1, 4))
    first.close("interrupted")
    second = RunLog(folder, ["mlflow"])
    second.truncate("metrics.jsonl", 2)
    metrics(second, range(3, 6))
    second.append("evals.jsonl", {"step": 5, "val/image_to_text/R@1": 0.5})
    second.close("finished")
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as store:
        assert store.execute("select name, status from runs").fetchall() == [("one", "FINISHED")]
        losses = store.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        assert losses == [(step, step / 2) for step in range(1, 6)]
        assert store.execute("select value from metrics where key = 'val/image_to_text/R_at_1'").fetchall() == [(0.5,)]
        assert store.execute("select value from params where key = 'optim.lr'").fetchall() == [("0.003",)]


def test_a_dashboard_that_fails_is_switched_off_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    runlog = RunLog(tmp_path)
    with caplog.at_level(logging.WARNING):
        metrics(runlog, range(1, 4))
    runlog.close("finished")
    assert len(runlog.rows("metrics.jsonl")) == 3
    (message,) = [record.message for record in caplog.records if record.name == "vlp.loggers"]
    assert "tensorboard is switched off" in message


def test_unknown_and_missing_loggers_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"'comet' is unknown; known: tensorboard, wandb, mlflow"):
        RunLog(tmp_path, ["comet"])
    monkeypatch.setitem(BACKENDS, "no_such_package", TensorBoard)
    with pytest.raises(ConfigError, match=r"pip install 'vlp\[no_such_package\]'"):
        RunLog(tmp_path, ["no_such_package"])


def test_without_tensorboard_the_run_goes_on_and_the_log_says_once_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    runlog = RunLog(tmp_path)
    metrics(runlog, range(1, 4))
    assert len(runlog.rows("metrics.jsonl")) == 3
    (message,) = [record.message for record in caplog.records if record.name == "vlp.loggers"]
    assert "pip install tensorboard" in message


def test_settings_are_flattened() -> None:
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": [{"e": None}]}) == {"a.b": 1, "a.c": [1, 2], "d.0.e": None}


def test_the_bar_says_speed_wait_and_utilisation() -> None:
    assert bar_note(1.2345, 4567.8, 0.031, 0.41) == "loss 1.234  4,568 samples/s  data 3 %  MFU 41.0 %"
    assert bar_note(1.0, 2.345, 0.0) == "loss 1.000  2.3 samples/s  data 0 %"
