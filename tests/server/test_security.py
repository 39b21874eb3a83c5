"""Keys, scopes, rates, Host, CORS, headers, logs and the audit log: over every route of the document."""

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.app import create_app
from server.audit import verify
from server.auth import identify
from server.browsers import accepted_hosts, host_name
from server.keys import add_key, read_file, read_keys, remove_key
from server.logs import JsonLines, OneLine
from server.settings import Key, Rate, Settings, hash_key
from server.testing import FakeEngine

NAMES = ("read", "write", "admin")
KEYS = tuple(Key(name=f"the-{name}", sha256=hash_key(f"key-{name}"), scope=name) for name in NAMES)
OPEN = {"/healthz", "/readyz", "/health", "/livez", "/ping", "/readiness", "/v1/health/live", "/v1/health/ready"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings(), FakeEngine()).openapi()


@pytest.fixture
def keyed(serving: Any, tmp_path: Path) -> Iterator[str]:
    settings = Settings(keys=KEYS, audit=tmp_path / "audit.jsonl")
    with serving(create_app(settings, FakeEngine())) as url:
        yield url


def routes(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (method.upper(), re.sub(r"\{[^}]*\}", "x", path))
        for path, methods in document["paths"].items()
        for method in methods
    ]


def raw(url: str, request: str) -> int:
    """Status of a request whose every byte is given."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(request.encode("latin-1"))
        return int(connection.recv(4096).split()[1])


def test_every_route_needs_a_key(keyed: str, document: dict[str, Any]) -> None:
    found = [route for route in routes(document) if route[1] not in OPEN]
    assert len(found) > 15
    with httpx2.Client(base_url=keyed, timeout=30) as client:
        for method, path in found:
            for headers in ({}, bearer("key-reax"), {"Authorization": "Basic key-read"}, {"Authorization": "key-read"}):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path, headers)
                assert answer.headers["www-authenticate"] == "Bearer"
            assert client.request(method, path, headers=bearer("key-admin")).status_code != 401


def test_writing_needs_more_than_reading(keyed: str, document: dict[str, Any]) -> None:
    """What a read key may not do, a write key may, or an admin key; 403 comes before the body is looked at."""
    forbidden: dict[str, list[str]] = {name: [] for name in NAMES}
    with httpx2.Client(base_url=keyed, timeout=30) as client:
        for method, path in routes(document):
            for name in NAMES:
                if client.request(method, path, headers=bearer(f"key-{name}")).status_code == 403:
                    forbidden[name].append(f"{method} {path}")
    assert forbidden["admin"] == []
    assert "POST /v1/models/x/reload" in forbidden["write"]
    assert set(forbidden["write"]) < set(forbidden["read"])
    changing = {f"{method} {path}" for method, path in routes(document) if method in ("PUT", "DELETE", "PATCH")}
    assert changing <= set(forbidden["read"]), "a read key may change something"


def test_spellings_of_a_path_open_nothing(keyed: str) -> None:
    """CVE-2026-48710 is about keys that are tested against a path which the Host header can bend."""
    for path in (
        "//v1/models", "/v1//models", "/v1/models/", "/./v1/models", "/healthz/../v1/models", "/%76%31/models",
        "/v1/models%2f", "/v1%2fmodels", "/healthz%2f..%2fv1/models", "/V1/models", "/v1/models;x",
        "/v1/models?x=/healthz",
    ):  # fmt: skip
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            for host in ("localhost", "localhost/healthz?", "localhost:1/healthz#", "127.0.0.1@localhost"):
                status = raw(keyed, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n")
                assert status in (307, 400, 401, 404, 405), (method, path, host, status)


def test_a_key_is_compared_without_telling_which(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(given: str, known: str) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr("server.auth.hmac.compare_digest", compare)
    assert identify(KEYS, "Bearer key-read") is KEYS[0]
    assert compared == [key.sha256 for key in KEYS]


def test_rates_are_per_key_and_one_does_not_take_anothers(serving: Any) -> None:
    keys = (
        Key(name="busy", sha256=hash_key("busy"), rate=Rate(per_second=0.01, burst=3)),
        Key(name="other", sha256=hash_key("other")),
    )
    with serving(create_app(Settings(keys=keys), FakeEngine())) as url:
        statuses = [httpx2.get(f"{url}/v1/models", headers=bearer("busy")).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        refused = httpx2.get(f"{url}/v1/models", headers=bearer("busy"))
        assert refused.json()["error"]["code"] == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 100
        assert [httpx2.get(f"{url}/v1/models", headers=bearer("other")).status_code for _ in range(20)] == [200] * 20


def test_without_keys_rates_are_per_address(serving: Any) -> None:
    with serving(create_app(Settings(rate=Rate(per_second=0.01, burst=2)), FakeEngine())) as url:
        assert [httpx2.get(f"{url}/v1/models").status_code for _ in range(3)] == [200, 200, 429]
        assert httpx2.get(f"{url}/healthz").status_code == 200


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"), ("LOCALHOST:8000", "localhost"), ("127.0.0.1:1", "127.0.0.1"), ("[::1]:80", "::1"),
        ("[::1]", "::1"), ("evil.example", "evil.example"), ("localhost.", "localhost"),
        ("localhost:80:80", "localhost:80"), ("", ""), ("localhost:", "localhost:"), ("a@localhost", "a@localhost"),
    ],
)  # fmt: skip
def test_host_names(header: str, name: str) -> None:
    assert host_name(header) == name


def test_only_this_machines_names_are_answered_on_loopback(serving: Any) -> None:
    """A page of evil.example that a rebinding resolver points here does not become our own origin."""
    with serving(create_app(Settings(), FakeEngine())) as url:
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            assert raw(url, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n") == 400
        for host in ("localhost", "127.0.0.1:99", "[::1]:8000"):
            assert raw(url, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n") == 200
    assert accepted_hosts(Settings(host="0.0.0.0")) is None
    assert accepted_hosts(Settings(host="0.0.0.0", hosts=("api.example",))) == frozenset({"api.example"})
    assert accepted_hosts(Settings(hosts=("*",))) is None


def test_pages_of_other_origins_may_not_ask_unless_listed(serving: Any) -> None:
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with serving(create_app(Settings(keys=KEYS), FakeEngine())) as url:
        for answer in (
            httpx2.options(f"{url}/v1/embeddings", headers=headers),
            httpx2.get(f"{url}/healthz", headers=headers),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control")]
    settings = Settings(keys=KEYS, cors_origins=("https://page.example",))
    with serving(create_app(settings, FakeEngine())) as url:
        preflight = httpx2.options(f"{url}/v1/embeddings", headers=headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        assert "access-control-allow-credentials" not in preflight.headers
        other = httpx2.options(f"{url}/v1/embeddings", headers={**headers, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        for more, status in (({}, 401), ({"Host": "other.example"}, 400)):  # refused by a route, and before all routes
            refused = httpx2.get(f"{url}/v1/models", headers={**headers, **more})
            assert refused.status_code == status
            assert refused.headers["access-control-allow-origin"] == "https://page.example"


def test_every_answer_has_the_security_headers(keyed: str) -> None:
    for path in ("/healthz", "/v1/models", "/nothing", "/docs", "/metrics"):
        headers = httpx2.get(f"{keyed}{path}").headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers or headers["server"] == "uvicorn"


def test_logs_and_metrics_hold_nothing_of_a_payload(
    serving: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Canaries in every place a client can write to; none comes out anywhere but in the answer to itself."""
    caplog.set_level(logging.DEBUG)
    settings = Settings(keys=KEYS)
    with serving(create_app(settings, FakeEngine())) as url, httpx2.Client(base_url=url) as client:
        for number in range(50):
            canary = f"canary{number}"
            body = {"input": [canary, {"image": f"{canary}!"}, {"image": "YmFk"}], "model": canary, "user": canary}
            for path in ("/v1/embeddings", f"/{canary}", f"/v1/models/{canary}", f"/v1/classify?q={canary}"):
                for headers in (bearer("key-read"), bearer(canary)):
                    httpx2.post(
                        f"{url}{path}",
                        json=body,
                        headers={**headers, "User-Agent": canary, "X-Request-Id": f"a {canary}"},
                    )
        metrics = client.get("/metrics", headers=bearer("key-read")).text
    written = "\n".join(
        formatter.format(record)
        for formatter in (JsonLines(), OneLine())
        for record in caplog.records
        if not record.name.startswith(("httpx", "httpcore", "asyncio"))
    )
    assert len(written) > 1000
    for text in (written, metrics, *capfd.readouterr()):
        assert "canary" not in text
        assert "key-read" not in text


