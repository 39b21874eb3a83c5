"""A file or folder to read from: a local path, or one that fsspec reaches (s3://, gs://, memory:// ...)."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from data_pipelines.errors import BadSample, PipelineError


@dataclass(frozen=True, slots=True)
class Place:
    """An address and the file system it belongs to; `place(where)` makes one."""

    fs: Any
    path: str
    """As the file system spells it, without protocol."""
    local: bool

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Name up to its first dot; what records of the file are said to come from."""
        return self.name.partition(".")[0] or self.name or "root"

    @property
    def parent(self) -> "Place":
        """The folder around it."""
        return Place(self.fs, self.path.rstrip("/").rpartition("/")[0] or "/", self.local)

    def __str__(self) -> str:
        return self.path if self.local else str(self.fs.unstrip_protocol(self.path))

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return bool(self.fs.isdir(self.path))

    def exists(self) -> bool:
        """Whether there is anything."""
        return bool(self.fs.exists(self.path))

    def children(self) -> list["Place"]:
        """What lies directly in the folder, by name, hidden things left out."""
        found = [Place(self.fs, path.rstrip("/"), self.local) for path in self.fs.ls(self.path, detail=False)]
        return sorted((child for child in found if not child.name.startswith((".", "_"))), key=lambda child: child.name)

    def open(self) -> IO[bytes]:
        """Stream of its bytes, seekable. Raises PipelineError."""
        try:
            return Path(self.path).open("rb") if self.local else self.fs.open(self.path, "rb")
        except OSError as error:
            raise PipelineError(f"{self}: cannot be opened ({error.strerror or error})") from error

    def state(self) -> str:
        """Changes when the file is written: its length, and its time or the store's own mark."""
        info = self.fs.info(self.path)
        marks = (info.get(name) for name in ("mtime", "ETag", "etag", "LastModified", "created"))
        return f"{info.get('size')} {next((mark for mark in marks if mark), '')}"

    def beside(self, name: str) -> Path | str:
        """A picture's address relative to this folder. Raises BadSample for a local path named by a remote file."""
        if self.local:
            return Path(self.path, name)
        if name.startswith("/"):
            raise BadSample("bad_url", f"{name[:200]!r}: a remote table cannot name a file of this machine")
        return f"{self}/{name}"


def place(where: str | Path) -> Place:
    """The place of a path or URL, which need not exist. Raises PipelineError where no client is installed for it."""
    if isinstance(where, Path) or "://" not in where:
        return Place(fsspec.filesystem("file"), str(Path(where).absolute()), local=True)
    try:
        fs, path = fsspec.core.url_to_fs(where)
    except (ImportError, ValueError) as error:
        raise PipelineError(f"{where}: cannot be opened ({error})") from error
    return Place(fs, path, local=False)
