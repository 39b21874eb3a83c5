"""The fetcher against real sockets on the loopback: what it must not reach, and what it must survive."""

import gzip
import itertools
import json
import os
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import trustme

from data_pipelines import fetch, urls
from data_pipelines.errors import BadSample
from data_pipelines.fetch import FetchOptions, read_bytes
from data_pipelines.testing import Handler, Web

LOCAL = FetchOptions(allow_private=True, retries=0, timeout=2, total_timeout=4)


def reason(location: str | Path, options: FetchOptions = LOCAL) -> str:
    with pytest.raises(BadSample) as caught:
        read_bytes(location, options)
    return caught.value.reason


DIALLED: list[Any] = []
"""Addresses that any code of this process tried to connect to."""


@pytest.fixture(scope="module")
def dialled() -> list[Any]:
    """Every connection attempt of the process, whoever makes it and wherever it goes."""
    sys.addaudithook(lambda event, args: DIALLED.append(args[1]) if event == "socket.connect" else None)
    return DIALLED


HOSTILE: list[str] = json.loads(Path(__file__).with_name("hostile_urls.json").read_bytes())
"""Addresses that lead inside, or that two parsers may read differently; {p} is the canary's port."""
REFUSED = {"private_address", "bad_url", "bad_scheme", "bad_port", "dns"}


def test_options_cannot_smuggle_headers() -> None:
    for agent in ("", "a\r\nX: y", "a\n", " a", "ä"):
        with pytest.raises(ValueError, match="user_agent"):
            FetchOptions(user_agent=agent)


def test_no_hostile_address_is_dialled(web: Web, dialled: list[Any]) -> None:
    """Every case is refused with a name, nothing is connected to: not the canary, nor anything else."""
    assert len(HOSTILE) >= 250
    web.routes = {"/": lambda handler: handler.answer(b"secret"), "/x.png": lambda handler: handler.answer(b"secret")}
    with socket.create_connection(("127.0.0.1", web.server_port)):
        assert dialled[-1] == ("127.0.0.1", web.server_port)  # the hook sees connections
    del dialled[:]
    seen: Counter[str] = Counter()
    for case in HOSTILE:
        url = case.replace("{p}", str(web.server_port))
        with pytest.raises(BadSample) as caught:
            read_bytes(url, FetchOptions(retries=0, timeout=2))
        seen[caught.value.reason] += 1
        assert dialled == [], url
    assert set(seen) <= REFUSED, seen
    assert min(seen["private_address"], seen["bad_url"], seen["bad_scheme"]) > 30, seen
    assert seen["bad_port"] >= 4
    assert web.asked == []


def test_the_canary_sings_for_the_same_addresses_when_they_are_allowed(web: Web) -> None:
    """The table above is refused by the check and not by some accident."""
    web.routes["/x.png"] = lambda handler: handler.answer(b"picture")
    for host in ("127.0.0.1", "localhost"):
        assert read_bytes(f"http://{host}:{web.server_port}/x.png", LOCAL) == b"picture"


@pytest.mark.parametrize("redirects", [1, 2, 3])
@pytest.mark.parametrize(
    "place", ["http://127.0.0.2:{p}/secret", "//127.0.0.2:{p}/secret", "http://[::ffff:7f00:1]:{p}/"]
)
def test_redirects_into_the_own_network(web: Web, monkeypatch: pytest.MonkeyPatch, redirects: int, place: str) -> None:
    """The first address counts as public here; the last hop must be refused before it is dialled."""
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    hops = [f"/hop{n}" for n in range(redirects)] + [place.format(p=web.server_port)]
    for here, there in itertools.pairwise(hops):
        web.routes[here] = lambda handler, there=there: handler.answer(b"", 302, Location=there)  # type: ignore[misc]
    web.routes["/secret"] = lambda handler: handler.answer(b"secret")
    assert reason(f"{web.url}/hop0", FetchOptions(retries=0)) == "private_address"
    assert web.asked == hops[:-1]


