"""An embedded collection in an engine process of its own, behind the same protocol.

The process is started again when it dies; the write-ahead log brings back every acknowledged write. `compact` rebuilds
the collection into a second process while the first goes on answering, and then changes over: the engine's own
`optimize` would make all searches wait for minutes.
"""

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import PipelineError
from server.index import (
    FilterError,
    Hit,
    IndexFailure,
    IndexInfo,
    NoKeywords,
    Point,
    PointId,
    Row,
    Where,
    check_filter,
)
from server.index.edge import EXACT_BELOW, SHARD_NAME, read_info, write_info
from server.index.thumbs import Thumbs
from server.index.wire import pack_points, receive, send, unpack_hits, unpack_points

log = logging.getLogger(__name__)

PAGE = 250
"""Points per frame of a write or a copy, so that a search between two frames waits for milliseconds."""
CLOSE_SECONDS = 60
ROOT = Path(__file__).parents[2]


class _Process:
    """One running engine and the socket to it."""

    def __init__(self, folder: Path, create: IndexInfo | None = None) -> None:
        ours, theirs = socket.socketpair()
        extra = [] if create is None else [create.model_dump_json()]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.index.worker", str(theirs.fileno()), str(folder), *extra],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self._stream, self._lock = ours, threading.Lock()
        try:
            hello, _ = receive(ours)
        except (EOFError, OSError) as error:
            self.close()
            raise PipelineError(f"{folder}: the index engine ended while it opened this collection") from error
        if "error" in hello:
            self.close()
            raise PipelineError(hello["message"])
        self.info = IndexInfo.model_validate(hello["info"])

    def ask(self, header: dict[str, Any], vectors: bytes = b"") -> tuple[dict[str, Any], memoryview]:
        """The answer of one operation. Raises OSError or EOFError when the process has died, else what it refused."""
        with self._lock:
            send(self._stream, header, vectors)
            answer, rows = receive(self._stream)
        match answer.get("error"):
            case None:
                return answer, rows
            case "filter":
                raise FilterError(answer["field"], answer["message"])
            case "keywords":
                raise NoKeywords(answer["message"])
            case _:
                raise IndexFailure(answer["message"])

    def close(self) -> None:
        """Hang up; the process flushes and ends."""
        with self._lock:
            self._stream.close()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("an index engine did not end within %d s and is killed", CLOSE_SECONDS)
            self.process.kill()
            self.process.wait()


def create_empty(folder: Path, info: IndexInfo) -> None:
    """An empty collection in a folder that is there and empty, made durable."""
    engine = _Process(folder, info)
    try:
        engine.ask({"op": "optimize"})
    finally:
        engine.close()
    write_info(folder, info)


