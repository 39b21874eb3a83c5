"""Generated pictures and a loopback web server for tests of every floor; shipped, so that no test imports another."""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


def draw(size: tuple[int, int] = (40, 30), mode: str = "RGB", format: str = "PNG", seed: int = 0) -> bytes:
    """An encoded picture of soft noise, width x height; another `seed` gives another picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA").resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path's route; the server counts connections and keeps what was asked."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for a delayed acknowledgement
    server: "Web"

    def setup(self) -> None:
        """Count the connection."""
        super().setup()
        self.server.connects += 1

    def do_GET(self) -> None:
        """Call the route of the path, 404 where there is none."""
        self.server.asked.append(self.path)
        self.server.headers.append(dict(self.headers))
        route = self.server.routes.get(self.path.partition("?")[0])
        if route is None:
            self.answer(b"nothing here", 404)
        else:
            route(self)

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        """A proper answer; underscores in header names become hyphens."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def raw(self, content: bytes) -> None:
        """Bytes as they are, then the end of the connection."""
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


class Web(ThreadingHTTPServer):
    """A web server on the loopback; `routes` maps paths to functions of the Handler."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.routes: dict[str, Callable[[Handler], object]] = {}
        self.connects = 0
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up early are what many tests are about."""


@contextmanager
def serve() -> Iterator[Web]:
    """A running server."""
    with Web() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def run_shard(*arguments: str) -> None:
    """`vlp shard` with these arguments; something a fresh process can be told to run."""
    from data_pipelines.cli import shard

    shard(arguments)
