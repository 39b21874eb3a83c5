"""Checkpoints: whole or not there, whatever breaks while they are written; damage never loads in silence."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import vlp.checkpoint
from data_pipelines.errors import BundleError, PipelineError
from vlp.checkpoint import Saver, checkpoints, load_checkpoint, load_latest, save_checkpoint, set_aside


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((64,), value)}, "optimizer": {"0.step": torch.tensor(value)}}


def save(folder: Path, step: int, **options: Any) -> Path:
    return save_checkpoint(folder, step, tensors(float(step)), {"note": step}, **options)


def latest(folder: Path) -> int:
    found = load_latest(folder)
    assert found is not None
    assert float(found[0]["model"]["w"][0]) == found[1]["step"]
    return int(found[1]["step"])


class Crash(BaseException):
    """Stands for the process dying: no handler of the code under test may run as if it went on."""


@contextmanager
def breaking(number: int, error: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The `number`-th call that changes the disk raises instead; yields the names of all such calls."""
    made: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) - 1 == number:
                raise error()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((os, "fsync"), *((Path, name) for name in ("mkdir", "rename", "write_bytes", "write_text"))):
        watch(owner, name)
    watch(vlp.checkpoint, "save_file")
    try:
        yield made
    finally:
        monkeypatch.undo()


def number_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    with breaking(-1, Crash, monkeypatch) as made:
        save(tmp_path / "count", 1)
    assert len(made) > 8
    return len(made)


def test_a_crash_at_any_write_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean-up of a dead process does not run either, so its leftovers must do no harm."""
    for number in range(number_of_calls(tmp_path, monkeypatch)):
        folder = tmp_path / f"at-{number}"
        save(folder, 1)
        with breaking(number, Crash, monkeypatch), monkeypatch.context() as dead:
            dead.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(Crash):
                save(folder, 2)
        assert latest(folder) in (1, 2), number
        save(folder, 3)
        assert latest(folder) == 3
        assert not list(folder.glob(".saving-*"))


def test_an_error_at_any_write_is_reported_and_the_old_one_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(number_of_calls(tmp_path, monkeypatch)):
        folder = tmp_path / f"at-{number}"
        save(folder, 1)
        with breaking(number, lambda: OSError(28, "No space left on device"), monkeypatch), pytest.raises(OSError):
            save(folder, 2)
        assert latest(folder) in (1, 2)
        assert not list(folder.glob(".saving-*")), "nothing half-written stays"


def test_a_full_disk_ends_the_run_at_the_third_save_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, keep=2)
    saver.save(1, tensors(1.0), {}, [], wait=True)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        saver.save(2, tensors(2.0), {}, [], wait=True)
        saver.save(3, tensors(3.0), {}, [], wait=True)
        with pytest.raises(PipelineError, match="3 saves in a row failed.*No space left"):
            saver.save(4, tensors(4.0), {}, [], wait=True)
    assert saver.failed == 3
    assert latest(tmp_path) == 1
    saver.save(5, tensors(5.0), {}, [], wait=True)
    assert latest(tmp_path) == 5
    saver.close()


def test_what_changes_while_a_save_is_under_way_is_not_saved(tmp_path: Path) -> None:
    weights = {"model": {"w": torch.ones(1000)}}
    saver = Saver(tmp_path, keep=2)
    saver.save(1, weights, {}, [], wait=False)
    weights["model"]["w"].zero_()
    saver.close()
    found = load_latest(tmp_path)
    assert found is not None
    assert found[0]["model"]["w"].min() == 1


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_flipped_bits_and_cuts_are_always_found(tmp_path: Path, count: int) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = checkpoints(tmp_path)[-1]
    chance = random.Random(0)
    files = sorted(newest.iterdir())
    for number in range(count):
        path = files[number % len(files)]
        whole = path.read_bytes()
        at = chance.randrange(len(whole))
        if chance.random() < 0.5:
            path.write_bytes(whole[:at])
        else:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(BundleError):
            load_checkpoint(newest)
        assert latest(tmp_path) == 1
        path.write_bytes(whole)
    assert latest(tmp_path) == 2


def test_the_newest_and_the_spared_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=2, spare=[3])
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000005", "step-00000006"]


def test_a_second_one_of_a_step_never_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, tensors(5.0), {})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001", "step-00000001-01"]
    assert float((load_latest(tmp_path) or pytest.fail("none"))[0]["model"]["w"][0]) == 5


def test_other_users_may_read_them(tmp_path: Path) -> None:
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in save(tmp_path, 1).iterdir())


def test_no_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(BundleError, match="all 1 checkpoints are damaged.*another --run-dir"):
        load_latest(tmp_path)


def test_damaged_newer_ones_never_push_out_a_new_one(tmp_path: Path) -> None:
    """Two damaged ones sort behind what is saved next; put aside they stay, but count no more."""
    for step in (200, 1000, 1200):
        save(tmp_path, step, keep=3)
    for step in (1000, 1200):
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    assert save(tmp_path, 300) in checkpoints(tmp_path)
    assert latest(tmp_path) == 300
    set_aside(tmp_path, "step-00000300")
    save(tmp_path, 400)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000300", "step-00000400"]
    assert (tmp_path / "damaged-step-00001200").is_dir()
