"""`vlp index build | import | export | push`: folders in and out, interruptions, refusals."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from data_pipelines.errors import PipelineError
from server.index import Index, IndexInfo, Point
from server.index import build as building
from server.index.build import STATE, build_index
from server.index.cluster import ClusterStore
from server.index.edge import create_index, open_index
from server.index.folders import batches, info_of
from server.index.transfer import export, pages, put
from server.index_cli import index as command


def run(*arguments: object) -> dict[str, Any]:
    """What a command that succeeds says with --json."""
    done = CliRunner().invoke(command, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def refused(*arguments: object) -> str:
    """What a command that is refused says."""
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), "not a readable message"
    return done.output


def content(index: Index) -> tuple[dict[Any, dict[str, Any]], np.ndarray[Any, Any]]:
    """Everything in an index: payloads by id, and the vectors in the order of ids."""
    found = list(pages(index))
    payloads = {id: p for ids, _, some in found for id, p in zip(ids, some, strict=True)}
    return payloads, np.concatenate([rows for _, rows, _ in found])


def assert_same(first: Index, second: Index) -> None:
    """Two indexes hold the same."""
    (payloads, rows), (others, other_rows) = content(first), content(second)
    assert payloads == others
    np.testing.assert_allclose(rows, other_rows, atol=1e-6)


def found_by(index: Index, text: str) -> set[Any]:
    """Ids with any of the words."""
    return {hit.id for hit in index.keywords(text, 60)}


@pytest.fixture
def memory() -> Iterator[ClusterStore]:
    store = ClusterStore(":memory:")
    yield store
    store.close()


def test_import_then_again_then_export_then_build(embeddings: Path, tmp_path: Path) -> None:
    """A folder goes round and comes back equal."""
    where = ("--collections", tmp_path / "kept", "--name", "photos")
    assert run("import", embeddings, *where, "--field", "width") == {"name": "photos", "written": 60, "points": 60}
    assert run("import", embeddings, *where)["written"] == 0, "what was there was written again"
    assert run("import", embeddings, *where, "--overwrite")["written"] == 60
    made = run("export", tmp_path / "kept" / "photos", "--out", tmp_path / "back")
    assert (made["parts"], made["points"]) == (1, 60)
    built = run("build", tmp_path / "back", "--out", tmp_path / "index", "--field", "width")
    assert (built["points"], built["captions"]) == (60, "caption")
    first, second = open_index(tmp_path / "kept" / "photos"), open_index(tmp_path / "index")
    assert_same(first, second)
    assert len(first.search(np.ones(16, np.float32), 60, {"width": 40})) > 0
    assert found_by(first, "circle") == found_by(second, "circle") != set()
    first.close()
    second.close()
    array = np.load(tmp_path / "back" / "img_emb" / "img_emb_000000.npy")
    assert array.shape == (60, 16)
    table = pq.read_table(tmp_path / "back" / "metadata" / "metadata_000000.parquet")
    assert table.column_names[:3] == ["image_path", "caption", "point_id"]


def test_a_build_goes_on_where_it_was_killed(embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.index.folders.BATCH", 10)
    monkeypatch.setattr(building, "SAVE_EVERY", 1)
    steps: list[int] = []

    def interrupt(rows: int) -> None:
        steps.append(rows)
        if sum(steps) >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(embeddings, tmp_path / "index", "image", [], interrupt)
    assert not (tmp_path / "index").exists()
    steps.clear()
    info = build_index(embeddings, tmp_path / "index", "image", [], steps.append)
    assert info.points == sum(steps) == 60
    assert steps[0] == 35, "it began again"
    straight = build_index(embeddings, tmp_path / "straight", "image", [], steps.append)
    assert straight.model_dump() == info.model_dump()
    first, second = open_index(tmp_path / "index"), open_index(tmp_path / "straight")
    assert_same(first, second)
    first.close()
    second.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "straight"]
    assert not (tmp_path / "index" / STATE).exists()
    # another question begins again
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        build_index(embeddings, tmp_path / "index", "image", [], interrupt)
    steps.clear()
    build_index(embeddings, tmp_path / "index", "text", ["width"], steps.append)
    assert steps[0] == 0


def test_an_export_goes_on_after_the_last_whole_part(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((25, 8)).astype(np.float32)
    index = create_index(tmp_path / "index", IndexInfo(dim=8, fields={"n": "integer"}))
    index.upsert([Point(n, {"n": n, "mixed": n if n % 2 else [n]}, row) for n, row in enumerate(rows)])
    steps: list[int] = []

    def interrupt(count: int) -> None:
        steps.append(count)
        if sum(steps) > 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(index, tmp_path / "out", interrupt, part_rows=7)
    index.delete([13])  # the last one written is gone: the next one is where it goes on
    steps.clear()
    assert export(index, tmp_path / "out", steps.append, part_rows=7) == 4
    assert steps[0] == 14
    assert export(index, tmp_path / "out", steps.append, part_rows=7) == 4
    tables = [pq.read_table(path) for path in sorted((tmp_path / "out" / "metadata").iterdir())]
    assert [id for table in tables for id in table.column("point_id").to_pylist()] == [str(n) for n in range(25)]
    arrays = np.concatenate([np.load(path) for path in sorted((tmp_path / "out" / "img_emb").iterdir())])
    np.testing.assert_allclose(arrays, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-6)
    index.close()


def test_a_collection_moves_to_a_cluster(index_folder: Path, tmp_path: Path, memory: ClusterStore) -> None:
    """`vlp index push` is these two calls; a server in the memory of another process cannot be had."""
    folder = shutil.copytree(index_folder, tmp_path / "index")
    source = open_index(folder)
    target = memory.create("photos", source.info)
    assert put(pages(source), target, lambda _: None) == 60
    assert_same(target, source)
    assert put(pages(source), target, lambda _: None) == 0
    target.delete([7])
    assert put(pages(source), target, lambda _: None) == 1
    query = np.ones(16, np.float32)
    for where in ({"source": "vendor1"}, {"labels": ["class1", "class2"]}):
        near = [hit.id for hit in source.search(query, 10, where)]
        assert [hit.id for hit in target.search(query, 10, where)] == near
    assert found_by(target, "red circle") == found_by(source, "red circle") != set()
    assert memory.names() == ["photos"]
    source.close()


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_faiss_indices_of_clip_retrieval_are_read(kind: str, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    rows = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    made = faiss.index_factory(8, "Flat" if kind == "flat" else "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    made.train(rows)
    made.add(rows)
    (tmp_path / "metadata").mkdir()
    faiss.write_index(made, str(tmp_path / "image.index"))
    for part, (first, last) in enumerate([(0, 200), (200, 300)]):
        table = pa.table({"image_path": [f"{n}" for n in range(first, last)], "url": ["u"] * (last - first)})
        pq.write_table(table, tmp_path / "metadata" / f"metadata_{part}.parquet")
    info = info_of(tmp_path, "image", [])
    assert (info.dim, info.captions) == (8, "")
    found = list(batches(tmp_path, "image", 8, []))
    assert [id for ids, _, _ in found for id in ids] == list(range(300))
    np.testing.assert_allclose(np.concatenate([vectors for _, vectors, _ in found]), rows, atol=1e-6)
    assert found[-1][2][-1] == {"key": "299", "url": "u"}
    assert build_index(tmp_path, tmp_path / "index", "image", [], lambda _: None).points == 300
    (tmp_path / "image.index").write_bytes(b"no index")
    with pytest.raises(PipelineError, match="faiss cannot read it"):
        info_of(tmp_path, "image", [])


def test_what_cannot_be_done_is_said(embeddings: Path, index_folder: Path, tmp_path: Path) -> None:
    kept = ("--collections", tmp_path / "kept")
    assert "say where the collection is" in refused("import", embeddings, "--name", "x")
    assert "1 to 64 letters" in refused("import", embeddings, "--name", "../x", *kept)
    assert "either in a folder" in refused("import", embeddings, "--name", "x", *kept, "--qdrant", ":memory:")
    assert "holds no embeddings" in refused("import", tmp_path, "--name", "x", *kept)
    assert "no such column" in refused("import", embeddings, "--name", "x", *kept, "--field", "zzz")
    assert "no Qdrant server answers" in refused("import", embeddings, "--name", "x", "--qdrant", "http://127.0.0.1:9")
    assert "export either" in refused("export", "--out", tmp_path / "out")
    assert "no index here" in refused("export", tmp_path, "--out", tmp_path / "out")
    (tmp_path / "file").write_text("dear")
    folder = shutil.copytree(index_folder, tmp_path / "index")
    assert "is no embedding folder" in refused("export", folder, "--out", tmp_path / "file")
    np.save(tmp_path / "x.npy", np.ones(3))
    other = tmp_path / "other"
    (other / "img_emb").mkdir(parents=True)
    (other / "metadata").mkdir()
    np.save(other / "img_emb" / "img_emb_0.npy", np.ones((2, 4), np.float32))
    pq.write_table(pa.table({"image_path": ["a", "b"], "width": ["x", "y"]}), other / "metadata" / "metadata_0.parquet")
    run("import", embeddings, "--name", "photos", *kept, "--field", "width")
    assert "choose another --name" in refused("import", other, "--name", "photos", *kept)
    np.save(other / "img_emb" / "img_emb_0.npy", np.ones((2, 16), np.float32))
    assert "declared integer" in refused("import", other, "--name", "photos", *kept)
