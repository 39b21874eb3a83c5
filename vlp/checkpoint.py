"""Checkpoints: a folder of safetensors and one JSON that lists their sha256, published whole by a rename.

Order of a save: write into a temporary folder, fsync every file, rename, fsync the parent. A folder with the final name
is therefore complete; what a crash leaves behind is a temporary folder that the next save removes.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipelines.errors import BundleError
from data_pipelines.files import fsync_dir, sha256_file

log = logging.getLogger(__name__)

STATE = "state.json"
TEMPORARY = ".saving-"

Tensors = dict[str, dict[str, Tensor]]
"""File stem (model, ema, optimizer, rng) -> named tensors."""


def save_checkpoint(folder: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int = 2) -> Path:
    """Publish `folder/step-000123`; older ones beyond `keep` (at least 2) are removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    temp = folder / f"{TEMPORARY}{os.getpid()}"
    temp.mkdir()
    try:
        digests = {}
        for stem, content in tensors.items():
            path = temp / f"{stem}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in content.items()}, path)
            digests[path.name] = sha256_file(path)
        text = json.dumps({"step": step, "files": digests, **state}, indent=2)
        (temp / STATE).write_text(text, encoding="utf-8")
        for path in temp.iterdir():
            _fsync(path)
        final = folder / f"step-{step:08d}"
        if final.exists():
            shutil.rmtree(final)
        temp.rename(final)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    fsync_dir(folder)
    for old in sorted(folder.glob("step-*"))[: -max(keep, 2)]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _fsync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, state) of one checkpoint; every file is checked before it is read. Raises BundleError."""
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name, digest in state["files"].items():
            if sha256_file(path / name) != digest:
                raise BundleError(f"{path / name}: sha256 differs from {STATE}: the checkpoint is damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: not a complete checkpoint ({error})") from error
    return {Path(name).stem: load_file(path / name) for name in state["files"]}, state


def load_latest(folder: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The newest checkpoint that is whole, None if there is none. A damaged one is named and skipped."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load_checkpoint(path)
        except BundleError as error:
            log.warning("%s; trying the one before", error)
    return None
