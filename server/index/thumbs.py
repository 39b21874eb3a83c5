"""Thumbnails of an embedded collection: one SQLite file beside the engine's folder, asked by id and nothing else.

None of their bytes pass through the engine or its write-ahead log, so that searches are what they were without them.
A thumbnail is written before its point and deleted before it: whatever breaks in between, no deleted point has one.
"""

import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from server.index import IndexFailure, IndexInfo, PointId

FILE = "thumbnails.sqlite"
SET_UP = (
    "PRAGMA page_size = 16384",  # several to a page
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "CREATE TABLE IF NOT EXISTS thumbnails (id BLOB PRIMARY KEY, jpeg BLOB NOT NULL)",
)


class Thumbs:
    """Those of one collection. May be called from several threads; the file is opened by the first call."""

    def __init__(self, folder: Path, info: IndexInfo) -> None:
        """Keeps nothing and finds nothing where `info` says that there are none."""
        self._path, self._on = folder / FILE, info.thumbnails > 0
        self._lock, self._closed = threading.Lock(), False
        self._opened: sqlite3.Connection | None = None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._closed:
                raise IndexFailure("the collection is closed")
            try:
                if self._opened is None:
                    self._opened = _open(self._path)
                with self._opened as database:
                    yield database
            except sqlite3.Error as error:
                raise IndexFailure(f"{self._path}: {error}") from error

    def put(self, given: Iterable[tuple[PointId, bytes | None]]) -> None:
        """Insert or replace the JPEGs of points, delete those of points that have none now; durable when it returns."""
        if self._on:
            with self._transaction() as database:
                for id, jpeg in given:
                    if jpeg is None:
                        database.execute("DELETE FROM thumbnails WHERE id = ?", (_key(id),))
                    else:
                        database.execute("INSERT OR REPLACE INTO thumbnails VALUES (?, ?)", (_key(id), jpeg))

    def get(self, ids: Sequence[PointId]) -> dict[PointId, bytes]:
        """JPEGs of those points that have one."""
        if not self._on:
            return {}
        with self._transaction() as database:
            asked = "SELECT jpeg FROM thumbnails WHERE id = ?"
            return {id: row[0] for id in ids if (row := database.execute(asked, (_key(id),)).fetchone())}

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._closed = True
            if self._opened is not None:
                self._opened.close()


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        for statement in SET_UP:
            database.execute(statement)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _key(id: PointId) -> bytes:
    """Eight bytes for a number, because SQLite's have 63 bits, sixteen for a UUID."""
    return id.to_bytes(8, "big") if isinstance(id, int) else uuid.UUID(id).bytes
