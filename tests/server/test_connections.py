"""Connections that would be held for nothing are let go: over raw sockets, with the protocol `vlp serve` uses."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import uvicorn

from server.app import create_app
from server.cli import listen
from server.connections import connection_class
from server.settings import Limits, Settings

LIMITS = Limits(read_seconds=0.5, header_bytes=4096, connections=20)


@pytest.fixture
def port(fake_engine: Any) -> Iterator[int]:
    """A server with short limits."""
    app = create_app(Settings(limits=LIMITS), fake_engine)
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(
            uvicorn.Config(app, http=connection_class(LIMITS), log_config=None, timeout_graceful_shutdown=2)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def alive(port: int) -> bool:
    return httpx2.get(f"http://127.0.0.1:{port}/healthz", timeout=10).status_code == 200


def closed_after(raw: socket.socket) -> float:
    """Seconds until the server hangs up."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while raw.recv(65536):
            pass
    return time.monotonic() - began


@pytest.mark.parametrize("head", [b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX"])
def test_a_head_that_does_not_end(head: bytes, port: int) -> None:
    with connect(port) as raw:
        raw.sendall(head)
        assert 0.3 < closed_after(raw) < 5
    assert alive(port)


def test_a_byte_now_and_then_does_not_keep_it_open(port: int) -> None:
    with connect(port) as raw:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"a" * 100:
                raw.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < 5


def test_the_second_head_of_a_connection_is_timed_too(port: int) -> None:
    with connect(port) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        raw.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert closed_after(raw) < 5


@pytest.mark.parametrize("part", [b"X-%d: " + b"a" * 80 + b"\r\n", b"X-%d: b\r\n"])
def test_a_long_head_is_cut(part: bytes, port: int) -> None:
    with connect(port) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            for number in range(1_000_000):
                line = part.replace(b"%d", str(number).encode())
                raw.sendall(line)
                sent += len(line)
                if number % 50 == 0:
                    time.sleep(0.001)
        assert sent < 5_000_000
    assert alive(port)


def test_long_heads_say_so(port: int) -> None:
    with connect(port) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 5000)
        assert raw.recv(65536).startswith(b"HTTP/1.1 431")


def test_an_ordinary_head_after_a_long_body_is_fine(port: int) -> None:
    with connect(port) as raw:
        for _ in range(3):
            body = b'{"input": "' + b"a" * 6000 + b'"}'
            raw.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            answer = http.client.HTTPResponse(raw)  # which may come in several pieces
            answer.begin()
            assert (answer.status, answer.read()[:1]) == (200, b"{")


def test_an_answer_that_nobody_reads(port: int) -> None:
    """Requests are sent, answers never read: the server hangs up when its buffers are full, and keeps no task."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(10)
        raw.connect(("127.0.0.1", port))
        began = time.monotonic()
        with contextlib.suppress(ConnectionError, TimeoutError):
            while time.monotonic() - began < 30:
                raw.sendall(request)
                time.sleep(0.01)
        assert time.monotonic() - began < 30, "never hung up"
    assert alive(port)


def test_requests_do_not_queue_up_on_a_connection(port: int) -> None:
    """A thousand at once: the server hangs up long before it holds them all. Two are answered in order."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(port) as raw:
        received = b""
        with contextlib.suppress(ConnectionError):
            raw.sendall(request * 1000)
            while data := raw.recv(65536):
                received += data
        assert received.count(b"HTTP/1.1 200") < 100
    with connect(port) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        received = b""
        while received.count(b'"ok"') < 2:
            received += raw.recv(65536)
        assert received.count(b"HTTP/1.1 200") == 2


def test_connections_are_counted(port: int) -> None:
    held = [connect(port) for _ in range(20)]
    try:
        time.sleep(0.1)
        with connect(port) as raw:
            raw.settimeout(5)
            assert closed_after(raw) < 0.3
    finally:
        for raw in held:
            raw.close()
    time.sleep(0.1)
    assert alive(port)


def test_slow_clients_do_not_hold_others_up(port: int) -> None:
    """Fifteen that send nothing more; meanwhile every ordinary request is answered quickly."""
    held = [connect(port) for _ in range(15)]
    for raw in held:
        raw.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
    try:
        times = []
        for number in range(20):
            began = time.monotonic()
            answer = httpx2.post(f"http://127.0.0.1:{port}/v1/embeddings", json={"input": str(number)}, timeout=10)
            times.append(time.monotonic() - began)
            assert answer.status_code == 200
        assert sorted(times)[10] < 0.5
        assert [raw.recv(100).startswith(b"HTTP/1.1 408") for raw in held] == [True] * 15
    finally:
        for raw in held:
            raw.close()
