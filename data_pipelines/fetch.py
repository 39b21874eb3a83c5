"""The one way bytes from elsewhere come in: a local file, an object store, or a URL written by a stranger.

A URL is trusted with nothing. Its host is resolved once, every answer must be a public address, and that very address
is dialled, so that neither a redirect nor a second answer of the resolver leads inside. Built on http.client, because
a client with sessions, proxies, cookies and decoders would have to be talked out of most of what it does.
"""

import functools
import io
import itertools
import os
import select
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urljoin

import fsspec
from pydantic import Field

from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, PipelineError
from data_pipelines.images import MAX_FILE_BYTES
from data_pipelines.urls import WEB, Target, is_public, parse

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "memory")
"""fsspec's object stores; its other protocols (ssh, chained archives, its own http) would go round the checks here."""
RETRIED = frozenset(
    ("dns_timeout", "timeout", "connection", "incomplete", "http_408", "http_429", "http_500", "http_502", "http_503",
     "http_504")
)  # fmt: skip
REDIRECTS = (301, 302, 303, 307, 308)
MAX_IDLE = 64
"""Open connections kept for the next picture of the same host."""
CHUNK = 1 << 16


class FetchOptions(StrictModel):
    """How long, how much and from where. Times in seconds."""

    timeout: float = Field(default=10.0, gt=0)
    """For one connection attempt, and for each wait for the next bytes."""
    total_timeout: float = Field(default=60.0, gt=0)
    """For one picture with all its redirects and retries; only the system's name resolution is not cut short."""
    max_bytes: int = Field(default=MAX_FILE_BYTES, ge=1)
    max_redirects: int = Field(default=3, ge=0)
    retries: int = Field(default=2, ge=0)
    """Further attempts after a time-out, a broken connection or an answer that asks to come back."""
    backoff: float = Field(default=0.5, ge=0)
    """Wait before the first retry; doubled for each further one."""
    allow_private: bool = False
    """Whether addresses of the own network (private, loopback, link-local ...) and any port may be reached."""
    schemes: tuple[str, ...] = (*WEB, *STORES)
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """A picture whose X-Robots-Tag holds one of them is left alone; empty ignores the header."""
    user_agent: str = Field(default="vlp-shard", pattern=r"^[!-~]([ -~]*[!-~])?$")
    """The part before `/` is the name that X-Robots-Tag may address."""


def read_bytes(location: bytes | Path | str, options: FetchOptions) -> bytes:
    """The bytes themselves, a local file's (Path), or those behind a URL (str). Safe to call from many threads.

    Raises BadSample, its reason one of unreadable, too_big, bad_url, bad_scheme, bad_port, private_address, dns,
    dns_timeout, connection, tls, timeout, http_404 (any status), too_many_redirects, opted_out, content_encoding,
    incomplete, bad_response; and PipelineError when the client of an object store is not installed.
    """
    if isinstance(location, bytes):
        return location
    if isinstance(location, Path):
        return _read_file(location, options)
    scheme, found, _ = location.strip().partition("://")
    if not found or scheme.lower() not in options.schemes:
        raise BadSample("bad_scheme", f"{location[:200]!r} begins with none of {', '.join(options.schemes)}")
    if scheme.lower() not in WEB:
        return _read_store(location, options)
    content = io.BytesIO()
    fetch_into(content, location, options)
    return content.getvalue()


def _read_file(path: Path, options: FetchOptions) -> bytes:
    try:  # three system calls; after each of path.read_bytes' eight, a thread would wait for its turn again
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a named pipe would wait for somebody to write
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("unreadable", "not a regular file")
            if status.st_size > options.max_bytes:
                raise BadSample("too_big", f"{status.st_size} bytes, limit {options.max_bytes}")
            data = os.read(handle, status.st_size)
            while len(data) < status.st_size and (more := os.read(handle, status.st_size - len(data))):
                data += more
            return data
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadSample("unreadable", getattr(error, "strerror", None) or str(error)) from error


