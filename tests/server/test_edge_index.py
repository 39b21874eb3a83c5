"""The Qdrant Edge index by itself: exactness, filters through the graph, persistence, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines.errors import PipelineError
from server.index import FilterError, IndexInfo
from server.index.build import build_index, count_rows
from server.index.edge import EdgeIndex, create_index, open_index

DIM = 384


def clustered(rows: int, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors around a few hundred centres, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((300, DIM))
    found = centres[rng.integers(0, 300, rows)] + 0.7 * rng.standard_normal((rows, DIM))
    unit: NDArray[np.float32] = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return unit


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    return clustered(12_000)


@pytest.fixture(scope="module")
def big(vectors: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An index large enough for a graph and quantisation; one row in ten passes tenth=3, one in a hundred part=p7."""
    folder = tmp_path_factory.mktemp("big")
    index = create_index(folder, IndexInfo(dim=DIM, fields={"tenth": "integer", "part": "keyword"}))
    for at in range(0, len(vectors), 1000):
        ids = range(at, at + 1000)
        index.add(ids, vectors[at : at + 1000], [{"tenth": n % 10, "part": f"p{n % 100}"} for n in ids])
    index.finish()
    yield index
    index.close()


@pytest.mark.parametrize(
    ("where", "step"),
    [
        ({}, 1),
        ({"tenth": 3}, 10),
        ({"part": "p7"}, 100),
        ({"tenth": [1, 2, 3, 4, 5, 6]}, 0),
        ({"tenth": 7, "part": "p7"}, 100),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_filtered_search_equals_a_filtered_scan(
    where: dict[str, Any], step: int, exact: bool, big: EdgeIndex, vectors: NDArray[np.float32]
) -> None:
    """Recall through graph and int8 is as good as the scan.

    Six tenths of the rows are more than full_scan_threshold (in KB), so that filter really walks the graph. That the
    payload indexes precede the points, without which recall at 100,000 rows falls to .03-.17, the next test shows.
    """
    assert big._shard.info().indexed_vectors_count == len(vectors), "no graph was built: the test would prove nothing"
    numbers = np.arange(len(vectors))
    passing = np.isin(numbers % 10, [1, 2, 3, 4, 5, 6]) if step == 0 else numbers % step == {1: 0, 10: 3, 100: 7}[step]
    queries = vectors[::801] + 0.02 * clustered(len(vectors[::801]), seed=1)
    found = right = 0
    for query in queries:
        scores = np.where(passing, vectors @ query, -np.inf)
        best = set(np.argsort(-scores)[:10].tolist())
        hits = big.search(query, 10, where, exact)
        assert all(passing[int(hit.id)] for hit in hits)
        found += len(hits)
        right += len(best & {hit.id for hit in hits})
    assert found == 10 * len(queries)
    assert right / found >= (1.0 if exact else 0.95)


def test_payload_indexes_exist_before_the_first_point(tmp_path: Path) -> None:
    index = create_index(tmp_path / "empty", IndexInfo(dim=4, fields={"flag": "bool", "labels": "keyword"}))
    schema = index._shard.info().payload_schema
    assert sorted(schema) == ["flag", "labels"]
    assert index._shard.info().points_count == 0
    index.close()


def test_it_persists_and_is_locked_while_open(tmp_path: Path) -> None:
    rows = clustered(200)
    index = create_index(tmp_path / "index", IndexInfo(dim=DIM, fields={"flag": "bool"}))
    index.add(range(200), rows, [{"flag": n % 2 == 0, "caption": f"c{n}"} for n in range(200)])
    index.finish()
    before = index.search(rows[5], 5, {"flag": False}, False)
    with pytest.raises(PipelineError, match="another process has this index open"):
        open_index(tmp_path / "index")
    index.close()
    again = open_index(tmp_path / "index")
    assert again.info.points == 200
    assert again.search(rows[5], 5, {"flag": False}, False) == before
    assert before[0].id == 5
    assert before[0].payload == {"flag": False, "caption": "c5"}
    with pytest.raises(FilterError, match="this index has: flag"):
        again.search(rows[5], 5, {"caption": "c5"}, False)
    again.close()


def test_building_replaces_an_index_and_nothing_else(embeddings: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    steps: list[int] = []
    first = build_index(embeddings, out, "image", [], steps.append)
    assert sum(steps) == first.points == count_rows(embeddings, "image") == 60
    second = build_index(embeddings, out, "text", ["width"], steps.append)
    assert (second.modality, sorted(second.fields)) == ("text", ["key", "labels", "source", "width"])
    assert [path.name for path in tmp_path.iterdir()] == ["index"], "temporary folders stay behind"
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "a.jpg").write_bytes(b"dear")
    with pytest.raises(PipelineError, match="is not an index"):
        build_index(embeddings, foreign, "image", [], steps.append)
    assert (foreign / "a.jpg").read_bytes() == b"dear"


@pytest.mark.parametrize(
    ("field", "message"), [("nope", "no such column"), ("score", "cannot be filtered by; text, numbers")]
)
def test_fields_that_cannot_be_indexed(field: str, message: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.ones((1, 4), np.float16))
    pq.write_table(pa.table({"image_path": ["a"], "score": [{"a": 1}]}), tmp_path / "metadata" / "metadata_0.parquet")
    with pytest.raises(PipelineError, match=message):
        build_index(tmp_path, tmp_path / "index", "image", [field], lambda _: None)
    assert build_index(tmp_path, tmp_path / "index", "image", [], lambda _: None).points == 1


def test_damaged_embeddings_are_refused_and_leave_nothing(embeddings: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "emb"
    shutil.copytree(embeddings, copy)
    array = np.load(copy / "img_emb" / "img_emb_1.npy")
    array[3] = np.nan
    np.save(copy / "img_emb" / "img_emb_1.npy", array)
    with pytest.raises(PipelineError, match="zero or not finite"):
        build_index(copy, tmp_path / "index", "image", [], lambda _: None)
    np.save(copy / "img_emb" / "img_emb_1.npy", array[:3])
    with pytest.raises(PipelineError, match="shape"):
        build_index(copy, tmp_path / "index", "image", [], lambda _: None)
    (copy / "img_emb" / "img_emb_1.npy").unlink()
    with pytest.raises(PipelineError, match="is missing"):
        build_index(copy, tmp_path / "index", "image", [], lambda _: None)
    (copy / "metadata" / "metadata_1.parquet").unlink()
    with pytest.raises(PipelineError, match="2 of 3 parts"):
        build_index(copy, tmp_path / "index", "image", [], lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["emb"]


def test_opening_what_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no index here"):
        open_index(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 9, "dim": 4, "fields": {}}')
    with pytest.raises(PipelineError, match="newer vlp"):
        open_index(tmp_path)
    (tmp_path / "index.json").write_text('{"dim": 4, "fields": {}}')
    with pytest.raises(PipelineError, match="damaged"):
        open_index(tmp_path)