def test_a_redirect_chain_has_an_end_and_keeps_to_the_web(web: Web) -> None:
    for n in range(5):
        web.routes[f"/{n}"] = lambda handler, n=n: handler.answer(b"", 301 + n % 2, Location=f"{n + 1}?q=Ã¼")  # type: ignore[misc]
    web.routes["/4"] = lambda handler: handler.answer(b"there")
    assert read_bytes(f"{web.url}/1", LOCAL) == b"there"
    assert web.asked[-1] == "/4?q=%C3%BC"
    assert reason(f"{web.url}/0") == "too_many_redirects"
    web.routes["/loop"] = lambda handler: handler.answer(b"", 308, Location="loop")
    assert reason(f"{web.url}/loop") == "too_many_redirects"
    assert web.asked[-4:] == ["/loop"] * 4
    for place, why in {
        "file:///etc/passwd": "bad_scheme",
        "ftp://h/x": "bad_scheme",
        "http://[": "bad_url",
        "//a@b/": "bad_url",
    }.items():
        web.routes["/out"] = lambda handler, place=place: handler.answer(b"", 307, Location=place)  # type: ignore[misc]
        assert reason(f"{web.url}/out") == why
    web.routes["/out"] = lambda handler: handler.answer(b"", 302)
    assert reason(f"{web.url}/out") == "http_302"


def test_a_rebinding_resolver_gets_no_second_question(
    web: Web, monkeypatch: pytest.MonkeyPatch, dialled: list[Any]
) -> None:
    """Public at the first question, the canary at the second: only one question is asked, and its answer is dialled."""
    asked = 0

    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        nonlocal asked
        asked += 1
        number = "192.0.2.1" if asked % 2 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "192.0.2.1")
    del dialled[:]
    options = FetchOptions(retries=0, timeout=0.001)
    for n in range(1, 1001):
        assert reason(f"http://rebind{n}.example:{web.server_port}/", options) in (
            "timeout",
            "connection",
            "private_address",
        )
        assert asked == n
    assert {address[0] for address in dialled} == {"192.0.2.1"}
    assert web.asked == []


def test_a_resolver_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [socket.EAI_AGAIN, socket.EAI_AGAIN, socket.EAI_NONAME]

    def resolve(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(answers.pop(0), "no")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    options = FetchOptions(retries=3, backoff=0.001)
    assert reason("http://busy.example/", options) == "dns"
    assert answers == []


def test_one_private_answer_spoils_them_all(web: Web, monkeypatch: pytest.MonkeyPatch, dialled: list[Any]) -> None:
    numbers = ("8.8.8.8", "127.0.0.1")
    monkeypatch.setattr(
        socket, "getaddrinfo",
        lambda host, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in numbers],
    )  # fmt: skip
    del dialled[:]
    assert reason(f"http://mixed.example:{web.server_port}/", FetchOptions()) == "private_address"
    assert dialled == []


def test_proxies_and_netrc_of_the_environment_are_ignored(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, web.url)
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    web.routes["/p"] = lambda handler: handler.answer(b"direct")
    assert read_bytes(f"{web.url}/p", LOCAL) == b"direct"
    assert web.asked == ["/p"]
    assert set(web.headers[0]) == {"Host", "User-Agent", "Accept", "Accept-Encoding"}
    assert web.headers[0]["Accept-Encoding"] == "identity"
    assert web.headers[0]["Host"] == f"127.0.0.1:{web.server_port}"


def test_statuses_have_names(web: Web) -> None:
    for status in (201, 204, 403, 404, 410, 500):
        web.routes["/s"] = lambda handler, status=status: handler.answer(b"", status)  # type: ignore[misc]
        assert reason(f"{web.url}/s") == f"http_{status}"


def test_paths_are_quoted_once(web: Web) -> None:
    web.routes["/a%20b/%C3%BC%20c.png"] = lambda handler: handler.answer(b"here")
    assert read_bytes(f"{web.url}/a%20b/ü c.png?x=1&y=%20ä#part", LOCAL) == b"here"
    assert web.asked == ["/a%20b/%C3%BC%20c.png?x=1&y=%20%C3%A4"]


