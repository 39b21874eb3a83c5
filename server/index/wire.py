"""Frames between a server and its engine processes, over a socket pair: lengths, a JSON header, float32 vectors.

Nothing here can run code: both ends read JSON and numbers, no pickle.
"""

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from server.index import Hit, Point, Row

LENGTHS = struct.Struct("<QQ")
"""Bytes of the header, bytes of the vectors."""


def send(stream: socket.socket, header: dict[str, Any], vectors: bytes = b"") -> None:
    """One frame. Raises OSError when the other end has gone."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    stream.sendall(b"".join((LENGTHS.pack(len(text), len(vectors)), text, vectors)))


def receive(stream: socket.socket) -> tuple[dict[str, Any], memoryview]:
    """The next frame. Raises EOFError or OSError when the other end has gone."""
    text_length, vectors_length = LENGTHS.unpack(_exactly(stream, LENGTHS.size))
    header: dict[str, Any] = json.loads(bytes(_exactly(stream, text_length)))
    return header, _exactly(stream, vectors_length)


def _exactly(stream: socket.socket, length: int) -> memoryview:
    buffer = memoryview(bytearray(length))
    done = 0
    while done < length:
        received = stream.recv_into(buffer[done:])
        if received == 0:
            raise EOFError("the other end has gone")
        done += received
    return buffer


def pack_points(points: Sequence[Point]) -> tuple[list[list[Any]], bytes]:
    """([id, payload] each, vectors): all points have one, or none has."""
    return [[point.id, point.payload] for point in points], _bytes([point.vector for point in points])


def unpack_points(rows: Sequence[Sequence[Any]], vectors: memoryview) -> list[Point]:
    """Inverse of `pack_points`."""
    return [Point(id, payload, row) for (id, payload), row in zip(rows, _rows(vectors, len(rows)), strict=True)]


def pack_hits(hits: Sequence[Hit]) -> tuple[list[list[Any]], bytes]:
    """([id, score, payload] each, vectors)."""
    return [[hit.id, hit.score, hit.payload] for hit in hits], _bytes([hit.vector for hit in hits])


def unpack_hits(rows: Sequence[Sequence[Any]], vectors: memoryview) -> list[Hit]:
    """Inverse of `pack_hits`."""
    found = zip(rows, _rows(vectors, len(rows)), strict=True)
    return [Hit(id, score, payload, row) for (id, score, payload), row in found]


def unpack_row(vector: memoryview) -> Row:
    """One vector."""
    return np.frombuffer(vector, np.float32)


def _bytes(rows: Sequence[Row | None]) -> bytes:
    present = [row for row in rows if row is not None]
    return np.stack(present).astype(np.float32, copy=False).tobytes() if present else b""


def _rows(vectors: memoryview, count: int) -> Sequence[Row | None]:
    if not len(vectors):
        return [None] * count
    return list(np.frombuffer(vectors, np.float32).reshape(count, -1))
