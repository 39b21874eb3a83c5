"""Name servers that change their mind: fetches over HTTP while a resolver answers first this and then that.

The name resolution and the sockets of the fetcher are replaced in this process: one public address leads to a server
of ours that stands for the internet, and every connection to anywhere else is counted.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

import httpx2
import uvicorn

from data_pipelines import fetch
from server.app import create_app
from server.cli import fetch_options, listen
from server.connections import connection_class
from server.engine import BundleEngine
from server.settings import Settings
from vlp.testing import micro_bundle, picture

PUBLIC = "93.184.215.14"
"""An address that is neither private nor reserved; nothing is ever sent there."""
KINDS = (("public", "inside"), ("inside", "public"), ("both", "both"), ("public", "inside"))
"""What the first and the second question are answered with. The last kind is redirected to its own name."""
RIGHT = (200, 400, 400, 400)


class Outside(ThreadingHTTPServer):
    """The internet: a picture, or for /again the way to the same host once more."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        again = self.path == "/again"
        content = b"" if again else picture(3)
        self.send_response(302 if again else 200)
        if again:
            self.send_header("Location", f"http://{self.headers['Host']}/a.png")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silence."""


class Network:
    """In place of the module `socket` in the fetcher."""

    def __init__(self, outside: int) -> None:
        self.asked: Counter[str] = Counter()
        self.inside: list[Any] = []
        """Addresses dialled that lead anywhere but outside."""
        network = self

        class Socket(socket.socket):
            def connect(self, address: Any) -> None:
                if address[0] == PUBLIC:
                    super().connect(("127.0.0.1", outside))
                else:
                    network.inside.append(address)
                    raise ConnectionRefusedError

        self.socket = Socket

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        """Answers by the number in the name and by how often it was asked."""
        kind = KINDS[int(host.removeprefix("rebind").partition(".")[0]) % len(KINDS)]
        told = kind[min(self.asked[host], 1)]
        self.asked[host] += 1
        numbers = {"public": [PUBLIC], "inside": ["127.0.0.1"], "both": [PUBLIC, "127.0.0.1"]}[told]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in numbers]


@contextmanager
def serving_urls() -> Iterator[str]:
    """URL of a server in this process that fetches pictures."""
    settings = Settings(fetch=fetch_options())
    app = create_app(settings, BundleEngine(micro_bundle(), settings.limits))
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=connection_class(settings.limits), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


def rebind(number: int) -> tuple[int, int]:
    """(fetches answered as they should be, connections to the inside) of so many fetches, each of a name of its own."""
    outside = Outside()
    threading.Thread(target=outside.serve_forever, daemon=True).start()
    network = Network(outside.server_port)
    right = 0
    with closing(outside.socket), mock.patch.object(fetch, "socket", network), serving_urls() as url:
        with httpx2.Client(base_url=url, timeout=60) as client:
            for n in range(number):
                path = "again" if n % len(KINDS) == 3 else "a.png"
                asked = {"input": [{"image": f"http://rebind{n}.example/{path}"}]}
                right += client.post("/v1/embeddings", json=asked).status_code == RIGHT[n % len(KINDS)]
        outside.shutdown()
    fetch.close_idle()
    return right, len(network.inside)
