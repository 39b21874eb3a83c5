"""Published weaknesses of what the server stands on, one test each, named by id: none of them may come back here."""

import io
import socket
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import httpx2
import pytest
from packaging.version import Version
from PIL import Image

from server.app import create_app
from server.engine import BundleEngine
from server.settings import Key, Limits, Settings, hash_key
from server.testing import FakeEngine
from vlp.testing import micro_bundle

B64 = Callable[[bytes], str]
LIMIT = 200_000


@pytest.fixture(scope="module")
def url(serving: Any) -> Iterator[str]:
    """A server with a real engine, so that pictures go through the real decoder."""
    limits = Limits(body_bytes=LIMIT)
    with serving(create_app(Settings(limits=limits), BundleEngine(micro_bundle(), limits))) as found:
        yield found


def ask(url: str, picture: bytes, b64: B64) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/embeddings", json={"input": [{"image": b64(picture)}]}, timeout=30)


def refused(answer: httpx2.Response) -> bool:
    error = answer.json()["error"]
    return answer.status_code == 400 and error["param"] == "input[0]" and "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("package", "floor"),
    [("starlette", "1.3.1"), ("pillow", "12.3.0"), ("torch", "2.10"), ("h11", "0.16"), ("uvicorn", "0.38")],
)
def test_floors(package: str, floor: str) -> None:
    """GHSA-f96h-pmfr-66vw, CVE-2025-32434, CVE-2026-24747 and others are closed by what is installed."""
    assert Version(version(package)) >= Version(floor)


