"""What is acknowledged survives kill -9, and an embedded collection can be rebuilt while it is read and written."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from index_kills import INFO as FIELDS_OF_TESTS
from index_kills import point, row, survive_kills

from data_pipelines.errors import PipelineError
from server.index import IndexFailure, Point
from server.index.edge import INFO, read_info
from server.index.remote import EdgeProcess, create_empty
from server.index.stores import CREATING, DROPPED, FolderStore


def test_every_acknowledged_write_survives_kill_9(tmp_path: Path) -> None:
    """Two hundred: `make prove-server PROOFS=kills`."""
    folder = tmp_path / "c"
    folder.mkdir()
    assert survive_kills(folder, 3) > 15


@pytest.fixture
def index(tmp_path: Path) -> Any:
    folder = tmp_path / "c"
    folder.mkdir()
    create_empty(folder, FIELDS_OF_TESTS)
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
    store.create("kept", FIELDS_OF_TESTS).close()
    for name in (f"{CREATING}x", f"{DROPPED}y"):
        (tmp_path / "store" / name).mkdir()
    (tmp_path / "store" / "foreign").mkdir()
    with pytest.raises(FileExistsError):
        store.create("kept", FIELDS_OF_TESTS)
    store = FolderStore(tmp_path / "store")
    assert store.names() == ["kept"]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["foreign", "kept"]
    store.drop("kept")
    assert store.names() == []
    with pytest.raises(PipelineError, match="no index here"):
        store.open("kept")
    with pytest.raises(PipelineError, match="no name"):
        store.open("../store")
