"""A real S3 server for slow tests, from an environment of its own: its demands on versions contradict those of s3fs."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import pytest

MOTO = Path(sys.prefix) / "peers/moto/bin/moto_server"


def point_to(address: str, patch: pytest.MonkeyPatch) -> None:
    """Have s3fs, here and in processes started from here, find the server at `host:port`."""
    found = {"ENDPOINT_URL": f"http://{address}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    for name, value in {**found, "DEFAULT_REGION": "us-east-1"}.items():
        patch.setenv(f"AWS_{name}", value)


def make_bucket() -> fsspec.AbstractFileSystem:
    """s3://bucket, empty, where the environment says; what it was asked is not remembered."""
    system = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    system.mkdir("bucket")
    return system


@contextmanager
def s3_server(host: str = "127.0.0.1") -> Iterator[int]:
    """Its port. Without the server, or s3fs, the test is skipped."""
    pytest.importorskip("s3fs")
    if not MOTO.exists():
        pytest.skip("the S3 server is not installed: make store does it")
    with socket.socket() as free:
        free.bind((host, 0))
        port = int(free.getsockname()[1])
    server = subprocess.Popen([MOTO, "-H", host, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while True:
            with suppress(OSError), socket.create_connection((host, port)):
                break
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        yield port
    finally:
        server.kill()
        server.wait()
