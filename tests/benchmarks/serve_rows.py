"""Figures of embedding over HTTP: the same pictures and texts, as JSON, to our server and to others.

Every picture and text is sent once only, so that nobody answers from a memory of results: a number behind the end of a
JPEG changes no pixel, and one behind a text is read like any word.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
from bench_inputs import captions, photograph
from bench_kit import Row, compare, missing, take_turns
from serve_sides import INFINITY, Running, Side, infinity, open_clip, ours, running, weights_of

COSINE = 0.9998
"""Lowest cosine of an embedding to the peer's, for two servers to be called equal."""
OURS = "vlp serve"
Kind = Literal["image", "text"]


@dataclass(frozen=True)
class Load:
    """What one round sends: `requests` of `items`, from `clients` at the same time."""

    kind: Kind
    items: int
    requests: int
    clients: int


LOADS = {
    "images-1": Load("image", 1, 16, 4),
    "images-16": Load("image", 16, 3, 2),
    "texts": Load("text", 32, 4, 2),
}
GOALS = {"images-1": (">= 4", ">= 3"), "images-16": (">= 4", ">= 3"), "texts": (">= 4", ">= 4")}
"""Against open_clip's route, against infinity."""


@dataclass(frozen=True)
class Items:
    """Pictures and captions, endlessly, none twice."""

    pictures: Sequence[bytes]
    texts: Sequence[str]
    number: Iterator[int]

    def take(self, kind: Kind, items: int, side: Side) -> bytes:
        """The body of a request."""
        numbers = [next(self.number) for _ in range(items)]
        if kind == "image":
            pictures = [self.pictures[n % len(self.pictures)] + n.to_bytes(8, "big") for n in numbers]
            return json.dumps(side.images(pictures)).encode()
        return json.dumps(side.texts([f"{self.texts[n % len(self.texts)]} {n}" for n in numbers])).encode()


def some_items(pictures: int = 32) -> Items:
    """Photographs of 640 x 480 and captions in English: infinity does not clean texts in other scripts as CLIP does."""
    made = [photograph(number, (640, 480)) for number in range(pictures)]
    return Items(made, captions(512, foreign=0.0), count())


def seconds(server: Running, load: Load, items: Items) -> float:
    """Time until all requests of a round are answered; bodies are made before the clock runs."""
    bodies = [items.take(load.kind, load.items, server.side) for _ in range(load.requests)]
    shares = [bodies[start :: load.clients] for start in range(load.clients)]
    with ThreadPoolExecutor(load.clients) as pool:
        began = time.perf_counter()
        answers = [answer for part in pool.map(server.post, shares) for answer in part]
        took = time.perf_counter() - began
    assert sum(len(server.side.rows(answer)) for answer in answers) == load.items * load.requests
    return took


def alike(one: Running, other: Running, kind: Kind, items: Items) -> float:
    """Lowest cosine between the answers of two servers to 16 items."""
    if kind == "image":
        found = [server.embed(images=items.pictures[:16]) for server in (one, other)]
    else:
        found = [server.embed(texts=items.texts[:16]) for server in (one, other)]
    norms_N = np.prod([np.linalg.norm(rows_ND, axis=1) for rows_ND in found], axis=0)
    return float(((found[0] * found[1]).sum(axis=1) / norms_N).min())


def embedding_rows(model: str, rounds: int, backend: str = "auto", scale: float = 1.0) -> list[Row]:
    """All rows of LOADS against both peers; with `scale` below 1 fewer requests are sent."""
    weights, items = weights_of(model), some_items()
    peers = [open_clip(), *([infinity()] if INFINITY.exists() else [])]
    asking = os.sched_getaffinity(0)
    rows = []
    with ExitStack() as stack:
        servers = [stack.enter_context(running(side, weights)) for side in (ours(backend, "--patience", "60"), *peers)]
        if len(asking) > 1:  # the first core is the servers'
            os.sched_setaffinity(0, asking - {min(asking)})
            stack.callback(os.sched_setaffinity, 0, asking)
        for name, load in LOADS.items():
            smaller = Load(load.kind, load.items, math.ceil(load.requests * scale), load.clients)
            rows += _rows_of(name, servers, smaller, items, rounds)
    if len(peers) == 1:
        why = f"infinity-emb is not in {INFINITY.parents[1]}: make bench-serve installs it"
        rows += [
            missing(f"{name}-infinity", (infinity().name, infinity().version), GOALS[name][1], why) for name in LOADS
        ]
    return rows


def _rows_of(name: str, servers: Sequence[Running], load: Load, items: Items, rounds: int) -> list[Row]:
    cosines = [alike(servers[0], peer, load.kind, items) for peer in servers[1:]]

    def variant(server: Running) -> Callable[[], float]:
        return lambda: seconds(server, load, items)

    taken = take_turns({server.side.name: variant(server) for server in servers}, rounds)
    rates = {side: load.items * load.requests / float(np.median(times)) for side, times in taken.items()}
    rows = []
    for number, peer in enumerate(servers[1:]):
        note = (
            f"{load.requests} requests of {load.items}, {load.clients} at a time, one core: {rates[OURS]:.1f}/s, peer "
            f"{rates[peer.side.name]:.1f}/s; lowest cosine {cosines[number]:.6f}"
        )
        row = f"{name}-{('open_clip', 'infinity')[number]}", (peer.side.name, peer.side.version)
        equal = cosines[number] >= COSINE
        rows.append(compare(*row, taken[OURS], taken[peer.side.name], GOALS[name][number], equal, note))
    return rows
