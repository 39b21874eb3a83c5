"""What every index promises, tried on each of them: embedded, embedded in a process of its own, Qdrant's client.

The client runs in its in-memory mode, because a Qdrant server is not at hand everywhere;
`VLP_TEST_QDRANT=URL` adds one.
"""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.index import FilterError, Index, IndexInfo, NoKeywords, Point, PointId, as_id
from server.index.cluster import ClusterStore
from server.index.edge import create_index, open_index
from server.index.remote import EdgeProcess, create_empty
from server.index.scan import ScanIndex

DIM = 24
FIELDS: dict[str, Any] = {"source": "keyword", "n": "integer", "price": "float", "flag": "bool", "exif.iso": "integer"}
INFO = IndexInfo(dim=DIM, model="m", fields=FIELDS, captions="caption")
WORDS = ["red", "green", "blue", "tall", "round"]
A, B = (str(uuid.UUID(int=n)) for n in (1, 2))

KINDS = ["edge", "process", "scan", "memory", *(["server"] if os.environ.get("VLP_TEST_QDRANT") else [])]
Make = Callable[[IndexInfo], Index]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """How to make an empty index of one kind."""
    made: list[Any] = []

    def build(info: IndexInfo) -> Index:
        name = f"vlp-test-{uuid.uuid4().hex}"
        index: Index
        if request.param in ("edge", "scan"):
            edge = create_index(tmp_path / "edge", info)
            index = edge if request.param == "edge" else ScanIndex(edge)
        elif request.param == "process":
            create_empty(tmp_path, info)
            index = EdgeProcess(tmp_path)
        else:
            index = of_cluster(name, info)
        made.append(index)
        return index

    def of_cluster(name: str, info: IndexInfo) -> Index:
        store = ClusterStore(":memory:" if request.param == "memory" else os.environ["VLP_TEST_QDRANT"])
        request.addfinalizer(store.close)
        index = store.create(name, info)
        request.addfinalizer(lambda: store.drop(name))
        return index

    yield build
    for index in made:
        index.close()