def _read_store(location: str, options: FetchOptions) -> bytes:
    if "::" in location:
        raise BadSample("bad_url", f"{location!r}: chained addresses are not followed")
    try:
        system, path = fsspec.core.url_to_fs(location)
        if (size := system.size(path) or 0) > options.max_bytes:
            raise BadSample("too_big", f"{size} bytes, limit {options.max_bytes}")
        return bytes(system.cat_file(path, 0, size))
    except ImportError as error:
        raise PipelineError(f"{location} needs a package that is not installed: {error}") from error
    except BadSample:
        raise
    except Exception as error:  # every store has errors of its own
        raise BadSample("unreadable", f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Task:
    """What all steps of a fetch share."""

    sink: BinaryIO
    options: FetchOptions
    deadline: float

    def left(self) -> float:
        """Seconds the next wait may take."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"more than {self.options.total_timeout} s in all")
        return min(self.options.timeout, left)


def fetch_into(sink: BinaryIO, url: str, options: FetchOptions) -> None:
    """Write what is behind a web address into `sink`, from its beginning at every attempt. Raises as `read_bytes`."""
    task = _Task(sink, options, time.monotonic() + options.total_timeout)
    for attempt in itertools.count():
        sink.seek(0)
        sink.truncate()
        try:
            _follow(url, task)
            return
        except BadSample as error:
            wait = options.backoff * 2**attempt
            if error.reason not in RETRIED or attempt >= options.retries or time.monotonic() + wait >= task.deadline:
                raise
            time.sleep(wait)


def _follow(url: str, task: _Task) -> None:
    """One attempt; every hop is checked like the first address."""
    options = task.options
    target = parse(url, any_port=options.allow_private)
    for _ in range(options.max_redirects + 1):
        answer = _get(target, task)
        if answer is None:
            return
        try:
            target = parse(urljoin(target.url, answer), any_port=options.allow_private)
        except ValueError as error:
            raise BadSample("bad_url", f"redirect to {answer[:200]!r}: {error}") from error
    raise BadSample("too_many_redirects", f"more than {options.max_redirects}, the last to {target.url[:200]}")


def _dial(target: Target, task: _Task) -> socket.socket:
    """A connection to an address that was checked, not to a name that could be answered differently."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        busy = getattr(error, "errno", None) == socket.EAI_AGAIN  # the resolver did not answer; no verdict yet
        reason = "dns_timeout" if busy else "dns"
        raise BadSample(reason, f"{target.host}: {getattr(error, 'strerror', None) or error}") from error
    for *_, address in found:
        if not task.options.allow_private and not is_public(str(address[0])):
            raise BadSample("private_address", f"{target.host} is {address[0]}; the option allow_private admits it")
    last: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(task.left())
            sock.connect(address)
            return (
                _tls().wrap_socket(sock, server_hostname=target.host.rstrip(".")) if target.scheme == "https" else sock
            )
        except OSError as error:
            sock.close()
            last = error
            if isinstance(error, ssl.SSLError):
                break
    raise last


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Clocked(io.RawIOBase):
    """What a socket receives, each wait bounded by what is left of the whole: a slow drip of bytes ends in time."""

    def __init__(self, sock: socket.socket, task: _Task) -> None:
        self._sock, self._task = sock, task

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._task.left())
        return self._sock.recv_into(buffer)

    def makefile(self, _: str) -> io.BufferedReader:
        """What HTTPResponse asks a socket for."""
        return io.BufferedReader(self, CHUNK)


_Key = tuple[int, str, str, int, bool]
_IDLE: dict[socket.socket, _Key] = {}
"""Connections that wait for the next picture of their host, oldest first."""
_LOCK = threading.Lock()


def _take(key: _Key) -> socket.socket | None:
    """An idle connection that is still open and has nothing to say."""
    while True:
        with _LOCK:
            sock = next((sock for sock, owner in _IDLE.items() if owner == key), None)
            if sock is None:
                return None
            del _IDLE[sock]
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if not poll.poll(0):
            return sock
        sock.close()


