"""The folder shards live in: a local path, or any place that fsspec can write to.

Locally every file appears through a temp file, fsync and rename. Elsewhere a file is sent whole under its name, which
object stores publish at once; on other systems a shard counts only when its statistics, sent last, are there.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from data_pipelines.errors import PipelineError
from data_pipelines.files import fsync_dir, publish, write_atomic


class Store:
    """Files by their name relative to one folder, such as `train/00000.tar`."""

    def __init__(self, where: str | Path) -> None:
        """`where`: a path or a URL (s3://bucket/folder ...). Raises PipelineError when no client can open it."""
        self.where = str(where).removeprefix("file://")
        self.local: Path | None = None
        self._fs: Any = None
        if "://" not in self.where:
            self.local = Path(self.where)
            return
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.where, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise PipelineError(f"{self.where}: cannot be opened ({error})") from error

    def __str__(self) -> str:
        return self.where

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def read(self, name: str) -> bytes:
        """Content. Raises FileNotFoundError."""
        return bytes((self.local / name).read_bytes() if self.local else self._fs.cat_file(self._at(name)))

    def size(self, name: str) -> int | None:
        """Length in bytes; None when there is no such file."""
        try:
            if self.local:
                return (self.local / name).stat().st_size if (self.local / name).is_file() else None
            found = self._fs.info(self._at(name))
            return int(found["size"]) if found["type"] == "file" else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def version(self, name: str) -> str:
        """A text that changes whenever a file on a store does. Raises FileNotFoundError."""
        return str(self._fs.ukey(self._at(name)))

    def names(self, folder: str = "", kind: str = "file") -> list[str]:
        """Names (without folder) of what lies directly in a sub-folder, sorted; `kind` is file or directory."""
        if self.local:
            path = self.local / folder
            if not path.is_dir():
                return []
            return sorted(p.name for p in path.iterdir() if (p.is_file() if kind == "file" else p.is_dir()))
        with suppress(FileNotFoundError, NotADirectoryError):
            found = self._fs.ls(self._at(folder), detail=True)
            return sorted(
                {item["name"].rstrip("/").rpartition("/")[2] for item in found if item["type"] == kind} - {""}
            )
        return []

    def write(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all."""
        if self.local:
            write_atomic(self.local / name, lambda stream: stream.write(content))
        else:
            self._fs.pipe_file(self._at(name), content)

    def send(self, path: Path, name: str) -> None:
        """Copy a file of this machine to a name on a store."""
        self._fs.put_file(str(path), self._at(name))

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file of a store to this machine. Raises FileNotFoundError."""
        self._fs.get_file(self._at(name), str(path))

    def put(self, temp: Path, name: str) -> None:
        """Move a finished local file, one of `scratch`, to its name."""
        if self.local:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
            publish(temp, self.local / name)
        else:
            self._fs.put_file(str(temp), self._at(name))
            temp.unlink()

    def move(self, old: str, new: str) -> None:
        """Rename a file, replacing what has the new name."""
        if self.local:
            (self.local / old).replace(self.local / new)
            fsync_dir((self.local / new).parent)
        else:
            self._fs.mv(self._at(old), self._at(new))

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        if self.local:
            (self.local / name).unlink(missing_ok=True)
        elif self._fs.exists(self._at(name)):
            self._fs.rm_file(self._at(name))

    def remove_folder(self, name: str) -> None:
        """Remove a sub-folder with the files in it, and its own sub-folders, if it is there."""
        for inner in self.names(name, "directory"):
            self.remove_folder(f"{name}/{inner}")
        for inner in self.names(name):
            self.remove(f"{name}/{inner}")
        if self.local:
            with suppress(FileNotFoundError):
                (self.local / name).rmdir()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Folder on this machine for growing files, on the output's own file system when that is local."""
        if self.local:
            path = self.local / TEMP
            path.mkdir(parents=True, exist_ok=True)
            yield path
        else:
            with tempfile.TemporaryDirectory(prefix="vlp-shard-") as folder:
                yield Path(folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep a second process from writing to the same local folder; a kill releases the lock."""
        if not self.local:
            yield  # object stores have no locks; two writers of one job would send equal bytes
            return
        if self.local.exists() and not self.local.is_dir():
            raise PipelineError(f"{self.local} is a file; --out names a folder")
        self.local.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.local, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks, such as some network ones: no worse than before
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise PipelineError(
                        f"another process is writing to {self.local}: wait for it, or choose another --out"
                    ) from error
            yield
        finally:
            os.close(handle)


TEMP = "_tmp"
"""Sub-folder of unfinished work; it exists only while a job runs or after one was killed."""


def join(folder: str, name: str) -> str:
    """Name inside a split's folder; "" is the output folder itself."""
    return f"{folder}/{name}" if folder else name
