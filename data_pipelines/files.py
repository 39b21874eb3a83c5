"""Small file helpers that everything above shares: digests, the cache folder, atomic publishing."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_dir() -> Path:
    """$VLP_CACHE, else the user's cache folder (XDG) with `vlp` below it."""
    if chosen := os.environ.get("VLP_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlp"


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Publish a file whole or not at all: unique temp name, fsync, rename, fsync of the folder.

    `write` receives the open temp file. On any error the temp file is removed and the old content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temp = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
        publish(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def publish(temp: Path, path: Path) -> None:
    """Give a finished file of the same file system its name, durably: fsync, rename, fsync of the folder."""
    handle = os.open(temp, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    temp.chmod(0o644)  # mkstemp makes 0600, which would lock other users out of a shared dataset
    temp.replace(path)
    fsync_dir(path.parent)


def fsync_dir(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
