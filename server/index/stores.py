"""Where collections live: a folder with one embedded index each, or a cluster (`cluster.ClusterStore`)."""

import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data_pipelines.errors import PipelineError
from data_pipelines.files import fsync_dir
from server.index import Index, IndexInfo
from server.index.edge import INFO, read_info
from server.index.remote import EdgeProcess, create_empty

if TYPE_CHECKING:
    from server.index.scan import ScanIndex

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Names of collections: safe as folder names and in URLs."""
QDRANT_KEY = "VLP_QDRANT_API_KEY"
DROPPED = ".dropped-"
CREATING = ".creating-"


class Store(Protocol):
    """A set of collections. Methods block, and may be called from several threads."""

    def names(self) -> list[str]:
        """Collections there, sorted."""

    def info(self, name: str) -> IndexInfo:
        """What a collection holds, without opening it. Raises PipelineError."""

    def open(self, name: str) -> Index:
        """A collection. Raises PipelineError when it is not there or cannot be opened."""

    def create(self, name: str, info: IndexInfo) -> Index:
        """A new, empty collection, there whole or not at all. Raises FileExistsError."""

    def drop(self, name: str) -> None:
        """Delete a closed collection and its points."""

    def close(self) -> None:
        """Let go of what the store itself holds."""


def open_embedded(folder: Path) -> "ScanIndex":
    """The collection in a folder: in an engine process, and scanned in memory as long as it is small."""
    from server.index.scan import ScanIndex  # brings torch

    return ScanIndex(EdgeProcess(folder))


def open_store(folder: Path | None, url: str | None) -> Store | None:
    """Where collections are kept: in a folder, at a Qdrant server, or nowhere. Raises PipelineError.

    The server's API key comes from the environment, where other processes' lists do not show it.
    """
    if folder is not None and url is not None:
        raise PipelineError("collections are kept either in a folder (--collections) or at a server (--qdrant)")
    if url is not None:
        from server.index.cluster import ClusterStore

        return ClusterStore(url, os.environ.get(QDRANT_KEY))
    return None if folder is None else FolderStore(folder)


class FolderStore:
    """Embedded collections, one folder each below `root`."""

    def __init__(self, root: Path) -> None:
        """Makes `root` when it is not there, and clears what an interrupted creation or drop left."""
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        for path in root.iterdir():
            if path.name.startswith((DROPPED, CREATING)):
                shutil.rmtree(path, ignore_errors=True)

    def names(self) -> list[str]:
        """Folders that hold an index."""
        found = (path.name for path in self._root.iterdir() if (path / INFO).is_file())
        return sorted(name for name in found if NAME.fullmatch(name))

    def info(self, name: str) -> IndexInfo:
        """index.json of a collection."""
        return read_info(self._root / name)

    def open(self, name: str) -> "ScanIndex":
        """A collection in an engine process of its own."""
        if not NAME.fullmatch(name):
            raise PipelineError(f"{name!r} is no name of a collection")
        return open_embedded(self._root / name)

    def create(self, name: str, info: IndexInfo) -> "ScanIndex":
        """A new collection: made aside, then renamed."""
        target = self._root / name
        if target.exists():
            raise FileExistsError(name)
        scratch = Path(tempfile.mkdtemp(prefix=CREATING, dir=self._root))
        try:
            create_empty(scratch, info)
            scratch.chmod(0o755)
            scratch.rename(target)
        except OSError as error:
            if target.exists():
                raise FileExistsError(name) from error
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        fsync_dir(self._root)
        return open_embedded(target)

    def drop(self, name: str) -> None:
        """Out of sight at once, then deleted."""
        aside = self._root / f"{DROPPED}{uuid.uuid4().hex}"
        (self._root / name).rename(aside)
        fsync_dir(self._root)
        shutil.rmtree(aside)

    def close(self) -> None:
        """Nothing is held here."""