def test_an_honest_length_over_the_limit_is_not_read(web: Web) -> None:
    options = LOCAL.model_copy(update={"max_bytes": 1000})
    web.routes["/ok"] = lambda handler: handler.answer(bytes(1000))
    assert len(read_bytes(f"{web.url}/ok", options)) == 1000
    web.routes["/big"] = lambda handler: handler.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    assert reason(f"{web.url}/big", options) == "too_big"


@pytest.mark.parametrize(
    "head", [b"", b"Content-Length: -5\r\n", b"Content-Length: x\r\n", b"Transfer-Encoding: chunked\r\n"]
)
def test_an_endless_body_is_cut_at_the_limit(web: Web, head: bytes) -> None:
    sent = 0

    def endless(handler: Handler) -> None:
        nonlocal sent
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        block = b"%x\r\n" % 65536 + bytes(65536) + b"\r\n"
        while sent < 1 << 30:
            handler.wfile.write(block if b"chunked" in head else block[:65536])
            sent += 65536

    web.routes["/"] = endless
    assert reason(f"{web.url}/", LOCAL.model_copy(update={"max_bytes": 1 << 20})) == "too_big"
    assert sent < 32 << 20  # the limit, and what the kernel's buffers hold


BROKEN = {
    b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort": "incomplete",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort": "incomplete",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nshort": "incomplete",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nshort": "incomplete",
    b"": "connection",
    b"SSH-2.0-OpenSSH_9\r\n": "bad_response",
    b"HTTP/1.1 2000 OK\r\n\r\n": "bad_response",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n": "bad_response",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n": "bad_response",
    b"HTTP/9.9 200 OK\r\n\r\n": "bad_response",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(1 << 20)): "content_encoding",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: br, gzip\r\n\r\n": "content_encoding",
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_broken_answers_have_names(web: Web, number: int) -> None:
    content, why = list(BROKEN.items())[number]
    web.routes["/"] = lambda handler: handler.raw(content)
    assert reason(f"{web.url}/") == why


def test_a_length_that_lies_low_leaves_nothing_for_the_next(web: Web) -> None:
    lie = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    web.routes["/lie"] = lambda handler: handler.wfile.write(lie)
    web.routes["/next"] = lambda handler: handler.answer(b"good")
    assert read_bytes(f"{web.url}/lie", LOCAL) == b"abc"
    assert read_bytes(f"{web.url}/next", LOCAL) == b"good"


