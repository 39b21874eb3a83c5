"""`vlp serve` as processes: several workers, one of them killed; draining under load; keys and models read again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from served_process import Served, drain, served, until

from server.keys import add_key
from server.serving import BEAT_SECONDS
from vlp.bundle import save_bundle
from vlp.testing import micro_bundle

ROOT = Path(__file__).parents[2]


def workers_of(server: Served) -> set[int]:
    pid = server.process.pid
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def test_a_killed_worker_is_replaced_and_the_others_go_on(bundle_folder: Path) -> None:
    with served(bundle_folder, "--workers", "2") as server:
        assert len(workers_of(server)) == 2
        for _ in range(3):
            before = workers_of(server)
            os.kill(min(before), signal.SIGKILL)
            until(lambda before=before: len(workers_of(server) - before) == 1)
            assert httpx2.get(f"{server.url}/readyz", timeout=30).status_code == 200
            until(lambda: "vlp_ready 2" in httpx2.get(f"{server.url}/metrics", timeout=30).text)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_metrics_are_the_sum_over_workers(bundle_folder: Path) -> None:
    with served(bundle_folder, "--workers", "2") as server:
        for number in range(20):  # each on a connection of its own, so that both workers get some
            assert httpx2.post(f"{server.url}/v1/embeddings", json={"input": str(number)}).status_code == 200
        wanted = 'vlp_requests_total{method="POST",route="/v1/embeddings",status="200"} 20'
        until(lambda: wanted in httpx2.get(f"{server.url}/metrics").text)
        time.sleep(2 * BEAT_SECONDS)  # what a worker has counted since its last beat goes with it
        os.kill(min(workers_of(server)), signal.SIGKILL)
        time.sleep(0.2)
        assert wanted in httpx2.get(f"{server.url}/metrics").text, "a counter fell"


def test_a_reload_by_one_worker_reaches_all(bundle_folder: Path, tmp_path: Path) -> None:
    folder = save_bundle(micro_bundle(seed=0), tmp_path / "one")

    def answers(url: str) -> set[float]:
        found = [httpx2.post(f"{url}/v1/embeddings", json={"input": "red"}).json() for _ in range(12)]
        return {answer["data"][0]["embedding"][0] for answer in found}

    with served(f"one={folder}", "--workers", "2") as server:
        (before,) = answers(server.url)
        save_bundle(micro_bundle(seed=1), folder)
        assert httpx2.post(f"{server.url}/v1/models/one/reload", timeout=30).status_code == 200
        until(lambda: len(answers(server.url)) == 1)
        assert answers(server.url) != {before}


def test_sighup_reads_keys_and_models_again(tmp_path: Path) -> None:
    folder, keys = save_bundle(micro_bundle(seed=0), tmp_path / "one"), tmp_path / "keys.json"
    first = add_key(keys, "first", "read", None)

    def ask(url: str, key: str) -> Any:
        answer = httpx2.post(
            f"{url}/v1/embeddings", json={"input": "red"}, headers={"Authorization": f"Bearer {key}"}, timeout=30
        )
        return answer.json()["data"][0]["embedding"] if answer.status_code == 200 else answer.status_code

    with served(folder, "--keys", keys) as server:
        before = ask(server.url, first)
        second = add_key(keys, "second", "read", None)
        assert ask(server.url, second) == 401
        save_bundle(micro_bundle(seed=1), folder)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: ask(server.url, second) != 401)
        until(lambda: ask(server.url, second) != before)
        assert ask(server.url, first) != 401
        keys.write_text("[")  # a broken file: the keys stay as they were
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert ask(server.url, first) != 401


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_under_load_breaks_nothing(workers: int, bundle_folder: Path) -> None:
    """A hundred of them: `make prove-server PROOFS=sigterms`."""
    drained = drain(bundle_folder, workers)
    assert drained.good, drained
    assert drained.seen["200"] > 10
    assert drained.unready < 1.0  # 0.1 on an idle machine


def test_a_bundle_that_cannot_be_served_ends_all_workers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlp", "serve", str(tmp_path / "none"), "--workers", "2", "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_end_with_their_supervisor(bundle_folder: Path) -> None:
    """Killed, it can tell them nothing; they see it by their lifeline, and the port is free again."""
    with served(bundle_folder, "--workers", "2") as server:
        pids = workers_of(server)
        server.process.kill()
        server.process.wait(10)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/healthz")
