"""Campaigns against a running server: fuzzed requests, hostile pictures and addresses, kills, signals.

Each takes how many cases it runs and says how many of them passed, whether all its promises held, and what it saw.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from bench_kit import ROOT
from hostile_images import hostile_images
from index_kills import survive_kills
from mutants import send_mutants
from rebinding import rebind
from served_process import Served, drain, served

from vlp.bundle import save_bundle
from vlp.testing import micro_bundle

HERE = Path(__file__).resolve().parent
FUZZ = Path(sys.prefix) / "peers/fuzz/bin/python"
HOSTILE_URLS = ROOT / "tests/data_pipelines/hostile_urls.json"
SPOILT = 0.4
"""Share of the fuzzed requests that are spoilt bytes; the rest is made up from the OpenAPI document."""
WARM = 0.1
"""Share that is sent before memory is looked at for the first time."""
DRIFT, MORE_MB, P99_SECONDS = 0.05, 64, 0.2
PARSERS = ("picture", "data_uri", "url", "body")


@dataclass(frozen=True)
class Outcome:
    """Of a campaign."""

    cases: int
    passed: int
    met: bool
    note: str


@contextmanager
def micro_server(*options: str) -> Iterator[Served]:
    """A server with a micro model, empty collections and label sets; stopped in good order, for its engines' sake."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        bundle = save_bundle(micro_bundle(), folder / "micro")
        kept = ("--collections", folder / "collections", "--label-sets", folder / "sets")
        with served(bundle, *kept, "--drain-wait", "0", *options) as server:
            yield server
            server.process.terminate()
            server.process.wait(60)


def made_up(server: Served, number: int, seed: int) -> dict[str, Any]:
    """What schemathesis saw; see `fuzz_requests`."""
    command = [str(FUZZ), str(HERE / "fuzz_requests.py"), server.url, str(number), str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def fuzz_requests(number: int) -> Outcome:
    """No 5xx, nothing that the OpenAPI document does not promise, no traceback, no growth of memory."""
    if not FUZZ.exists():
        raise FileNotFoundError(f"no schemathesis in {FUZZ.parents[1]}: make prove-server installs it")
    sent = failures = 0
    told: list[str] = []
    with micro_server() as server:
        memory = []
        for part, share in enumerate((WARM, 1 - WARM)):
            spoilt = send_mutants(server.port, round(number * share * SPOILT), seed=part)
            found = made_up(server, max(1, round(number * share * (1 - SPOILT))), seed=part)
            sent += spoilt.sent + int(found["sent"])
            failures += len(spoilt.failures) + int(found["failures"])
            told += spoilt.failures[:5] + found["told"][:5]
            memory.append(server.memory())
        tracebacks = server.tracebacks()
        alive = httpx2.get(f"{server.url}/readyz", timeout=30).status_code == 200
    drift = memory[1] / memory[0] - 1
    note = f"{failures} answers wrong, {tracebacks} tracebacks, memory {memory[0]:.0f} MB and {drift:+.1%}" + "".join(
        f"; {line}" for line in told
    )
    return Outcome(sent, sent - failures, alive and not failures and not tracebacks and drift < DRIFT, note)


def fuzz_parsers(number: int) -> Outcome:
    """Coverage-guided bytes for each parser, with the project's own packages: no crash, none over 2 s or 2 GB."""
    own = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])
    failed = []
    with tempfile.TemporaryDirectory() as scratch:  # where a crash leaves its input
        for parser in PARSERS:
            command = [str(FUZZ), str(HERE / "fuzz_parsers.py"), parser, str(number // len(PARSERS)), "1"]
            done = subprocess.run(
                command, cwd=scratch, env=os.environ | {"PYTHONPATH": own}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                failed.append(f"{parser}: {done.stderr[-1500:]}")
    passed = number - len(failed) * (number // len(PARSERS))
    return Outcome(number, passed, not failed, f"{', '.join(PARSERS)}: {len(failed)} crashed" + "".join(failed))


def hostile_pictures(number: int) -> Outcome:
    """The right status for each, soon, and without much memory."""
    wrong: list[str] = []
    times = []
    with micro_server() as server, httpx2.Client(base_url=server.url, timeout=60) as client:
        for _ in range(3):
            client.post("/v1/embeddings", json={"input": "warm"})
        before, pid = server.memory(), server.process.pid
        for case in hostile_images(number):
            value = base64.b64encode(case.data).decode()
            value = f"data:{case.mime};base64,{value}" if case.mime else value
            began = time.perf_counter()
            status = client.post("/v1/embeddings", json={"input": [{"image": value}]}).status_code
            times.append(time.perf_counter() - began)
            if status not in case.right:
                wrong.append(f"{case.kind}: {status}")
        more = server.memory("VmHWM") - before
        whole = server.process.poll() is None and server.process.pid == pid and not server.tracebacks()
    p99 = float(np.quantile(times, 0.99))
    note = f"p99 {1000 * p99:.0f} ms, at most {more:.0f} MB more in memory" + "".join(f"; {w}" for w in wrong[:10])
    met = not wrong and whole and p99 < P99_SECONDS and more <= MORE_MB
    return Outcome(number, number - len(wrong), met, note)


def hostile_addresses(number: int) -> Outcome:
    """Every address of the list over HTTP with canaries on both loopbacks, and `number` fetches while names rebind."""
    import socket

    cases: list[str] = json.loads(HOSTILE_URLS.read_bytes())
    wrong = []
    with socket.create_server(("127.0.0.1", 0)) as canary, micro_server("--fetch") as server:
        canary.setblocking(False)
        with httpx2.Client(base_url=server.url, timeout=60) as client:
            for case in cases[: max(1, number)]:
                address = case.replace("{p}", str(canary.getsockname()[1]))
                if client.post("/v1/embeddings", json={"input": [{"image": address}]}).status_code != 400:
                    wrong.append(case)
        reached = 0
        try:
            while canary.accept():
                reached += 1
        except BlockingIOError:
            pass
    right, inside = rebind(number)
    tried = len(cases[: max(1, number)])
    note = (
        f"{tried} addresses and {number:,} fetches while names rebind: {reached + inside} connections to the inside"
        + "".join(f"; {case!r} was not refused" for case in wrong[:10])
    )
    passed = tried - len(wrong) + right
    return Outcome(tried + number, passed, passed == tried + number and not reached + inside, note)


def kills(number: int) -> Outcome:
    """kill -9 of writer and engine during writes: whatever was acknowledged is there."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "collection"
        folder.mkdir()
        try:
            stored = survive_kills(folder, number)
        except AssertionError as error:
            return Outcome(number, 0, False, f"lost: {error}"[:500])
    return Outcome(number, number, stored > number, f"{stored:,} points acknowledged and there")


def sigterms(number: int) -> Outcome:
    """SIGTERM under load, with one and with two workers in turn: no client is reset, and it is over in 20 s."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = save_bundle(micro_bundle(), Path(scratch) / "micro")
        runs = [drain(bundle, 1 + turn % 2) for turn in range(number)]
    passed = sum(run.good for run in runs)
    answered = sum(run.seen["200"] for run in runs)
    bad = [dict(run.seen) for run in runs if not run.good]
    note = f"{answered:,} requests answered, {max(run.seconds for run in runs):.1f} s at most"
    return Outcome(number, passed, passed == number, note + "".join(f"; {seen}" for seen in bad[:5]))