@pytest.mark.parametrize("opening", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"])
def test_a_slow_drip_ends_in_time(web: Web, opening: bytes) -> None:
    """Each byte arrives well before the time-out of one wait, so only the total can end it."""
    hung_up = threading.Event()

    def drip(handler: Handler) -> None:
        handler.wfile.write(opening)
        try:
            for _ in range(2000):
                handler.wfile.write(b"H")
                time.sleep(0.02)
        except OSError:
            hung_up.set()

    web.routes["/"] = drip
    options = FetchOptions(allow_private=True, timeout=5, total_timeout=0.4, retries=5, backoff=0.1)
    assert reason(f"{web.url}/", options) == "timeout"
    assert hung_up.wait(10)
    assert web.asked == ["/"]  # no time is left for a retry


def test_silence_times_out(web: Web) -> None:
    quiet = threading.Event()
    web.routes["/"] = lambda handler: quiet.wait(10)
    assert reason(f"{web.url}/", LOCAL.model_copy(update={"timeout": 0.1})) == "timeout"
    quiet.set()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert reason(f"http://127.0.0.1:{port}/") == "connection"


def test_what_may_pass_is_tried_again_and_what_may_not_is_not(web: Web) -> None:
    options = LOCAL.model_copy(update={"retries": 2, "backoff": 0.001})

    def moody(handler: Handler) -> None:
        handler.answer(b"at last") if len(web.asked) == 3 else handler.answer(b"", (503, 429)[len(web.asked) - 1])

    web.routes["/"] = moody
    assert read_bytes(f"{web.url}/", options) == b"at last"
    assert reason(f"{web.url}/gone", options) == "http_404"
    web.routes["/down"] = lambda handler: handler.answer(b"", 500)
    assert reason(f"{web.url}/down", options) == "http_500"
    assert web.asked == ["/"] * 3 + ["/gone"] + ["/down"] * 3


@pytest.mark.parametrize(
    ("tag", "refused"),
    [
        ("noai", True), ("noimageai", True), ("NoIndex", True), ("nofollow, noimageindex", True), ("nofollow", False),
        ("noarchive, max-snippet:0", False), ("googlebot: noai", False), ("vlp-shard: noai", True),
        ("*: noindex", True), ("VLP-Shard: nofollow, noai", True), ("googlebot: noai, vlp-shard: noindex", True),
        ("noai, googlebot: all", True), ("unavailable_after: 25 Jun 2010 15:00:00 PST, noai", True),
        ("googlebot: nofollow, noindex", False), ("", False),
    ],
)  # fmt: skip
def test_pictures_that_opted_out_are_left_alone(web: Web, tag: str, refused: bool) -> None:
    web.routes["/"] = lambda handler: handler.answer(b"picture", X_Robots_Tag=tag)
    if refused:
        assert reason(f"{web.url}/") == "opted_out"
    ignoring = LOCAL.model_copy(update={"disallowed_header_directives": ()})
    assert read_bytes(f"{web.url}/", ignoring if refused else LOCAL) == b"picture"


def test_connections_are_used_again_by_many_threads(web: Web) -> None:
    for n in range(200):
        web.routes[f"/{n}"] = lambda handler, n=n: handler.answer(b"%d" % n)  # type: ignore[misc]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: read_bytes(f"{web.url}/{n}", LOCAL), range(200)))
    assert found == [b"%d" % n for n in range(200)]
    assert web.connects <= 8


def test_a_kept_connection_that_the_server_closed_is_replaced(web: Web) -> None:
    web.routes["/"] = lambda handler: handler.answer(b"x")

    def quits(handler: Handler) -> None:
        handler.answer(b"y")
        handler.close_connection = True  # without saying so

    web.routes["/quits"] = quits
    for path in ("/quits", "/", "/quits", "/quits", "/"):
        assert read_bytes(web.url + path, LOCAL) in (b"x", b"y")


def test_certificates_are_checked_for_the_name(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    web.routes["/"] = lambda handler: handler.answer(b"safe")
    fetch._tls.cache_clear()
    assert reason(f"https://localhost:{web.server_port}/") == "tls"
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    fetch._tls.cache_clear()
    try:
        for _ in range(3):
            assert read_bytes(f"https://localhost:{web.server_port}/", LOCAL) == b"safe"
        assert reason(f"https://127.0.0.1:{web.server_port}/") == "tls"
    finally:
        fetch._tls.cache_clear()
    assert names[:2] == ["localhost", "localhost"]
    assert web.headers[0]["Host"] == f"localhost:{web.server_port}"


def test_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"content")
    assert read_bytes(path, LOCAL) == b"content"
    assert read_bytes(b"itself", LOCAL) == b"itself"
    assert reason(path, LOCAL.model_copy(update={"max_bytes": 6})) == "too_big"
    os.mkfifo(tmp_path / "pipe")
    for name in ("gone", "pipe", ".", "nul\0"):
        assert reason(tmp_path / name) == "unreadable"
    assert reason(Path("/dev/zero")) == "unreadable"


def test_object_stores() -> None:
    with fsspec.open("memory://fetch-test/a.png", "wb") as stream:
        stream.write(b"picture")
    assert read_bytes("memory://fetch-test/a.png", LOCAL) == b"picture"
    assert reason("memory://fetch-test/none.png") == "unreadable"
    assert reason("memory://fetch-test/a.png", LOCAL.model_copy(update={"max_bytes": 3})) == "too_big"
    assert reason("memory://fetch-test/a.png", FetchOptions(schemes=urls.WEB)) == "bad_scheme"