def test_no_multipart_parser_is_reached(url: str) -> None:
    """CVE-2024-24762, CVE-2024-53981, CVE-2026-24486, CVE-2026-40347, CVE-2026-42561, CVE-2025-54121, CVE-2026-54283.

    All are in the parsing of forms. No route takes one: the body is read as JSON whatever its header says, and quickly.
    """
    began = time.monotonic()
    bodies = {
        "multipart/form-data; boundary=x": b"--x\r\n" * 20_000,
        "multipart/form-data; boundary=" + "a" * 4000: b"\r\n" * 50_000,
        "application/x-www-form-urlencoded": b"a=b&" * 40_000,
        "application/x-www-form-urlencoded; x=" + '\\"' * 2000: b"!" * 100_000,
    }
    for kind, body in bodies.items():
        answer = httpx2.post(f"{url}/v1/embeddings", content=body, headers={"Content-Type": kind}, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert time.monotonic() - began < 10


def test_cve_2025_62727_ranges_cost_nothing(url: str) -> None:
    """A Range header of thousands of parts was merged in quadratic time by file answers."""
    header = "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 5000, 2))
    for path in ("/healthz", "/openapi.json", "/v1/models"):
        began = time.monotonic()
        assert httpx2.get(f"{url}{path}", headers={"Range": header}, timeout=30).status_code in (200, 431)
        assert time.monotonic() - began < 5


def test_cve_2026_48710_the_host_header_opens_no_route(serving: Any) -> None:
    settings = Settings(keys=(Key(name="a", sha256=hash_key("a")),), hosts=("*",))
    with serving(create_app(settings, FakeEngine())) as url:
        for host in ("x/healthz?", "localhost/healthz#", "[::1]/readyz", "a:80/metrics?"):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as raw:
                raw.sendall(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert raw.recv(4096).split()[1] in (b"400", b"401")


def test_cve_2026_100650_a_body_is_refused_before_it_is_held(url: str) -> None:
    """The whole body was read and then measured. Here it is counted while it arrives."""
    tracemalloc.start()
    try:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as raw:
            raw.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            sent = 0
            try:
                while sent < 50_000_000:
                    raw.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")
                    sent += 65536
            except OSError:
                pass
        assert tracemalloc.get_traced_memory()[1] < 20 * LIMIT
    finally:
        tracemalloc.stop()


def test_compressed_bodies_are_not_unpacked(url: str) -> None:
    bomb = zlib.compress(b"a" * 50_000_000)
    for coding in ("gzip", "deflate", "br"):
        answer = httpx2.post(f"{url}/v1/embeddings", content=bomb, headers={"Content-Encoding": coding}, timeout=30)
        assert answer.status_code == 400


def png(*chunks: tuple[bytes, bytes], width: int = 1, height: int = 1) -> bytes:
    """A PNG of these chunks after its header."""

    def packed(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = packed(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(packed(*chunk) for chunk in chunks) + packed(b"IEND", b"")


PIXEL = zlib.compress(b"\0\1\2\3")


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_cve_2014_9601_text_chunks_do_not_grow(kind: bytes, url: str, b64: B64) -> None:
    """A compressed text chunk of a small PNG unpacked to as much memory as it liked."""
    bomb = zlib.compress(b"a" * 100_000_000, 9)
    content = {b"zTXt": b"k\0\0", b"iCCP": b"k\0\0", b"iTXt": b"k\0\1\0\0\0"}[kind] + bomb
    tracemalloc.start()
    try:
        answer = ask(url, png((kind, content), (b"IDAT", PIXEL)), b64)
        assert answer.status_code in (200, 400, 413)
        assert tracemalloc.get_traced_memory()[1] < 64_000_000
    finally:
        tracemalloc.stop()


def test_cve_2022_45198_animations_are_bounded(url: str, b64: B64) -> None:
    """GIF frames far larger than the file. One frame is looked at, within the limit of pixels."""
    huge = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\2\2L\1\0"
    assert refused(ask(url, huge + frame * 3 + b";", b64))
    stream = io.BytesIO()
    frames = [Image.new("P", (20, 20), n) for n in range(50)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert ask(url, stream.getvalue(), b64).status_code == 200


def test_cve_2026_40192_formats_nobody_asked_for_are_no_pictures(url: str, b64: B64) -> None:
    """FITS, and whatever else would only be a surface: TIFF, BMP, EPS, PPM, TGA, DDS, SGI and so on."""
    fits = (
        b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + b"END".ljust(2720)
    )
    assert refused(ask(url, fits, b64))
    for name in ("TIFF", "BMP", "PPM", "TGA", "DDS", "SGI", "ICO", "PCX", "JPEG2000", "EPS"):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, name)
        assert refused(ask(url, stream.getvalue(), b64)), name


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (5001, 5000), (16_385, 1), (2**31 - 1, 1), (0, 1)])
def test_cve_2026_55379_and_55380_the_header_decides_before_decoding(
    width: int, height: int, url: str, b64: B64
) -> None:
    """Ways round Pillow's own check for decompression bombs: ours looks at the header, and is not Pillow's."""
    data = png((b"IDAT", zlib.compress(b"\0" * 1000)), width=width, height=height)
    began = time.monotonic()
    assert refused(ask(url, data, b64))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:1/a.png",
        "http://[::1]/a.png",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "ftp://x/",
    ],
)
def test_cve_2025_6242_and_followers_addresses_are_not_fetched(address: str, url: str) -> None:
    """CVE-2026-24779, CVE-2026-25960, CVE-2026-34753, CVE-2025-24354: off by default; test_url_fetching has it on."""
    body = {"input": [{"image": address}]}
    answer = httpx2.post(f"{url}/v1/embeddings", json=body, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "url_not_allowed")


def test_cve_2025_4517_and_cve_2024_3078_names_are_never_paths(url: str) -> None:
    """Of Python's tarfile and of Qdrant: a name in a URL, encoded or not, never leads out of a folder."""
    for name in ("..", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f", "a%00b", "%252e%252e%252f", "C:\\x"):
        for path in (f"/v1/models/{name}", f"/v1/collections/{name}", f"/v1/label-sets/{name}", f"/{name}"):
            # byte for byte, because clients resolve dots before they ask
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as raw:
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))  # type: ignore[misc]
            assert answer.split()[1] in (b"400", b"404", b"307"), path  # 307: the same path without its last slash
            assert b"root:" not in answer


def test_request_smuggling_is_refused(url: str) -> None:
    """Two lengths, or a length and chunks: whichever a proxy believes, we do not believe the other."""
    port = int(url.rpartition(":")[2])
    for head in (
        "Content-Length: 5\r\nContent-Length: 6\r\n", "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: xchunked\r\n", "Content-Length: +5\r\n", "Content-Length: -1\r\n",
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n{head}\r\n0\r\n\r\nGET /healthz".encode())
            assert raw.recv(4096).split()[1] == b"400", head
