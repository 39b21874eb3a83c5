"""The app around the model: health, overload, limits, keys, errors, the OpenAPI document. With a fake engine."""

import contextlib
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.app import create_app
from server.engine import Engine
from server.settings import Batching, Key, Limits, Settings, hash_key
from server.testing import FakeEngine

GOLDEN = Path(__file__).parents[1] / "golden" / "openapi.json"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def as_engine(fake: FakeEngine) -> Engine:
    """Checked by mypy: the fake has the whole protocol."""
    return fake


def ask(url: str, text: Any = "a", **options: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/embeddings", json={"input": text}, timeout=30, **options)


def test_a_dead_worker_is_noticed(serving: Any, engine: FakeEngine) -> None:
    with serving(create_app(Settings(), as_engine(engine))) as url:
        assert httpx2.get(f"{url}/readyz").status_code == 200
        engine.mood = "ends"
        first = ask(url)
        assert (first.status_code, first.json()["error"]["code"]) == (503, "unavailable")
        ready = httpx2.get(f"{url}/readyz")
        assert ready.status_code == 503
        assert "model worker has stopped" in ready.json()["reason"]
        assert httpx2.get(f"{url}/healthz").status_code == 200
        assert ask(url).status_code == 503


@pytest.mark.parametrize(("mood", "reason"), [("fails", "does not answer"), ("nan", "does not answer")])
def test_a_failing_model_is_not_ready(mood: str, reason: str, serving: Any, engine: FakeEngine) -> None:
    with serving(create_app(Settings(), as_engine(engine))) as url:
        engine.mood = mood
        time.sleep(1.1)  # a good answer is believed for a second
        ready = httpx2.get(f"{url}/readyz")
        assert ready.status_code == 503
        assert reason in ready.json()["reason"]
        engine.mood = "well"
        assert httpx2.get(f"{url}/readyz").status_code == 200


def test_a_failure_inside_tells_the_log_and_not_the_client(
    serving: Any, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(create_app(Settings(), as_engine(engine))) as url:
        engine.mood = "fails"
        answer = ask(url, headers={"X-Request-Id": "my-id.1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "my-id.1")
    assert answer.json()["error"]["type"] == "server_error"
    assert "my-id.1" in answer.json()["message"]
    assert not any(word in answer.text for word in ("secret", "path", "Traceback", "RuntimeError"))
    assert "secret words" in caplog.text


def test_a_forged_request_id_is_replaced(serving: Any, engine: FakeEngine) -> None:
    with serving(create_app(Settings(), as_engine(engine))) as url:
        answer = httpx2.get(f"{url}/healthz", headers={"X-Request-Id": "a b\tERROR"})
    assert len(answer.headers["x-request-id"]) == 32
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_overload_is_refused_quickly_and_says_when_to_come_back(serving: Any, engine: FakeEngine) -> None:
    settings = Settings(limits=Limits(texts=4, images=1), batching=Batching(size=2, queue_texts=8, queue_images=1))
    with serving(create_app(settings, as_engine(engine))) as url, ThreadPoolExecutor(8) as pool:
        engine.gate.clear()
        accepted = [pool.submit(ask, url, [f"{n} {i}" for i in range(4)]) for n in range(2)]
        deadline = time.monotonic() + 10
        while httpx2.get(f"{url}/readyz").json().get("reason") != "the queue is full":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        began = time.monotonic()
        refused = ask(url)
        seconds = time.monotonic() - began
        engine.gate.set()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        assert seconds < 0.5  # 0.05 on an idle machine
        assert [answer.result().status_code for answer in accepted] == [200, 200]
        assert ask(url).status_code == 200


def test_pictures_are_refused_unread_when_there_is_no_room(serving: Any, engine: FakeEngine) -> None:
    """The head alone is answered, at once; what the client sends after it does not break the answer."""
    settings = Settings(limits=Limits(images=1), batching=Batching(queue_images=1))
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500000\r\n\r\n"
    with serving(create_app(settings, as_engine(engine))) as url, ThreadPoolExecutor(1) as pool:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        engine.gate.clear()
        accepted = pool.submit(ask, url, {"image": "AAAA"})
        while httpx2.get(f"{url}/readyz").json().get("reason") != "the queue is full":
            time.sleep(0.02)
        with socket.create_connection(address, timeout=10) as raw:
            began = time.monotonic()
            raw.sendall(head)
            refusal = raw.recv(65536)
            assert time.monotonic() - began < 0.5  # 0.03 on an idle machine
            assert refusal.startswith(b"HTTP/1.1 429")
            assert b"\r\nretry-after: 1\r\n" in refusal
            assert refusal.endswith(b"}"), "the whole answer comes before the body"
            raw.sendall(b"a" * 500_000)
            assert raw.recv(100) == b""
        with socket.create_connection(address, timeout=10) as raw:  # a body that is there already is read
            raw.sendall(head.replace(b"500000", b"20000") + b"a" * 20_000)
            refusal = raw.recv(65536)
            assert refusal.startswith(b"HTTP/1.1 429")
            assert b"connection: close" not in refusal.lower()
            raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        engine.gate.set()
        assert accepted.result().status_code == 200


def test_too_many_requests_at_once_are_refused_but_health_is_not(serving: Any, engine: FakeEngine) -> None:
    with (
        serving(create_app(Settings(limits=Limits(requests=1)), as_engine(engine))) as url,
        ThreadPoolExecutor(1) as pool,
    ):
        engine.gate.clear()
        running = pool.submit(ask, url)
        deadline = time.monotonic() + 10
        while (refused := httpx2.get(f"{url}/v1/models")).status_code == 200:
            assert time.monotonic() < deadline
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert httpx2.get(f"{url}/healthz").status_code == 200
        engine.gate.set()
        assert running.result().status_code == 200


def test_a_slow_model_times_out_with_an_answer(serving: Any, engine: FakeEngine) -> None:
    with serving(create_app(Settings(limits=Limits(request_seconds=0.2)), as_engine(engine))) as url:
        engine.gate.clear()
        answer = ask(url)
        engine.gate.set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
    assert "retry-after" in answer.headers


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
@pytest.mark.parametrize("length", [1001, 3_000_000])
def test_a_long_body_gets_413(chunked: bool, length: int, serving: Any, engine: FakeEngine) -> None:
    body = b'{"input": "' + b"a" * (length - 13) + b'"}'
    with serving(create_app(Settings(limits=Limits(body_bytes=1000)), as_engine(engine))) as url:
        content: Any = iter([body[at : at + 500] for at in range(0, len(body), 500)]) if chunked else body
        if length == 1001:
            answer = httpx2.post(f"{url}/v1/embeddings", content=content, timeout=30)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        else:  # far too long: the connection may break before the client has read the answer
            with contextlib.suppress(httpx2.TransportError):
                assert httpx2.post(f"{url}/v1/embeddings", content=content, timeout=30).status_code == 413
        assert ask(url).status_code == 200


def test_an_endless_body_is_read_no_further_than_the_limit(serving: Any, engine: FakeEngine) -> None:
    limit = 1_000_000
    with serving(create_app(Settings(limits=Limits(body_bytes=limit)), as_engine(engine))) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            raw.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n\r\n")
            sent = 0
            try:
                while sent < 100_000_000:
                    sent += raw.send(b"a" * 65536)
            except (ConnectionError, TimeoutError):
                pass
    assert sent < limit + 20_000_000, "the server kept reading"  # what the kernel buffers between the two is not ours


def test_a_body_that_never_ends_gets_408(serving: Any, engine: FakeEngine) -> None:
    with serving(create_app(Settings(limits=Limits(read_seconds=0.3)), as_engine(engine))) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as raw:
            raw.sendall(b'POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"inp')
            assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        assert ask(url).status_code == 200


def test_nan_and_infinity_become_null(serving: Any, engine: FakeEngine) -> None:
    with serving(create_app(Settings(), as_engine(engine))) as url:
        classified = httpx2.post(f"{url}/v1/classify", json={"image": "aGk=", "labels": ["a"]})
        engine.mood = "nan"
        assert ask(url, "not the label, which is kept").json()["data"][0]["embedding"] == [None] * 4
    assert classified.json()["data"][0]["predictions"] == [{"label": "a", "probability": None, "cosine": None}]


def test_what_a_decoder_says_stays_inside(serving: Any, engine: FakeEngine) -> None:
    with serving(create_app(Settings(), as_engine(engine))) as url:
        answer = httpx2.post(f"{url}/v1/embeddings", json={"input": [{"image": "YmFkCg=="}]})
    assert answer.status_code == 400
    assert "leak" not in answer.text


KEYED = Settings(keys=tuple(Key(name=name, sha256=hash_key(name), scope="admin") for name in ("first", "second")))


@pytest.mark.parametrize(
    "route", ["/v1/embeddings", "/embeddings", "/v1/classify", "/v1/search", "/v1/models", "/models/fake"]
)
def test_every_route_asks_for_a_key(route: str, serving: Any, engine: FakeEngine) -> None:
    method = "GET" if "models" in route else "POST"
    with serving(create_app(KEYED, as_engine(engine))) as url:
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic first"},
            {"Authorization": "first"},
        ):
            answer = httpx2.request(method, f"{url}{route}", headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("first", "second"):
            assert (
                httpx2.request(method, f"{url}{route}", headers={"Authorization": f"Bearer {key}"}).status_code != 401
            )
        assert httpx2.get(f"{url}/readyz").status_code == 200


def test_unknown_paths_and_methods_have_the_same_shape(serving: Any, engine: FakeEngine) -> None:
    with serving(create_app(Settings(docs=False), as_engine(engine))) as url:
        for answer, status in (
            (httpx2.get(f"{url}/nothing"), 404),
            (httpx2.get(f"{url}/docs"), 404),
            (httpx2.get(f"{url}/v1/embeddings"), 405),
        ):
            assert answer.status_code == status
            assert set(answer.json()) == {"error", "message", "detail"}


def test_openapi_document_is_the_committed_one(engine: FakeEngine) -> None:
    """A change of the interface shows up in review. Accept it with: VLP_ACCEPT=1 pytest tests/server/test_app.py."""
    document = create_app(Settings(), as_engine(engine)).openapi()
    assert "EmbeddingsRequest" in document["components"]["schemas"]
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    if os.environ.get("VLP_ACCEPT"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert json.loads(GOLDEN.read_text()) == document


def test_every_reference_in_the_openapi_document_resolves(engine: FakeEngine) -> None:
    document = create_app(Settings(), as_engine(engine)).openapi()
    text = json.dumps(document)
    names = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= set(document["components"]["schemas"])
    assert "$defs" not in text
