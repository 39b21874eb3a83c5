"""What is acknowledged survives kill -9, and an embedded collection can be rebuilt while it is read and written."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines.errors import PipelineError
from server.index import IndexFailure, IndexInfo, Point
from server.index.edge import INFO, open_index, read_info
from server.index.remote import EdgeProcess, create_empty
from server.index.stores import CREATING, DROPPED, FolderStore

ROOT = Path(__file__).parents[2]
DIM = 32
INFO_OF_TESTS = IndexInfo(dim=DIM, fields={"n": "integer", "flag": "bool"}, captions="caption")

WRITER = """
import sys
from pathlib import Path
import numpy as np
from server.index import Point
from server.index.remote import EdgeProcess

folder, first = Path(sys.argv[1]), int(sys.argv[2])
index = EdgeProcess(folder)
print("ready", flush=True)
for batch in range(10**6):
    ids = range(first + batch * 5, first + batch * 5 + 5)
    rows = [np.random.default_rng(id).standard_normal(32).astype(np.float32) for id in ids]
    index.upsert([Point(id, {"n": id, "flag": True, "caption": f"number{id}"}, row) for id, row in zip(ids, rows)])
    print("stored", ids[-1], flush=True)
    if batch % 4 == 3:
        index.delete([ids[0]])
        print("deleted", ids[0], flush=True)
"""


def row(number: int) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.random.default_rng(number).standard_normal(DIM).astype(np.float32)
    return found


def point(number: int) -> Point:
    return Point(number, {"n": number, "flag": number % 2 == 0, "caption": f"number{number}"}, row(number))


@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_every_acknowledged_write_survives_kill_9(kills: int, tmp_path: Path) -> None:
    """Writer and engine are killed together, at any moment, again and again on the same collection."""
    folder = tmp_path / "c"
    folder.mkdir()
    create_empty(folder, INFO_OF_TESTS)
    chance = random.Random(0)
    stored: set[int] = set()
    deleted: set[int] = set()
    first = 0
    for _ in range(kills):
        said = written_until_killed(folder, first, chance.uniform(0.0, 0.4))
        for kind, number in said:
            if kind == "stored":
                stored.update(range(number - 4, number + 1))
            else:
                deleted.add(number)
        index = open_index(folder, patience=10)  # the engine is no child of ours to wait for
        points = {int(p.id): p for p in index.get(sorted(stored | deleted), vectors=True)}
        # the last thing that was begun may have been a deletion that nobody acknowledged
        begun = {number - 4 for kind, number in said[-1:] if kind == "stored"}
        stored -= begun - set(points)
        assert set(points) == stored - deleted, "what was acknowledged is not what is there"
        for number in chance.sample(sorted(points), min(20, len(points))):
            expected = row(number) / np.linalg.norm(row(number))
            np.testing.assert_allclose(points[number].vector, expected, atol=1e-6)  # type: ignore[arg-type]
            assert points[number].payload["n"] == number
            assert [hit.id for hit in index.keywords(f"number{number}", 1)] == [number]
            assert index.search(row(number), 1, {"n": number}, True)[0].id == number
        index.close()
        first = (max(stored, default=0) // 1000 + 1) * 1000
    assert len(stored) > kills * 5


def written_until_killed(folder: Path, first: int, after: float) -> list[tuple[str, int]]:
    """What a writer had acknowledged when it and its engine were killed, `after` seconds after its first write."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(first)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
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


@pytest.fixture
def index(tmp_path: Path) -> Any:
    folder = tmp_path / "c"
    folder.mkdir()
    create_empty(folder, INFO_OF_TESTS)
    made = EdgeProcess(folder)
    yield made
    made.close()


def test_a_dead_engine_is_replaced_and_nothing_is_lost(index: EdgeProcess) -> None:
    index.upsert([point(n) for n in range(20)])
    for _ in range(2):
        os.kill(index._engine.process.pid, signal.SIGKILL)
        assert [hit.id for hit in index.search(row(7), 1)] == [7]
        os.kill(index._engine.process.pid, signal.SIGKILL)
        index.upsert([point(n) for n in range(20, 30)])
    assert index.count() == index.info.points == 30


def test_a_folder_opens_once_and_not_at_all_when_damaged(index: EdgeProcess, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="another process has this index open"):
        EdgeProcess(tmp_path / "c")
    index.upsert([point(1)])
    index.close()
    assert read_info(tmp_path / "c").points == 1
    with pytest.raises(IndexFailure):
        index.count()
    for path in (tmp_path / "c" / "edge").rglob("*.json"):
        path.write_text("{")
    with pytest.raises(PipelineError, match="damaged"):
        EdgeProcess(tmp_path / "c")


def test_compaction_while_it_is_read_and_written(index: EdgeProcess, tmp_path: Path) -> None:
    index.upsert([point(n) for n in range(1500)])
    done: list[bool] = []
    compaction = threading.Thread(target=lambda: done.append(index.compact()))
    compaction.start()
    number, searches = 1500, 0
    while compaction.is_alive():
        index.upsert([point(number), Point(number % 700, {"n": -1}, row(number + 10**6))])
        index.delete([700 + number % 700])
        assert [hit.id for hit in index.search(row(1450), 1)] == [1450]
        number, searches = number + 1, searches + 1
    assert done == [True]
    assert searches > 3, "the compaction stood in the way"
    assert index.info.shard == "edge-1"
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["edge-1", INFO]
    deleted = {700 + n % 700 for n in range(1500, number)}
    replaced = {n % 700 for n in range(1500, number)}
    after = {p.id: p for at in range(0, number, 500) for p in index.get(range(at, min(at + 500, number)), vectors=True)}
    assert set(after) == set(range(number)) - deleted
    assert {n for n, p in after.items() if p.payload == {"n": -1}} == replaced
    assert index.info.points == index.count() == len(after)
    assert index.compact(fields={"n": "integer"})
    assert index.count({"n": -1}) == len(replaced)
    assert json.loads((tmp_path / "c" / INFO).read_text())["fields"] == {"n": "integer"}


def test_a_compaction_that_dies_changes_nothing(index: EdgeProcess, tmp_path: Path) -> None:
    index.upsert([point(n) for n in range(600)])
    failed: list[Exception] = []

    def compact() -> None:
        try:
            index.compact()
        except IndexFailure as error:
            failed.append(error)

    compaction = threading.Thread(target=compact)
    compaction.start()
    while index._made is None:
        assert compaction.is_alive()
        time.sleep(0.005)
    os.kill(index._made.process.pid, signal.SIGKILL)
    compaction.join()
    assert len(failed) == 1
    assert index.count() == 600
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["edge", INFO]
    (tmp_path / "c" / "edge-7").mkdir()  # what a kill of the whole server leaves
    index.close()
    again = EdgeProcess(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["edge", INFO]
    assert again.compact()
    assert again.count() == 600
    again.close()


def test_an_interrupted_creation_or_drop_is_cleared_away(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.create("kept", INFO_OF_TESTS).close()
    for name in (f"{CREATING}x", f"{DROPPED}y"):
        (tmp_path / "store" / name).mkdir()
    (tmp_path / "store" / "foreign").mkdir()
    with pytest.raises(FileExistsError):
        store.create("kept", INFO_OF_TESTS)
    store = FolderStore(tmp_path / "store")
    assert store.names() == ["kept"]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["foreign", "kept"]
    store.drop("kept")
    assert store.names() == []
    with pytest.raises(PipelineError, match="no index here"):
        store.open("kept")
    with pytest.raises(PipelineError, match="no name"):
        store.open("../store")
