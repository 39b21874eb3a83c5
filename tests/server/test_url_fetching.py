"""Pictures given as URLs, with fetching switched on: real ones arrive, nothing inside is ever dialled."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from data_pipelines.fetch import FetchOptions
from server.app import create_app
from server.cli import fetch_options
from server.engine import BundleEngine
from server.settings import Settings
from vlp.testing import micro_bundle, picture

HOSTILE: list[str] = json.loads((Path(__file__).parents[1] / "data_pipelines" / "hostile_urls.json").read_bytes())


class Web(ThreadingHTTPServer):
    """Answers with a picture, slowly if asked; counts requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    def get_request(self) -> Any:
        """Every connection counts, also one that asks nothing."""
        found = super().get_request()
        self.seen.append("connected")
        return found


class Handler(BaseHTTPRequestHandler):
    """A picture for /a.png, 404 for /none, a page for /page, too much for /large, a way inside for /inside."""

    def do_GET(self) -> None:
        content = {"/a.png": picture(3), "/page": b"<html>", "/large": b"a" * 3_000_000}.get(self.path)
        self.send_response(302 if self.path == "/inside" else 404 if content is None else 200)
        if self.path == "/inside":
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def app_with(options: FetchOptions | None) -> Any:
    settings = Settings(fetch=options)
    return create_app(settings, BundleEngine(micro_bundle(), settings.limits))


def ask(client: httpx2.Client, *addresses: str) -> httpx2.Response:
    return client.post("/v1/embeddings", json={"input": [{"image": address} for address in addresses]})


def test_pictures_are_fetched_in_order(web: Web, serving: Any, b64: Any) -> None:
    base = f"http://127.0.0.1:{web.server_port}"
    options = fetch_options().model_copy(update={"allow_private": True, "max_bytes": 1_000_000})
    with serving(app_with(options)) as url, httpx2.Client(base_url=url, timeout=30) as client:
        mixed = ask(client, f"{base}/a.png", b64(picture(4)), f"{base}/a.png").json()["data"]
        alone = [ask(client, b64(picture(n))).json()["data"][0]["embedding"] for n in (3, 4)]
        assert [item["embedding"] for item in mixed] == [alone[0], alone[1], alone[0]]
        for path, code in (
            ("/none", "url_unreachable"), ("/page", "not_an_image"), ("/large", "url_too_large"),
            ("/inside", "url_unreachable"),
        ):  # fmt: skip
            answer = ask(client, b64(picture(4)), f"{base}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), path
            assert answer.json()["error"]["param"] == "input[1]"


def test_nothing_inside_is_dialled(web: Web, serving: Any) -> None:
    """250 addresses that lead inside or that two parsers may read differently: no connection reaches the canary."""
    assert len(HOSTILE) >= 150
    with serving(app_with(fetch_options())) as url, httpx2.Client(base_url=url, timeout=60) as client:
        for case in HOSTILE:
            answer = ask(client, case.replace("{p}", str(web.server_port)))
            assert answer.status_code == 400, case
            assert answer.json()["error"]["code"] not in ("internal_error", "timeout")
    assert web.seen == []


def test_inner_addresses_that_exist_and_that_do_not_read_the_same(web: Web, serving: Any) -> None:
    """Or the server would map its own network for whoever asks."""
    with serving(app_with(fetch_options())) as url, httpx2.Client(base_url=url, timeout=60) as client:
        answers = {
            ask(client, address).text
            for address in (f"http://127.0.0.1:{web.server_port}/a.png", "http://127.0.0.1:9999/", "http://10.1.2.3/")
        }
    assert len(answers) == 1


def test_it_is_off_by_default(web: Web, serving: Any) -> None:
    with serving(app_with(None)) as url, httpx2.Client(base_url=url, timeout=30) as client:
        answer = ask(client, f"http://127.0.0.1:{web.server_port}/a.png")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "url_not_allowed")
    assert web.seen == []
