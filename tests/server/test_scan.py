"""The int8 scan against a float32 one: equal, whatever was added, replaced and removed before."""

import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from server.index import Index, IndexInfo, Point, PointId
from server.index.edge import create_index
from server.index.scan import ROUND, Scan, ScanIndex

DIM = 96


def unit(rows: int, seed: int, tight: float = 0.0) -> NDArray[np.float32]:
    """Rows of length 1; the nearer `tight` is to 1, the more alike they are."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((rows, DIM))
    found += tight * 40 * rng.standard_normal(DIM)
    made: NDArray[np.float32] = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return made


def exact(kept: dict[PointId, NDArray[np.float32]], query: NDArray[np.float32], limit: int) -> list[float]:
    scores = np.sort([float(np.dot(row, query)) for row in kept.values()])[::-1]
    found: list[float] = scores[:limit].tolist()
    return found


@pytest.mark.parametrize("tight", [0.0, 0.5, 1.0])
def test_the_best_are_the_best_of_a_float32_scan(tight: float) -> None:
    """Also among rows so alike that int8 cannot tell them apart."""
    rows = unit(5000, 1, tight)
    scan = Scan(DIM)
    scan.put(range(5000), rows)
    for query in unit(20, 2, tight):
        found = scan.search(query, 10)
        order = np.argsort(-(rows @ query))[:10]
        np.testing.assert_allclose([score for _, score, _ in found], (rows @ query)[order], rtol=1e-5)
        assert len({id for id, _, _ in found} & set(order.tolist())) >= 9, (
            "ties in the last bit apart, these are the ids"
        )


def test_rows_come_and_go() -> None:
    scan = Scan(DIM)
    kept: dict[PointId, NDArray[np.float32]] = {}
    rng = np.random.default_rng(0)
    rows = unit(6 * ROUND, 3)
    for turn in range(30):
        ids: list[PointId] = [*rng.integers(0, 2000, 150).tolist(), f"u{turn}"]
        fresh = rows[rng.integers(0, len(rows), len(ids))]
        scan.put(ids, fresh)
        kept.update(zip(ids, fresh, strict=True))
        gone = [*rng.integers(0, 2500, 60).tolist(), f"u{turn - 1}"]
        scan.remove(gone)
        for id in gone:
            kept.pop(id, None)
        assert len(scan) == len(kept)
        found = scan.search(rows[turn], 12)
        np.testing.assert_allclose([score for _, score, _ in found], exact(kept, rows[turn], 12), rtol=1e-5)
        for id, score, row in found:
            np.testing.assert_array_equal(row, kept[id])
            assert score == pytest.approx(float(np.dot(row, rows[turn])), rel=1e-5)
    assert len(scan._rows.alive_N) < 6 * ROUND, "replaced rows are never cleared away"
    scan.remove(list(kept))
    assert scan.search(rows[0], 5) == []
    assert scan.search(rows[0], 5) == Scan(DIM).search(rows[0], 5)


def test_searching_while_writing(tmp_path: Any) -> None:
    """A search meets each point as it was or as it is, and never half."""
    index = ScanIndex(create_index(tmp_path / "edge", IndexInfo(dim=DIM, fields={})))
    rows = unit(400, 4)
    index.upsert([Point(n, {"n": n}, row) for n, row in enumerate(rows)])
    assert index.search(rows[3], 1)[0].id == 3
    stop = threading.Event()
    wrong: list[Any] = []

    def read() -> None:
        while not stop.is_set():
            (hit,) = index.search(rows[7], 1)
            if hit.id != 7 or abs(hit.score - 1) > 1e-5:
                wrong.append(hit)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(20):
        index.upsert([Point(1000 + turn * 50 + n, {}, row) for n, row in enumerate(unit(50, 10 + turn))])
        index.delete(range(1000 + turn * 50, 1000 + turn * 50 + 25))
        index.upsert([Point(7, {"turn": turn}, rows[7])])
    stop.set()
    reader.join()
    assert not wrong
    index.close()


def loaded(index: ScanIndex) -> bool:
    return index._scan is not None


def test_large_collections_go_without(tmp_path: Any) -> None:
    inner: Index = create_index(tmp_path / "edge", IndexInfo(dim=DIM, fields={"n": "integer"}))
    index = ScanIndex(inner, most_bytes=4 * DIM * 100, exact_below=50)
    rows = unit(200, 5)
    index.upsert([Point(n, {"n": n}, row) for n, row in enumerate(rows[:60])])
    index.search(rows[0], 1)
    assert not loaded(index), "scanned without need"
    assert index.search(rows[0], 1, exact=True)[0].id == 0
    assert loaded(index)
    assert index.search(rows[0], 1, {"n": 5}, exact=True)[0].id == 5
    index.upsert([Point(n, {"n": n}, rows[n]) for n in range(60, 200)])
    assert not loaded(index), "more is held than may be"
    assert index.search(rows[150], 1, exact=True)[0].id == 150
    index.close()