class EdgeProcess:
    """One embedded collection; see the protocol `Index`."""

    def __init__(self, folder: Path) -> None:
        """Raises PipelineError when the collection cannot be opened."""
        self._folder = folder
        self._engine = _Process(folder)
        self._info = self._engine.info
        self._thumbs = Thumbs(folder, self._info)
        self._state = threading.Lock()
        self._writing = threading.Lock()
        self._compacting = threading.Lock()
        self._touched: set[PointId] | None = None
        self._churn = max(0, self._info.points - self._info.indexed)
        self._made: _Process | None = None
        """The engine of a compaction that is going on."""
        self._closed = False
        for stale in folder.iterdir():
            if SHARD_NAME.fullmatch(stale.name) and stale.name != self._info.shard:
                shutil.rmtree(stale)  # what a compaction left when it was killed

    @property
    def info(self) -> IndexInfo:
        """What it holds."""
        return self._info

    def _ask(self, header: dict[str, Any], vectors: bytes = b"") -> tuple[dict[str, Any], memoryview]:
        """Every operation may be repeated, so a dead or replaced engine costs a second try and nothing else."""
        engine = self._engine
        try:
            return engine.ask(header, vectors)
        except (EOFError, OSError):
            return self._again(engine).ask(header, vectors)

    def _again(self, gone: _Process) -> _Process:
        with self._state:
            if self._closed:
                raise IndexFailure("the collection is closed")
            if self._engine is gone:
                log.error("the index engine of %s died (%s); starting it again", self._folder.name, gone.process.poll())
                gone.process.kill()
                gone.close()
                try:
                    self._engine = _Process(self._folder)
                except PipelineError as error:
                    raise IndexFailure(str(error)) from error
            return self._engine

    def search(
        self, query: Row, limit: int, where: Where | None = None, exact: bool = False, *, vectors: bool = False
    ) -> list[Hit]:
        """Best hits by cosine."""
        check_filter(where or {}, self._info.fields)
        ask = {"op": "search", "limit": limit, "where": where or {}, "exact": exact, "vectors": vectors}
        answer, rows = self._ask(ask, np.ascontiguousarray(query, np.float32).tobytes())
        return unpack_hits(answer["hits"], rows)

    def keywords(self, text: str, limit: int, where: Where | None = None, *, vectors: bool = False) -> list[Hit]:
        """Best captions by BM25."""
        check_filter(where or {}, self._info.fields)
        ask = {"op": "keywords", "text": text, "limit": limit, "where": where or {}, "vectors": vectors}
        answer, rows = self._ask(ask)
        return unpack_hits(answer["hits"], rows)

    def upsert(self, points: Sequence[Point]) -> None:
        """Insert or replace points; on the disk when it returns."""
        with self._writing:
            if self._touched is not None:
                self._touched.update(point.id for point in points)
            self._thumbs.put((point.id, point.thumbnail) for point in points)
            self._copy_into(None, points)
            self._churn += len(points)

    def _copy_into(self, engine: _Process | None, points: Sequence[Point]) -> None:
        ask = self._ask if engine is None else engine.ask
        for at in range(0, len(points), PAGE):
            rows, vectors = pack_points(points[at : at + PAGE])
            answer, _ = ask({"op": "upsert", "points": rows}, vectors)
            if engine is None:
                self._info = self._info.model_copy(update={"points": answer["points"]})
        if points:
            ask({"op": "sync"})

    def delete(self, ids: Sequence[PointId]) -> None:
        """Remove points; on the disk when it returns."""
        if not ids:
            return
        with self._writing:
            if self._touched is not None:
                self._touched.update(ids)
            self._thumbs.put((id, None) for id in ids)
            answer, _ = self._ask({"op": "delete", "ids": list(ids)})
            self._info = self._info.model_copy(update={"points": answer["points"]})
            self._churn += len(ids)

    def get(self, ids: Sequence[PointId], *, vectors: bool = False) -> list[Point]:
        """Points by id."""
        answer, rows = self._ask({"op": "get", "ids": list(ids), "vectors": vectors})
        return unpack_points(answer["points"], rows)

    def thumbnails(self, ids: Sequence[PointId]) -> dict[PointId, bytes]:
        """JPEGs of points, without a word to the engine."""
        return self._thumbs.get(ids)

    def scroll(
        self, after: PointId | None, limit: int, where: Where | None = None, *, vectors: bool = False
    ) -> tuple[list[Point], PointId | None]:
        """Points in the order of their ids."""
        ask = {"op": "scroll", "after": after, "limit": limit, "where": where or {}, "vectors": vectors}
        answer, rows = self._ask(ask)
        return unpack_points(answer["points"], rows), answer["next"]

    def count(self, where: Where | None = None) -> int:
        """Points that fulfil `where`."""
        return int(self._ask({"op": "count", "where": where or {}})[0]["count"])

    @property
    def wants_compaction(self) -> bool:
        """Whether so much changed since the graph was built that searches would gain by a new one."""
        return self._info.points > EXACT_BELOW and self._churn > max(EXACT_BELOW, self._info.indexed // 4)

    def compact(self, fields: Mapping[str, Any] | None = None) -> bool:
        """Rebuild graph and payload indexes (with other `fields`, if given); False when that is going on already.

        Reads and writes go on meanwhile. Killed in the middle, the collection is what it was.
        """
        if not self._compacting.acquire(blocking=False):
            return False
        info = self._successor(fields)
        try:
            with self._writing:
                self._touched = set()
            self._made = made = _Process(self._folder, info)
            copied = self._copy_all(made)
            made.ask({"op": "optimize"})
            with self._writing:
                touched, self._touched = self._touched, set()
            self._catch_up(made, touched)  # most of what was written meanwhile, without holding up writers
            with self._writing:
                self._catch_up(made, self._touched)
                self._change_over(made, info.model_copy(update={"indexed": copied}))
                self._made, self._touched, self._churn = None, None, 0
        except (EOFError, OSError) as error:
            raise IndexFailure("the engine of a compaction died; the collection is what it was") from error
        finally:
            self._touched = None
            if self._made is not None:
                self._made.process.kill()
                self._made.close()
                self._made = None
                shutil.rmtree(self._folder / info.shard, ignore_errors=True)
            self._compacting.release()
        return True

    def _successor(self, fields: Mapping[str, Any] | None) -> IndexInfo:
        _, _, number = self._info.shard.partition("-")
        changes: dict[str, Any] = {"format": 2, "shard": f"edge-{int(number or 0) + 1}"}
        return self._info.model_copy(update={**changes, **({} if fields is None else {"fields": dict(fields)})})

    def _copy_all(self, engine: _Process) -> int:
        after: PointId | None = None
        copied = 0
        while True:
            points, after = self.scroll(after, PAGE, vectors=True)
            self._copy_into(engine, points)
            copied += len(points)
            if after is None:
                return copied

    def _catch_up(self, engine: _Process, touched: set[PointId]) -> None:
        ordered = sorted(touched, key=str)
        for at in range(0, len(ordered), PAGE):
            ids = ordered[at : at + PAGE]
            present = self.get(ids, vectors=True)
            gone = set(ids) - {point.id for point in present}
            if gone:
                engine.ask({"op": "delete", "ids": sorted(gone, key=str)})
            self._copy_into(engine, present)

    def _change_over(self, engine: _Process, info: IndexInfo) -> None:
        with self._state:
            info = info.model_copy(update={"points": self._info.points})
            write_info(self._folder, info)
            replaced, before, self._engine, self._info = self._engine, self._info, engine, info
        replaced.close()
        shutil.rmtree(self._folder / before.shard, ignore_errors=True)

    def close(self) -> None:
        """Let the engine flush and end. A compaction is given up."""
        self._closed = True
        if (made := self._made) is not None:
            made.process.kill()
        with self._compacting, self._writing, self._state:
            self._engine.close()
            self._thumbs.close()
            if read_info(self._folder) != self._info:
                write_info(self._folder, self._info)  # how many points there are, for lists of closed collections
