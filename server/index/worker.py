"""`python -m server.index.worker FD FOLDER`: one embedded collection, asked over the socket FD until it closes.

A process of its own, because the engine holds Python's lock for as long as its calls take, and so that whatever kills
the engine leaves the server alive. It reads one frame after another, answers each, and flushes when the other end goes.
"""

import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.errors import PipelineError
from server.index import FilterError, IndexInfo, NoKeywords
from server.index.edge import EdgeIndex, create_index, open_index
from server.index.wire import pack_hits, pack_points, receive, send, unpack_points, unpack_row

Answer = tuple[dict[str, Any], bytes]
PATIENCE = 5.0
DONE: Answer = ({}, b"")


def _search(index: EdgeIndex, ask: dict[str, Any], vectors: memoryview) -> Answer:
    query = unpack_row(vectors)
    hits, rows = pack_hits(index.search(query, ask["limit"], ask["where"], ask["exact"], vectors=ask["vectors"]))
    return {"hits": hits}, rows


def _keywords(index: EdgeIndex, ask: dict[str, Any], _vectors: memoryview) -> Answer:
    hits, rows = pack_hits(index.keywords(ask["text"], ask["limit"], ask["where"], vectors=ask["vectors"]))
    return {"hits": hits}, rows


def _upsert(index: EdgeIndex, ask: dict[str, Any], vectors: memoryview) -> Answer:
    points = unpack_points(ask["points"], vectors)
    index.add([p.id for p in points], unpack_row(vectors).reshape(len(points), -1), [p.payload for p in points])
    return {"points": index.info.points}, b""


def _delete(index: EdgeIndex, ask: dict[str, Any], _vectors: memoryview) -> Answer:
    index.remove(ask["ids"])
    return {"points": index.info.points}, b""


def _sync(index: EdgeIndex, _ask: dict[str, Any], _vectors: memoryview) -> Answer:
    index.sync()
    return DONE


def _optimize(index: EdgeIndex, _ask: dict[str, Any], _vectors: memoryview) -> Answer:
    index.optimize()
    return DONE


def _get(index: EdgeIndex, ask: dict[str, Any], _vectors: memoryview) -> Answer:
    points, rows = pack_points(index.get(ask["ids"], vectors=ask["vectors"]))
    return {"points": points}, rows


def _scroll(index: EdgeIndex, ask: dict[str, Any], _vectors: memoryview) -> Answer:
    found, following = index.scroll(ask["after"], ask["limit"], ask["where"], vectors=ask["vectors"])
    points, rows = pack_points(found)
    return {"points": points, "next": following}, rows


def _count(index: EdgeIndex, ask: dict[str, Any], _vectors: memoryview) -> Answer:
    return {"count": index.count(ask["where"])}, b""


OPERATIONS: dict[str, Callable[[EdgeIndex, dict[str, Any], memoryview], Answer]] = {
    "search": _search,
    "keywords": _keywords,
    "upsert": _upsert,
    "delete": _delete,
    "sync": _sync,
    "optimize": _optimize,
    "get": _get,
    "scroll": _scroll,
    "count": _count,
}


def serve(stream: socket.socket, index: EdgeIndex) -> None:
    """Answer until the other end closes the socket."""
    while True:
        try:
            ask, vectors = receive(stream)
        except EOFError:
            return
        try:
            answer, rows = OPERATIONS[ask["op"]](index, ask, vectors)
        except FilterError as error:
            answer, rows = {"error": "filter", "field": error.field, "message": str(error)}, b""
        except NoKeywords as error:
            answer, rows = {"error": "keywords", "message": str(error)}, b""
        except Exception as error:  # noqa: BLE001 - the engine raises nothing narrower; the server logs what it says
            answer, rows = {"error": "engine", "message": f"{type(error).__name__}: {error}"}, b""
        send(stream, answer, rows)


def main(arguments: list[str]) -> None:
    """Open or create the collection, say so, serve it, close it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides when it is over
    stream = socket.socket(fileno=int(arguments[0]))
    folder = Path(arguments[1])
    made = IndexInfo.model_validate_json(arguments[2]) if len(arguments) > 2 else None
    try:
        index = open_index(folder, PATIENCE) if made is None else create_index(folder, made)
    except PipelineError as error:
        send(stream, {"error": "open", "message": str(error)})
        return
    try:
        send(stream, {"info": index.info.model_dump()})
        serve(stream, index)
    except OSError:
        pass  # the server was killed in the middle of an answer
    finally:
        index.close()


if __name__ == "__main__":
    main(sys.argv[1:])
