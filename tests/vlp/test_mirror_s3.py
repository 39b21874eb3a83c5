"""Runs and bundles on a real S3 server behind a connection that is slow, answers 500 and breaks off."""

import json
import os
import random
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from tests.s3_server import make_bucket, point_to, s3_server
from vlp.bundle import load_bundle
from vlp.recipe import Recipe, dump

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # s3fs warns about its own insides

REFUSAL = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Faults(socketserver.ThreadingTCPServer):
    """Passes connections on to `port`, slowly; every fifth gets a 500, the others are cut after some bytes."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.port, self.dice, self.lock = port, random.Random(0), threading.Lock()
        self.count, self.cut, self.on = 0, 0, True


class Connection(socketserver.BaseRequestHandler):
    """One of them."""

    server: Faults

    def handle(self) -> None:
        with self.server.lock:
            self.server.count += 1
            number, self.left = self.server.count, self.server.dice.randrange(20_000, 600_000)
        if self.server.on and number % 5 == 0:
            self.request.recv(1 << 16)
            self.request.sendall(REFUSAL)
            return
        with socket.create_connection(("127.0.0.1", self.server.port)) as far:
            back = threading.Thread(target=self.pump, args=(far, self.request), daemon=True)
            back.start()
            self.pump(self.request, far)
            back.join()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(1 << 14):
                if self.server.on:
                    time.sleep(0.002)
                    self.left -= len(chunk)
                if self.left < 0:
                    self.server.cut += 1
                    break
                sink.sendall(chunk)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Faults]:
    """An S3 server with an empty bucket, seen through faults."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    with s3_server() as port, Faults(port) as proxy:
        point_to(f"127.0.0.1:{proxy.server_address[1]}", monkeypatch)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            proxy.on = False
            make_bucket()
            proxy.on = True
            yield proxy
        finally:
            proxy.shutdown()


def vlp(*arguments: str, cache: Path) -> dict[str, object]:
    """A command on a machine of its own, which its cache folder stands for."""
    done = subprocess.run(
        [sys.executable, "-m", "vlp", *arguments, "--json"],
        env={**os.environ, "VLP_CACHE": str(cache)}, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_a_run_on_s3_is_trained_resumed_and_evaluated_on_three_machines(
    faults: Faults, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Trained on one, whose last checkpoint is lost; on from the one before on a second, evaluated on a third."""
    url, file = "s3://bucket/runs/a", tmp_path / "micro.yaml"
    recipe = micro_recipe()
    file.write_text(dump(recipe), encoding="utf-8")
    vlp("train", str(file), "--run-dir", url, cache=tmp_path / "one")
    faults.on = False
    system = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    kept = [path.rpartition("/")[2] for path in system.ls("bucket/runs/a/checkpoints")]
    assert kept == ["step-00000010", "step-00000012"]
    system.rm("bucket/runs/a/checkpoints/step-00000012", recursive=True)
    faults.on = True
    done = vlp("train", str(file), "--run-dir", url, "--resume", cache=tmp_path / "two")
    assert done["steps"] == 12
    found = vlp("eval", url, "--data", str(recipe.data.train), cache=tmp_path / "three")
    assert found["bundle"] == url
    here = next((tmp_path / "two/runs").glob("*/a"))
    ours, theirs = load_bundle(f"{url}/bundle").model.state_dict(), load_bundle(here).model.state_dict()
    assert all(value.equal(theirs[name]) for name, value in ours.items())
    assert faults.cut > 0
    assert faults.count > 20
