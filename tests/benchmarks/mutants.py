"""Requests spoilt byte by byte and sent over raw sockets: what no client that speaks HTTP would ever send."""

import json
import random
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

TOKENS = (
    b"\r\n", b"\n\n", b"\0", b"%00", b"..%2f", b"\xff\xfe", b"\xed\xa0\x80", b"99999999999999999999", b"-1", b"1e999",
    b"NaN", b"null", b"{" * 500, b"[" * 3000, b'"' * 50, b"\\ud800", b"Transfer-Encoding: chunked\r\n", b"HTTP/9.9",
    b"Content-Length: 5\r\n", b"Content-Length: -7\r\n", b"Expect: 100-continue\r\n", b"Host: evil\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"7fffffffffffffff\r\n", b"data:image/png;base64,", b"a" * 9000,
    "\N{GREEK CAPITAL LETTER OMEGA}".encode() * 40,
)  # fmt: skip
PLACES: tuple[tuple[str, str, object], ...] = (
    ("POST", "/v1/embeddings", {"input": ["a red circle", {"image": "iVBORw0KGgo="}], "encoding_format": "base64"}),
    ("POST", "/v1/classify", {"image": "iVBORw0KGgo=", "labels": ["cat", "dog"], "templates": ["a {}"], "top_k": 1}),
    ("POST", "/v1/collections", {"name": "spoilt", "fields": {"n": "integer"}}),
    ("POST", "/v1/collections/spoilt/points", {"points": [{"id": 1, "text": "a", "payload": {"n": 1}}]}),
    ("POST", "/v1/collections/spoilt/search", {"text": "a", "filter": {"n": {"gte": 0}}, "limit": 3}),
    ("GET", "/v1/collections/spoilt/points?limit=3&after=0", None),
    ("DELETE", "/v1/collections/spoilt/points/1", None),
    ("POST", "/v2/embed", {"model": "m", "texts": ["a"], "input_type": "search_query", "embedding_types": ["float"]}),
    ("POST", "/embed", {"inputs": ["a", "b"], "truncate": True}),
    ("POST", "/knn-service", {"text": "a", "modality": "image", "num_images": 3, "indice_name": "spoilt"}),
    ("POST", "/zero-shot-image-classification", {"inputs": "iVBORw0KGgo=", "parameters": {"candidate_labels": ["a"]}}),
    ("GET", "/v1/models", None),
)
WAIT_SECONDS = 30


@dataclass
class Met:
    """What the requests met with."""

    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def request_of(method: str, path: str, body: object) -> bytes:
    """A right request."""
    content = b"" if body is None else json.dumps(body).encode()
    return b"%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        method.encode(), path.encode(), len(content), content,
    )  # fmt: skip


def spoilt(rng: random.Random) -> bytes:
    """A right request with a few bytes changed, lost, repeated or put in."""
    whole = bytearray(request_of(*rng.choice(PLACES)))
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(whole) + 1)
        match rng.randrange(4):
            case 0:
                whole[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del whole[at : at + rng.choice((1, 1, 4, 40))]
            case 2:
                whole[at:at] = whole[at : at + rng.choice((1, 10, 60))]
            case _:
                whole[at:at] = rng.choice(TOKENS)
    return bytes(whole)


def answer_to(port: int, request: bytes) -> bytes:
    """All that comes back until the server hangs up; nothing when it hangs up at once. Raises TimeoutError."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS) as raw, suppress(ConnectionError):
        raw.sendall(request)
        raw.shutdown(socket.SHUT_WR)
        while data := raw.recv(65536):
            received += data
    return received


def fault_of(received: bytes) -> str | None:
    """What is wrong with an answer; None when nothing is."""
    head, _, body = received.partition(b"\r\n\r\n")
    if not received:
        return None
    status = head[9:12]
    if not (head.startswith(b"HTTP/1.1 ") and status.isdigit()):
        return f"no HTTP: {received[:100]!r}"
    if status >= b"500":
        return f"status {status.decode()}: {body[:200]!r}"
    if status >= b"400" and b"content-type: application/json" in head.lower():
        try:
            json.loads(body)
        except ValueError:  # a second answer behind it, to a request that was two
            return None if b"HTTP/1.1 " in body else f"no JSON: {body[:200]!r}"
    return None


def send_mutants(port: int, number: int, seed: int = 0, clients: int = 4) -> Met:
    """So many spoilt requests, from several clients at the same time."""
    met = Met()

    def one(request: bytes) -> bytes:
        try:
            return answer_to(port, request)
        except OSError as error:
            return b"never answered: " + type(error).__name__.encode()

    rng = random.Random(seed)
    with ThreadPoolExecutor(clients) as pool:
        while met.sent < number:
            requests = [spoilt(rng) for _ in range(min(100, number - met.sent))]
            for request, received in zip(requests, pool.map(one, requests), strict=True):
                met.sent += 1
                met.statuses[received[9:12].decode("latin-1") or "hung up"] += 1
                if (fault := fault_of(received)) is not None:
                    met.failures.append(f"{fault} to {request[:300]!r}")
    return met
