"""kill -9 of an index's writer and its engine together, at any moment, again and again on the same collection."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from bench_kit import ROOT
from numpy.typing import NDArray

from server.index import IndexInfo, Point
from server.index.edge import open_index
from server.index.remote import create_empty

DIM = 32
INFO = IndexInfo(dim=DIM, fields={"n": "integer", "flag": "bool"}, captions="caption")

WRITER = """
import sys
from pathlib import Path
from index_kills import point
from server.index.remote import EdgeProcess

folder, first = Path(sys.argv[1]), int(sys.argv[2])
index = EdgeProcess(folder)
print("ready", flush=True)
for batch in range(10**6):
    ids = range(first + batch * 5, first + batch * 5 + 5)
    index.upsert([point(id) for id in ids])
    print("stored", ids[-1], flush=True)
    if batch % 4 == 3:
        index.delete([ids[0]])
        print("deleted", ids[0], flush=True)
"""


def row(number: int) -> NDArray[np.float32]:
    """The vector of a point, not normalised."""
    found: NDArray[np.float32] = np.random.default_rng(number).standard_normal(DIM).astype(np.float32)
    return found


def point(number: int) -> Point:
    """Point number `number`: all of it follows from the number."""
    return Point(number, {"n": number, "flag": number % 2 == 0, "caption": f"number{number}"}, row(number))


def survive_kills(folder: Path, kills: int, seed: int = 0) -> int:
    """How many points were acknowledged in all. Raises AssertionError when one of them is not there after a kill.

    `folder` is there and empty.
    """
    create_empty(folder, INFO)
    chance = random.Random(seed)
    stored: set[int] = set()
    deleted: set[int] = set()
    for _ in range(kills):
        first = (max(stored, default=0) // 1000 + 1) * 1000 if stored else 0
        said = written_until_killed(folder, first, chance.uniform(0.0, 0.4))
        for kind, number in said:
            if kind == "stored":
                stored.update(range(number - 4, number + 1))
            else:
                deleted.add(number)
        # the last thing that was begun may have been a deletion that nobody acknowledged
        begun = {number - 4 for kind, number in said[-1:] if kind == "stored"}
        stored -= begun & _check(folder, stored, deleted, begun, chance)
    return len(stored)


def _check(folder: Path, stored: set[int], deleted: set[int], begun: set[int], chance: random.Random) -> set[int]:
    """Those of `begun` that are gone."""
    index = open_index(folder, patience=10)  # the engine is no child of ours to wait for
    points = {int(p.id): p for p in index.get(sorted(stored | deleted), vectors=True)}
    gone = begun - set(points)
    assert set(points) == stored - deleted - gone, "what was acknowledged is not what is there"
    for number in chance.sample(sorted(points), min(20, len(points))):
        expected = row(number) / np.linalg.norm(row(number))
        np.testing.assert_allclose(points[number].vector, expected, atol=1e-6)  # type: ignore[arg-type]
        assert points[number].payload == point(number).payload
        assert [hit.id for hit in index.keywords(f"number{number}", 1)] == [number]
        assert index.search(row(number), 1, {"n": number}, True)[0].id == number
    index.close()
    return gone


def written_until_killed(folder: Path, first: int, after: float) -> list[tuple[str, int]]:
    """What a writer had acknowledged when it and its engine were killed, `after` seconds after its first write."""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(first)], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    try:
        assert process.stdout.readline() == "ready\n"
        lines.append(process.stdout.readline())
        time.sleep(after)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        with process.stdout:
            lines += process.stdout.read().splitlines()
        process.wait()
    whole = [line.split() for line in lines if len(line.split()) == 2]
    return [(kind, int(number)) for kind, number in whole]
