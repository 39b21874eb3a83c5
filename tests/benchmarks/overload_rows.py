"""Figures of overload: pictures arrive four times as fast as the server can embed them, whatever it answers.

An open model: arrivals are drawn beforehand and wait for nobody; a latency counts from the moment a request was due.
The server has the first core to itself, the arrivals come from the others. Unloaded is a stream of a fifth of capacity.
"""

import asyncio
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from bench_kit import MEETS, Row
from serve_rows import Items, Load, seconds, some_items
from serve_sides import Running, ours, running, weights_of

PLACES = 3.5
"""Pictures whose time may wait: fewer leave the model idle now and then and refuse whoever comes in a burst, more make
those who are let in wait."""
UNLOADED, OVERLOAD = 0.2, 4.0
"""Arrivals by capacity."""
PEER = ("itself, unloaded", "")


@dataclass
class Seen:
    """What a stream of requests met with. Latencies in seconds from when each was due."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def percentile(self, latencies: Sequence[float], share: float) -> float:
        """By linear interpolation."""
        return float(np.quantile(latencies, share))


async def _exchange(port: int, request: bytes, idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> bytes:
    """The head of one answer, on a connection that is free, or a new one."""
    reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
    except BaseException:
        writer.close()
        raise
    if b"\r\nconnection: close" in head.lower():
        writer.close()
    else:
        idle.append((reader, writer))
    return head


async def stream(port: int, path: str, bodies: Sequence[bytes], per_second: float, seed: int = 0) -> Seen:
    """Send all of `bodies` at random moments, `per_second` of them in the mean; wait for the last answer."""
    seen = Seen()
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    due_N = np.cumsum(np.random.default_rng(seed).exponential(1 / per_second, len(bodies)))
    began = time.monotonic()

    async def one(due: float, body: bytes) -> None:
        await asyncio.sleep(began + due - time.monotonic())
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body))
        try:
            answer = await asyncio.wait_for(_exchange(port, head + body, idle), 60)
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            seen.statuses[type(error).__name__] += 1
            return
        took, status = time.monotonic() - began - due, answer[9:12].decode()
        early = b"\r\nretry-after:" not in answer.lower() and status in ("429", "503")
        seen.statuses[f"{status} without Retry-After" if early else status] += 1
        (seen.accepted if status == "200" else seen.refused).append(took)

    await asyncio.gather(*(one(float(due), body) for due, body in zip(due_N, bodies, strict=True)))
    seen.seconds = time.monotonic() - began
    for _, writer in idle:
        writer.close()
    return seen


def capacity(server: Running, items: Items, requests: int) -> float:
    """Pictures per second when there is always one more waiting."""
    return statistics.median(requests / seconds(server, Load("image", 1, requests, 2), items) for _ in range(3))


def overload_rows(model: str, rounds: int, backend: str = "auto", seconds_each: float = 20.0) -> list[Row]:
    """Goodput, latency of those that are let in and of those that are not."""
    weights, items, asking = weights_of(model), some_items(), os.sched_getaffinity(0)
    with running(ours(backend), weights) as server:
        pace = 1 / capacity(server, items, 16)
    patient = ours(backend, "--patience", f"{PLACES * pace:.4f}")
    with ExitStack() as stack:
        server = stack.enter_context(running(patient, weights))
        if len(asking) > 1:
            os.sched_setaffinity(0, asking - {min(asking)})
            stack.callback(os.sched_setaffinity, 0, asking)
        peak = capacity(server, items, 16)
        quiet: list[Seen] = []
        busy: list[Seen] = []
        for number in range(rounds):
            for share, found in ((UNLOADED, quiet), (OVERLOAD, busy)):
                rate = share * peak
                bodies = [items.take("image", 1, patient) for _ in range(max(20, round(rate * seconds_each)))]
                found.append(asyncio.run(stream(server.port, patient.path, bodies, rate, seed=number)))
    return _rows(peak, quiet, busy)


def _rows(peak: float, quiet: Sequence[Seen], busy: Sequence[Seen]) -> list[Row]:
    statuses = sum((seen.statuses for seen in busy), Counter[str]())
    honest = set(statuses) <= {"200", "429", "503"} and all(set(seen.statuses) == {"200"} for seen in quiet)
    goodput = [len(seen.accepted) / seen.seconds / peak for seen in busy]
    alone = [seen.percentile(seen.accepted, 0.99) for seen in quiet]
    slower = [seen.percentile(seen.accepted, 0.99) / base for seen, base in zip(busy, alone, strict=True)]
    refusals = [seen.percentile(seen.refused, 0.99) / 0.05 if seen.refused else 0.0 for seen in busy]
    told = ", ".join(f"{count:,} x {status}" for status, count in sorted(statuses.items()))
    stream_of = f"{OVERLOAD:g} times the capacity of {peak:.1f} pictures/s, one core: {told}"
    latency = f"p99 of accepted requests, {1000 * statistics.median(alone):.0f} ms unloaded"
    return [
        _row("overload-goodput", ("its capacity", ""), goodput, ">= 0.9", honest, stream_of),
        _row("overload-latency", PEER, slower, "<= 2", honest, latency),
        _row("overload-refusals", ("50 ms", ""), refusals, "<= 1", honest, "p99 of refusals, each with Retry-After"),
    ]


def _row(name: str, peer: tuple[str, str], ratios: Sequence[float], goal: str, equal: bool, note: str) -> Row:
    sign, limit = goal.split()
    middle, low, high = (round(pick(ratios), 3) for pick in (statistics.median, min, max))
    return Row(name, *peer, middle, low, high, goal, equal and bool(MEETS[sign](middle, float(limit))), equal, note)