def rows(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    found = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    unit: np.ndarray[Any, np.dtype[np.float32]] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def payload(n: int) -> dict[str, Any]:
    return {
        "source": f"s{n % 3}",
        "n": n,
        "price": n / 2,
        "flag": n % 2 == 0,
        "exif.iso": n % 4,
        "caption": f"a {WORDS[n % 5]} thing number{n}",
        "nested": {"list": [1, {"deep": None}], "text": "\u00e9\n\u732b"},
    }


def fill(index: Index, count: int = 60) -> np.ndarray[Any, np.dtype[np.float32]]:
    vectors = rows(count)
    index.upsert([Point(n, payload(n), vectors[n]) for n in range(count)])
    return vectors


CASES: list[tuple[dict[str, Any], Callable[[int], bool]]] = [
    ({}, lambda n: True),
    ({"source": "s1"}, lambda n: n % 3 == 1),
    ({"source": ["s1", "s2"]}, lambda n: n % 3 > 0),
    ({"source": {"not": "s1"}}, lambda n: n % 3 != 1),
    ({"source": {"not": ["s1", "s2"]}}, lambda n: n % 3 == 0),
    ({"n": 7}, lambda n: n == 7),
    ({"n": {"gte": 10, "lt": 20}}, lambda n: 10 <= n < 20),
    ({"price": {"gt": 10, "lte": 20.5}}, lambda n: 20 < n <= 41),
    ({"flag": True}, lambda n: n % 2 == 0),
    ({"flag": False, "source": "s0"}, lambda n: n % 2 == 1 and n % 3 == 0),
    ({"exif.iso": [1, 2]}, lambda n: n % 4 in (1, 2)),
    ({"flag": {"not": True}, "n": {"lt": 9}}, lambda n: n % 2 == 1 and n < 9),
]


def test_filters_equal_a_scan(make: Make) -> None:
    index = make(INFO)
    vectors = fill(index)
    query = rows(1, seed=5)[0]
    for where, keep in CASES:
        passing = [n for n in range(60) if keep(n)]
        best = sorted(passing, key=lambda n: -float(vectors[n] @ query))[:7]
        for exact in (True, False):
            hits = index.search(query, 7, where, exact, vectors=True)
            assert [hit.id for hit in hits] == best, where
            np.testing.assert_allclose([hit.score for hit in hits], vectors[best] @ query, atol=1e-5)
            np.testing.assert_allclose(np.array([hit.vector for hit in hits]), vectors[best], atol=1e-6)
        assert index.count(where) == len(passing)
        assert [point.id for point in index.scroll(None, 100, where)[0]] == passing
    assert index.search(query, 1)[0].vector is None
    with pytest.raises(FilterError, match="this index has: exif.iso, flag, n, price, source"):
        index.search(query, 1, {"caption": "a"})
    with pytest.raises(FilterError, match="range"):
        index.count({"price": 3.5})


def test_points_come_back_as_they_were(make: Make) -> None:
    index = make(INFO)
    vectors = fill(index, 5)
    index.upsert([Point(A, {"caption": "uuid"}, rows(1, 9)[0]), Point(2**64 - 1, {}, rows(1, 8)[0])])
    assert index.info.points == index.count() == 7
    found = index.get([A, 3, 99, 2**64 - 1, 0], vectors=True)
    assert [point.id for point in found] == [A, 3, 2**64 - 1, 0]
    assert found[1].payload == payload(3)
    assert found[2].payload == {}
    assert found[1].vector is not None
    np.testing.assert_allclose(found[1].vector, vectors[3], atol=1e-6)
    assert index.get([3])[0].vector is None
    assert index.get([]) == []


def test_an_upsert_replaces_the_whole_point(make: Make) -> None:
    index = make(INFO)
    fill(index, 5)
    new = rows(1, seed=3)[0]
    index.upsert([Point(2, {"source": "new"}, new)])
    assert index.info.points == 5
    assert index.get([2])[0].payload == {"source": "new"}
    assert index.search(new, 1)[0].id == 2
    assert index.search(new, 1)[0].score == pytest.approx(1, abs=1e-5)
    assert [hit.id for hit in index.keywords("blue", 5)] == [], "the old caption is still found"
    assert index.count({"n": 2}) == 0


def test_deleted_points_are_gone(make: Make) -> None:
    index = make(INFO)
    vectors = fill(index, 8)
    index.delete([1, 2, 77, B])
    index.delete([])
    assert index.info.points == index.count() == 6
    assert [point.id for point in index.get([1, 2, 3])] == [3]
    assert index.search(vectors[1], 8)[0].id != 1
    assert 1 not in [hit.id for hit in index.keywords("green", 10)]
    index.upsert([Point(1, {}, vectors[1])])
    assert index.search(vectors[1], 1)[0].id == 1


def test_keywords_rank_by_bm25(make: Make) -> None:
    index = make(INFO)
    fill(index, 10)
    hits = index.keywords("the RED number3", 10, vectors=True)
    assert hits[0].id == 3, "the rare word counts most"
    assert {hit.id for hit in hits} == {3, 0, 5}
    assert hits[0].score > hits[1].score > 0
    assert hits[0].vector is not None
    assert [hit.id for hit in index.keywords("red", 10, {"n": {"gte": 1}})] == [5]
    assert index.keywords("", 5) == index.keywords("the a of", 5) == index.keywords("zebra", 5) == []
    with pytest.raises(FilterError):
        index.keywords("red", 5, {"zzz": 1})


def test_without_captions_keywords_are_refused(make: Make) -> None:
    index = make(IndexInfo(dim=DIM, fields={}))
    index.upsert([Point(1, {"caption": "red"}, rows(1)[0])])
    with pytest.raises(NoKeywords, match="without captions"):
        index.keywords("red", 5)


def test_scrolling_meets_every_point_once(make: Make) -> None:
    index = make(INFO)
    fill(index, 23)
    index.upsert([Point(A, {}, rows(1)[0]), Point(B, {}, rows(1)[0])])
    seen: list[PointId] = []
    after: PointId | None = None
    while True:
        points, after = index.scroll(after, 7, vectors=True)
        assert all(point.vector is not None for point in points)
        seen += [point.id for point in points]
        if after is None:
            break
    assert sorted(seen, key=str) == sorted([*range(23), A, B], key=str)


@pytest.mark.parametrize("value", [-1, 2**64, True, 1.0, None, "", "7", "x" * 36, "1" * 5000])
def test_what_is_no_id(value: Any) -> None:
    with pytest.raises(ValueError, match="UUID"):
        as_id(value)


def test_ids_have_one_form() -> None:
    assert as_id(A.upper()) == as_id(f"{{{A}}}") == as_id(A.replace("-", "")) == A
    assert as_id(0) == 0


def test_embedded_collections_of_format_1_still_open(tmp_path: Path) -> None:
    """Those have one unnamed vector, no words, and an index.json without the newer keys."""
    import json

    import qdrant_edge as qe

    (tmp_path / "edge").mkdir()
    shard = qe.EdgeShard.create(
        str(tmp_path / "edge"),
        qe.EdgeConfig(
            vectors=qe.EdgeVectorParams(size=DIM, distance=qe.Distance.Cosine),
            quantization_config=qe.ScalarQuantizationConfig(type=qe.ScalarType.Int8, memory=qe.Memory.Pinned),
        ),
    )
    shard.update(qe.UpdateOperation.create_field_index("key", qe.PayloadSchemaType.Keyword))
    shard.update(qe.UpdateOperation.upsert_points([qe.Point(5, rows(1)[0].tolist(), {"key": "k"})]))
    shard.flush()
    shard.close()
    old = {
        "format": 1,
        "dim": DIM,
        "modality": "image",
        "model": "m",
        "weights_sha256": "",
        "fields": {"key": "keyword"},
    }
    (tmp_path / "index.json").write_text(json.dumps({**old, "points": 1}))
    index = open_index(tmp_path)
    index.upsert([Point(6, {"key": "l"}, rows(1, 2)[0])])
    assert [hit.id for hit in index.search(rows(1)[0], 1, {"key": "k"}, vectors=True)] == [5]
    assert index.info.points == 2
    with pytest.raises(NoKeywords):
        index.keywords("k", 1)
    index.close()


def test_thumbnails_come_and_go_with_their_points(make: Make) -> None:
    index = make(INFO.model_copy(update={"thumbnails": 64}))
    big = 2**64 - 1
    ids: list[PointId] = [1, big, A, B]
    vectors = rows(4)
    index.upsert([Point(id, payload(n), vectors[n], b"jpeg %d" % n) for n, id in enumerate(ids)])
    assert index.thumbnails([*ids, 7]) == {id: b"jpeg %d" % n for n, id in enumerate(ids)}
    assert index.get([1]) == [Point(1, payload(0))], "reading a point does not bring it along"
    index.upsert([Point(1, payload(0), vectors[0], b"other"), Point(big, payload(1), vectors[1])])
    assert index.thumbnails([1, big]) == {1: b"other"}
    index.delete([A, 99])
    assert index.thumbnails(ids) == {1: b"other", B: b"jpeg 3"}


def test_an_index_made_without_thumbnails_keeps_none(make: Make) -> None:
    index = make(INFO)
    index.upsert([Point(1, payload(0), rows(1)[0], b"jpeg")])
    assert index.thumbnails([1]) == {}
    index.delete([1])
