"""Checkpoints: a folder of safetensors, a JSON that lists their sha256, and the sha256 of that; published by a rename.

Order of a save: write into a temporary folder, fsync every file and the folder, rename, fsync the parent. A folder with
the final name is therefore complete; what a crash leaves behind is a temporary folder that the next save removes. No
checkpoint is ever replaced: one more of the same step gets a name that sorts behind it.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipelines.errors import BundleError, PipelineError
from data_pipelines.files import fsync_dir, sha256_file

log = logging.getLogger(__name__)

STATE = "state.json"
DIGEST = "state.sha256"
TEMPORARY = ".saving-"
MAX_FAILED = 3
"""Saves in a row that may fail before the run stops."""

Tensors = dict[str, dict[str, Tensor]]
"""File stem (model, ema, optimizer, objective) -> named tensors."""


def save_checkpoint(
    folder: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int = 2, spare: Collection[int] = ()
) -> Path:
    """Publish `folder/step-000123`; older ones beyond `keep` (at least 2) go afterwards, but not of the steps `spare`.

    Raises OSError, and then everything is as it was before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    temp = folder / f"{TEMPORARY}{os.getpid()}"
    try:
        temp.mkdir()
        digests = {}
        for stem, content in tensors.items():
            path = temp / f"{stem}.safetensors"
            _write(path, content)
            digests[path.name] = sha256_file(path)
        text = json.dumps({"step": step, "files": digests, **state}, indent=2).encode()
        (temp / STATE).write_bytes(text)
        (temp / DIGEST).write_text(hashlib.sha256(text).hexdigest())
        for path in temp.iterdir():
            _fsync(path)
        fsync_dir(temp)
        final = _free_name(folder, step)
        temp.rename(final)
        fsync_dir(folder)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    others = [path for path in checkpoints(folder) if path != final]
    for old in others[: 1 - max(keep, 2)]:
        if step_of(old) not in spare:
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.split("-")[1])


def _free_name(folder: Path, step: int) -> Path:
    plain = folder / f"step-{step:08d}"
    used = [int(([*path.name.split("-"), "0"])[2]) for path in checkpoints(folder) if step_of(path) == step]
    return plain.with_name(f"{plain.name}-{max(used) + 1:02d}") if used else plain


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
    except SafetensorError as error:  # a full disk and its like, in the library's words
        raise OSError(f"{path}: {error}") from error
    path.chmod(0o644)  # safetensors makes it 0600


def _fsync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, state) of one checkpoint, its `name` in the state; every file is checked before it is read.

    Raises BundleError.
    """
    try:
        text = (path / STATE).read_bytes()
        if hashlib.sha256(text).hexdigest().encode() != (path / DIGEST).read_bytes():
            raise BundleError(f"{path / STATE}: sha256 differs from {DIGEST}: the checkpoint is damaged")
        state: dict[str, Any] = json.loads(text)
        for name, digest in state["files"].items():
            if sha256_file(path / name) != digest:
                raise BundleError(f"{path / name}: sha256 differs from {STATE}: the checkpoint is damaged")
        return {Path(name).stem: load_file(path / name) for name in state["files"]}, state | {"name": path.name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BundleError(f"{path}: not a complete checkpoint ({error})") from error


def load_latest(folder: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The newest checkpoint that is whole, None where there are none at all. A damaged one is named and skipped.

    Raises BundleError where all are damaged: beginning again would throw away what may still be rescued.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except BundleError as error:
            log.warning("%s; trying the one before", error)
    if found:
        raise BundleError(
            f"{folder}: all {len(found)} checkpoints are damaged (see above): restore one of them from a copy, or "
            "begin again in another --run-dir"
        )
    return None


def set_aside(folder: Path, name: str) -> None:
    """Rename the damaged checkpoints that sort behind `name`, which was loaded: they must not count as the newest."""
    for path in checkpoints(folder):
        if path.name > name:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s is now %s; delete it when nobody needs it", path, aside.name)


class Saver:
    """Writes checkpoints in the background, one at a time; counts saves that failed."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.after: Callable[[], object] | None = None
        """Called when a checkpoint lies on disk, in the background as well; an OSError of it is a failed save."""
        self.failed = 0
        """Saves that failed, in all."""
        self._in_a_row = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vlp-checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], spare: Collection[int], wait: bool) -> None:
        """Copy the state and write it while training goes on; `wait` until it lies on disk.

        A save that fails leaves the one before in place and is reported. Raises PipelineError at the third in a row.
        """
        self.wait()
        own = {stem: {key: value.detach().clone() for key, value in part.items()} for stem, part in tensors.items()}
        self._pending = self._thread.submit(self._write, step, own, state, spare)
        if wait:
            self.wait()

    def _write(self, step: int, tensors: Tensors, state: dict[str, Any], spare: Collection[int]) -> Path:
        path = save_checkpoint(self.folder, step, tensors, state, self.keep, spare)
        if self.after is not None:
            self.after()
        return path

    def wait(self) -> None:
        """Until the save under way is done. Raises PipelineError at the third in a row that failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self._in_a_row = 0
        except OSError as error:
            self.failed += 1
            self._in_a_row += 1
            log.error("checkpoint not saved (%s); the one before stays, the next save tries again", error)
            if self._in_a_row >= MAX_FAILED:
                raise PipelineError(
                    f"{self.folder}: {MAX_FAILED} saves in a row failed, the last with: {error}; make room or mend the "
                    "disk, then continue with --resume"
                ) from error

    def close(self) -> None:
        """Finish the save under way and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