def test_no_client_begins_a_log_line_of_its_own() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\nERROR forged\r\x1b[2J\u2028", (), None)
    assert "\n" not in OneLine().format(record)
    assert "\x1b" not in OneLine().format(record)
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"].startswith("a\nERROR")


def test_a_log_line_is_json_with_the_requests_fields(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.requests")
    with serving(create_app(Settings(keys=KEYS), FakeEngine())) as url:
        httpx2.post(
            f"{url}/v1/embeddings", json={"input": "a"}, headers={**bearer("key-read"), "X-Request-Id": "my-id"}
        )
    (record,) = [record for record in caplog.records if record.name == "server.requests"]
    content = json.loads(JsonLines().format(record))
    assert content["ms"] > 0
    wanted = {"request": "my-id", "method": "POST", "route": "/v1/embeddings", "status": 200, "client": "the-read"}
    assert content.items() >= {**wanted, "model": "fake", "level": "info"}.items()


def test_what_changes_something_leaves_a_line_before_its_answer(keyed: str, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    httpx2.post(f"{keyed}/v1/embeddings", json={"input": "a"}, headers=bearer("key-admin"))
    assert not log.exists(), "reading is not audited"
    statuses = [
        httpx2.post(f"{keyed}/v1/models/fake/reload", headers=headers).status_code
        for headers in (bearer("key-admin"), bearer("key-read"), {})
    ]
    assert statuses == [409, 403, 401]
    assert verify(log) == 3
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["client"], line["status"]) for line in lines] == [("the-admin", 409), ("the-read", 403), ("-", 401)]
    assert lines[0]["route"] == "/v1/models/{model}/reload"
    assert lines[0]["target"] == {"model": "fake"}


def test_the_key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    value = add_key(path, "web", "read", Rate(per_second=5))
    add_key(path, "ops", "admin", None)
    assert len(value) > 40
    assert value not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [(key.name, key.scope) for key in read_file(path)] == [("web", "read"), ("ops", "admin")]
    assert read_file(path)[0].sha256 == hash_key(value)
    with pytest.raises(Exception, match="choose another name"):
        add_key(path, "web", "read", None)
    remove_key(path, "web")
    with pytest.raises(Exception, match="no key named"):
        remove_key(path, "web")
    monkeypatch.setenv("VLP_API_KEYS", "a, b,")
    assert [key.name for key in read_keys(path)] == ["environment-1", "environment-2", "ops"]
    for wrong in ('[{"name": "x"}]', "{", '[{"name": "a b", "sha256": "0"}]'):
        path.write_text(wrong)
        with pytest.raises(Exception, match="--keys"):
            read_file(path)


def test_guessing_keys_does_not_hold_the_server(keyed: str) -> None:
    began = time.monotonic()
    with httpx2.Client(base_url=keyed, timeout=30) as client:
        assert {client.get("/v1/models", headers=bearer(f"guess{n}")).status_code for n in range(100)} == {401}
        assert time.monotonic() - began < 20
        assert client.get("/v1/models", headers=bearer("key-read")).status_code == 200
