"""`vlp serve` as processes: several workers, one of them killed; draining under load; keys and models read again."""

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
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.keys import ENVIRONMENT, add_key
from server.serving import BEAT_SECONDS
from vlp.bundle import save_bundle
from vlp.testing import micro_bundle

ROOT = Path(__file__).parents[2]


@contextmanager
def served(*arguments: str | Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `vlp serve` and its URL; killed at the end if it still runs."""
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
            yield process, json.loads(line)["url"]
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def workers_of(process: subprocess.Popen[str]) -> set[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {int(pid) for pid in children}


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
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        return self.seen


def test_a_killed_worker_is_replaced_and_the_others_go_on(bundle_folder: Path) -> None:
    with served(bundle_folder, "--workers", "2") as (process, url):
        assert len(workers_of(process)) == 2
        for _ in range(3):
            before = workers_of(process)
            os.kill(min(before), signal.SIGKILL)
            until(lambda before=before: len(workers_of(process) - before) == 1)
            assert httpx2.get(f"{url}/readyz", timeout=30).status_code == 200
            until(lambda: "vlp_ready 2" in httpx2.get(f"{url}/metrics", timeout=30).text)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_metrics_are_the_sum_over_workers(bundle_folder: Path) -> None:
    with served(bundle_folder, "--workers", "2") as (process, url):
        for number in range(20):  # each on a connection of its own, so that both workers get some
            assert httpx2.post(f"{url}/v1/embeddings", json={"input": str(number)}).status_code == 200
        wanted = 'vlp_requests_total{method="POST",route="/v1/embeddings",status="200"} 20'
        until(lambda: wanted in httpx2.get(f"{url}/metrics").text)
        time.sleep(2 * BEAT_SECONDS)  # what a worker has counted since its last beat goes with it
        os.kill(min(workers_of(process)), signal.SIGKILL)
        time.sleep(0.2)
        assert wanted in httpx2.get(f"{url}/metrics").text, "a counter fell"


def test_a_reload_by_one_worker_reaches_all(bundle_folder: Path, tmp_path: Path) -> None:
    folder = save_bundle(micro_bundle(seed=0), tmp_path / "one")

    def answers(url: str) -> set[float]:
        found = [httpx2.post(f"{url}/v1/embeddings", json={"input": "red"}).json() for _ in range(12)]
        return {answer["data"][0]["embedding"][0] for answer in found}

    with served(f"one={folder}", "--workers", "2") as (_, url):
        (before,) = answers(url)
        save_bundle(micro_bundle(seed=1), folder)
        assert httpx2.post(f"{url}/v1/models/one/reload", timeout=30).status_code == 200
        until(lambda: len(answers(url)) == 1)
        assert answers(url) != {before}


def test_sighup_reads_keys_and_models_again(tmp_path: Path) -> None:
    folder, keys = save_bundle(micro_bundle(seed=0), tmp_path / "one"), tmp_path / "keys.json"
    first = add_key(keys, "first", "read", None)

    def ask(url: str, key: str) -> Any:
        answer = httpx2.post(
            f"{url}/v1/embeddings", json={"input": "red"}, headers={"Authorization": f"Bearer {key}"}, timeout=30
        )
        return answer.json()["data"][0]["embedding"] if answer.status_code == 200 else answer.status_code

    with served(folder, "--keys", keys) as (process, url):
        before = ask(url, first)
        second = add_key(keys, "second", "read", None)
        assert ask(url, second) == 401
        save_bundle(micro_bundle(seed=1), folder)
        process.send_signal(signal.SIGHUP)
        until(lambda: ask(url, second) != 401)
        until(lambda: ask(url, second) != before)
        assert ask(url, first) != 401
        keys.write_text("[")  # a broken file: the keys stay as they were
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert ask(url, first) != 401


def drain_once(bundle_folder: Path, workers: int) -> tuple[Counter[str], float, float]:
    """(what clients saw, seconds to 503 of readiness, seconds to the end) of one SIGTERM under load."""
    with served(bundle_folder, "--workers", str(workers)) as (process, url), httpx2.Client(timeout=5) as prober:
        assert prober.get(f"{url}/readyz").status_code == 200
        load = Load(url, 4)
        late = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)
        try:
            time.sleep(0.5)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            until(lambda: prober.get(f"{url}/readyz").status_code == 503, 5)
            unready = time.monotonic() - began
            time.sleep(1.2)  # the port is closed by now; who was let in before is still heard
            late.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert late.recv(100).startswith(b"HTTP/1.1 200")
            code = process.wait(60)
            seconds = time.monotonic() - began
        finally:
            late.close()
            seen = load.stop()
        assert code == 0
        return seen, unready, seconds


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_under_load_breaks_nothing(workers: int, bundle_folder: Path) -> None:
    seen, unready, seconds = drain_once(bundle_folder, workers)
    assert set(seen) <= {"200", "503", "refused"}, seen
    assert seen["200"] > 10
    assert unready < 1.0  # 0.1 on an idle machine
    assert seconds < 20


def test_a_bundle_that_cannot_be_served_ends_all_workers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlp", "serve", str(tmp_path / "none"), "--workers", "2", "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_end_with_their_supervisor(bundle_folder: Path) -> None:
    """Killed, it can tell them nothing; they see it by their lifeline, and the port is free again."""
    with served(bundle_folder, "--workers", "2") as (process, url):
        pids = workers_of(process)
        process.kill()
        process.wait(10)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/healthz")