def _give(sock: socket.socket, key: _Key) -> None:
    with _LOCK:
        _IDLE[sock] = key
        surplus = next(iter(_IDLE)) if len(_IDLE) > MAX_IDLE else None
        if surplus is not None:
            del _IDLE[surplus]
    if surplus is not None:
        surplus.close()


def close_idle() -> None:
    """Close the connections that are kept for later."""
    with _LOCK:
        socks = list(_IDLE)
        _IDLE.clear()
    for sock in socks:
        sock.close()


def _get(target: Target, task: _Task) -> str | None:
    """The address that a redirect names; None once the body of a good answer is in the sink."""
    # The process is part of the key: a forked worker must not write into its parent's connections.
    key = (os.getpid(), target.scheme, target.host, target.port, task.options.allow_private)
    try:
        if (idle := _take(key)) is not None:
            with suppress(ConnectionError):  # the server closed it just now: as good as none
                return _exchange(idle, key, target, task)
        return _exchange(_dial(target, task), key, target, task)
    except TimeoutError as error:
        raise BadSample("timeout", str(error)) from error
    except ssl.SSLError as error:
        raise BadSample("tls", str(error)) from error
    except IncompleteRead as error:
        raise BadSample("incomplete", str(error)) from error
    except OSError as error:
        raise BadSample("connection", error.strerror or str(error)) from error
    except (HTTPException, ValueError) as error:
        raise BadSample("bad_response", f"{type(error).__name__}: {error}"[:200]) from error


def _exchange(sock: socket.socket, key: _Key, target: Target, task: _Task) -> str | None:
    request = (
        f"GET {target.path} HTTP/1.1\r\nHost: {target.origin}\r\nUser-Agent: {task.options.user_agent}\r\n"
        "Accept: image/*, */*;q=0.8\r\nAccept-Encoding: identity\r\n\r\n"
    )
    finished = False
    response = HTTPResponse(_Clocked(sock, task), method="GET")  # type: ignore[arg-type]
    try:
        sock.settimeout(task.left())
        sock.sendall(request.encode("ascii"))
        response.begin()
        _check_opt_out(response.headers.get_all("X-Robots-Tag", ()), task.options)
        place = response.getheader("Location")
        if response.status in REDIRECTS and place is not None:
            return place.encode("latin-1").decode("utf-8", "replace")  # http.client decodes headers as latin-1
        if response.status != 200:
            raise BadSample(f"http_{response.status}", response.reason[:200])
        _save_body(response, task)
        finished = not response.will_close
        return None
    finally:
        response.close()  # before its connection: Python 3.13 complains of a response that is left to the collector
        if finished:
            _give(sock, key)
        else:
            sock.close()


def _save_body(response: HTTPResponse, task: _Task) -> None:
    if (coding := response.getheader("Content-Encoding", "identity").strip().lower()) != "identity":
        raise BadSample("content_encoding", f"packed with {coding[:50]!r} although it was asked not to be")
    size, limit = response.length or 0, task.options.max_bytes
    if size <= limit:
        size = 0
        while chunk := response.read1(CHUNK):
            size += len(chunk)
            if size > limit:
                break
            task.sink.write(chunk)
    if size > limit:
        raise BadSample("too_big", f"at least {size} bytes, limit {limit}")
    if response.length:
        raise BadSample("incomplete", f"{size} bytes came, {response.length} are missing")


def _check_opt_out(tags: Iterable[str], options: FetchOptions) -> None:
    """X-Robots-Tag: directives for all, or after `name:` for one robot."""
    own = options.user_agent.partition("/")[0].lower()
    for tag in tags:
        addressed = True
        for part in tag.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in ("unavailable_after", "max-snippet", "max-image-preview"):
                addressed = name.strip() in (own, "*")
            directive = rest if colon else name
            if addressed and directive.strip() in options.disallowed_header_directives:
                raise BadSample("opted_out", f"X-Robots-Tag: {tag[:200]}")
