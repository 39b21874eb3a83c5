"""`vlp serve` as a process of its own, clients that ask it without a pause, and what is true of it from outside."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx2
from bench_kit import ROOT

from server.keys import ENVIRONMENT

LATE_SECONDS = 1.2
"""After SIGTERM the port is closed by then; whoever was let in before is still heard."""


@dataclass(frozen=True)
class Served:
    """A running server."""

    process: "subprocess.Popen[str]"
    url: str
    log: IO[str]

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def memory(self, field: str = "VmRSS") -> float:
        """MiB that the process has in memory now, or had at most (`VmHWM`)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024

    def tracebacks(self) -> int:
        """Of the log so far."""
        self.log.seek(0)
        return self.log.read().count("Traceback")


@contextmanager
def served(*arguments: str | Path, **environment: str) -> Iterator[Served]:
    """A running `vlp serve`; killed at the end if it still runs."""
    command = [sys.executable, "-m", "vlp", "serve", *map(str, arguments), "--port", "0", "--json"]
    # a file, not a pipe: a pipe that nobody reads is full after some hundred log lines, and then the server waits
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", ENVIRONMENT: "", **environment},
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line:
                log.seek(0)
                raise AssertionError(log.read())
            yield Served(process, json.loads(line)["url"], log)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def until(true: Any, seconds: float = 20) -> float:
    """Seconds until it is true."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)
    return time.monotonic() - began


class Load:
    """Clients that ask without a pause, each time something new; counts statuses and what broke."""

    def __init__(self, url: str, clients: int) -> None:
        self.seen: Counter[str] = Counter()
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(who,)) for who in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, who: int) -> None:
        number = 0
        with httpx2.Client(timeout=30) as client:
            while not self._stop.is_set():
                number += 1
                try:
                    body = {"input": [f"{who} {number}"]}
                    status = client.post(f"{self._url}/v1/embeddings", json=body).status_code
                    self.seen[str(status)] += 1
                except httpx2.ConnectError:  # nobody listens any more: an honest refusal
                    self.seen["refused"] += 1
                    self._stop.wait(0.01)
                except httpx2.TransportError as error:
                    self.seen[f"broken: {type(error).__name__}: {error}"] += 1

    def stop(self) -> Counter[str]:
        """What was seen."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        return self.seen


@dataclass(frozen=True)
class Drained:
    """One SIGTERM under load."""

    seen: Counter[str]
    """What the clients met with."""
    unready: float
    """Seconds until readiness was denied."""
    seconds: float
    """Until the process had ended."""

    @property
    def good(self) -> bool:
        """Nobody was reset, and it was over in time."""
        return set(self.seen) <= {"200", "503", "refused"} and self.seen["200"] > 0 and self.seconds <= 20


def drain(bundle: Path, workers: int) -> Drained:
    """A server under the load of four clients is told to stop; a fifth connected before, and asks once it is shut."""
    with served(bundle, "--workers", str(workers)) as server, httpx2.Client(timeout=5) as prober:
        assert prober.get(f"{server.url}/readyz").status_code == 200
        load = Load(server.url, 4)
        late = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        try:
            time.sleep(0.5)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            until(lambda: prober.get(f"{server.url}/readyz").status_code == 503, 5)
            unready = time.monotonic() - began
            time.sleep(max(0.0, began + LATE_SECONDS - time.monotonic()))
            late.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            load.seen[late.recv(100)[9:12].decode() or "reset"] += 1
            code = server.process.wait(60)
            seconds = time.monotonic() - began
        except ConnectionError as error:
            load.seen[f"broken: {type(error).__name__}"] += 1
            code, seconds = server.process.wait(60), time.monotonic() - began
        finally:
            late.close()
            seen = load.stop()
        assert code == 0
        return Drained(seen, unready, seconds)
