"""Jobs that go on, grow and try again: always the bytes of one run without trouble."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from data_pipelines import job, retry, sources
from data_pipelines.config import StrictModel
from data_pipelines.errors import PipelineError, ShardError
from data_pipelines.fetch import FetchOptions
from data_pipelines.records import Record, load_manifest
from data_pipelines.shards import Pools, plan_work
from data_pipelines.store import Store
from data_pipelines.survey import plan
from data_pipelines.testing import draw
from data_pipelines.verify import verify
from data_pipelines.write import WriteOptions, write_shards

OPTIONS = WriteOptions(samples_per_shard=2, image_size=16, resize_mode="keep_ratio")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the statistics, which hold times, and job.json, which knows paths and times of files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if not path.name.endswith("_stats.json") and path.name != "job.json"
    }


def shard(folder: Path, out: Path | str, options: WriteOptions = OPTIONS, **changes: Any) -> dict[str, Any]:
    return job.shard(
        sources.resolve(str(folder)), out, options, **{"overwrite": False, "progress": False} | changes
    )  # fmt: skip


def interrupt(out: Path, keep: int) -> None:
    """Make a finished folder one that was killed after so many shards."""
    (out / "_tmp").mkdir()
    (out / "job.json").rename(out / "_tmp" / "job.json")
    (out / "manifest.json").unlink()
    (out / "sizes.json").unlink()
    for path in out.glob("0*"):
        if int(path.name[:5]) > keep or (int(path.name[:5]) == keep and "_stats" in path.name):
            path.unlink()
    (out / "_tmp" / "-00009.tar").write_bytes(b"half a tar")
    (out / ".00002.parquet.abcdefgh").write_bytes(b"half a parquet")


def test_an_interrupted_job_goes_on_without_reading_finished_pictures(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "whole")
    out = tmp_path / "out"
    shard(photos, out)
    interrupt(out, keep=2)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("0*")}
    for number in (0, 1):  # same size and time, so that the listing looks the same, but no picture any more
        picture = photos / f"p{number}.png"
        status = picture.stat()
        picture.write_bytes(bytes(status.st_size))
        os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = shard(photos, out)
    assert (result["samples"], result["up_to_date"]) == (7, False)
    assert contents(out) == contents(tmp_path / "whole")
    finished = {name for name in times if int(name[:5]) < 2}
    assert len(finished) == 8
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == {name: times[name] for name in finished}
    assert not (out / "_tmp").exists()


def test_an_interrupted_job_is_not_taken_up_with_other_options(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "out")
    interrupt(tmp_path / "out", keep=2)
    with pytest.raises(PipelineError, match=r"unfinished job \(different: options.image_size was 16, is 20\)"):
        shard(photos, tmp_path / "out", OPTIONS.model_copy(update={"image_size": 20}))
    (photos / "new.png").write_bytes(draw())
    with pytest.raises(PipelineError, match=r"unfinished job \(different: source.files\)"):
        shard(photos, tmp_path / "out")
    for name in ("keep.txt", "notes.txt"):
        (tmp_path / "out" / name).write_text("00000000\n")
    assert shard(photos, tmp_path / "out", overwrite=True)["records"] == 9
    assert not (tmp_path / "out" / "keep.txt").exists(), "its keys would name other samples"
    assert (tmp_path / "out" / "notes.txt").exists()


def test_other_file_systems_get_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "out")
    there = f"memory://shards-{tmp_path.name}"
    result = shard(photos, there)
    assert (result["out"], result["samples"], result["up_to_date"]) == (there, 7, False)
    assert shard(photos, there)["up_to_date"]
    system, root = fsspec.core.url_to_fs(there)
    system.get(root, str(tmp_path / "fetched"), recursive=True)
    assert contents(tmp_path / "fetched") == contents(tmp_path / "out")
    assert verify(there, progress=False)["faults"] == []
    with pytest.raises(PipelineError, match="options.image_size was 16, is 20"):
        shard(photos, there, OPTIONS.model_copy(update={"image_size": 20}))
    shard(photos, there, OPTIONS.model_copy(update={"image_size": 20}), overwrite=True)
    assert Store(there).names("_tmp") == []
    with pytest.raises(PipelineError, match="cannot be opened"):
        Store("nosuch://x")


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """Another folder of five pictures."""
    root = tmp_path / "more"
    root.mkdir()
    for number in range(5):
        (root / f"m{number}.jpg").write_bytes(draw((60, 50), format="JPEG", seed=50 + number))
        (root / f"m{number}.txt").write_text(f"more {number}")
    return root


def test_extend_adds_shards_and_leaves_the_others(photos: Path, more: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(photos, out)
    before = contents(out)
    source = sources.resolve(str(more))
    result = job.extend(source, out, WriteOptions(workers=1), progress=False)
    assert (result["records"], result["samples"], result["shards"]) == (13, 12, 7)
    changed = {name for name, data in before.items() if contents(out)[name] != data}
    assert changed == {"manifest.json", "sizes.json"}
    manifest = load_manifest(out)
    assert manifest.sources == {"photos": 7, "more": 5}
    assert [info.samples for info in manifest.shards] == [1, 2, 2, 2, 2, 2, 1]
    assert json.loads((out / "sizes.json").read_text())["00006.tar"] == 1
    assert pq.read_table(out / "00004.parquet")["key"].to_pylist() == ["000040", "000041"]
    assert verify(out, progress=False)["faults"] == []
    assert job.extend(source, out, WriteOptions(), progress=False)["up_to_date"]
    assert shard(photos, out)["up_to_date"]


def test_an_interrupted_extension_goes_on(photos: Path, more: Path, tmp_path: Path) -> None:
    source = sources.resolve(str(more))
    for name in ("whole", "out"):
        shard(photos, tmp_path / name)
    job.extend(source, tmp_path / "whole", WriteOptions(), progress=False)
    out = tmp_path / "out"
    finished = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("00004*")}
    after = json.loads((tmp_path / "whole" / "job.json").read_text())
    for name, data in finished.items():
        (out / name).write_bytes(data)
    (out / "_tmp").mkdir()
    (out / "_tmp" / "job.json").write_text(json.dumps(after))
    with pytest.raises(PipelineError, match="extension was interrupted"):
        retry.retry(out, WriteOptions(), progress=False)
    with pytest.raises(PipelineError, match="another change was interrupted"):
        job.extend(sources.resolve(str(photos), layout="captions"), out, WriteOptions(), progress=False)
    with pytest.raises(PipelineError, match="an extension or a retry was interrupted"):
        shard(photos, out)
    kept = (out / "00004.tar").stat().st_mtime_ns
    job.extend(source, out, WriteOptions(), progress=False)
    assert (out / "00004.tar").stat().st_mtime_ns == kept
    assert contents(out) == contents(tmp_path / "whole")


def test_retry_gives_the_bytes_of_a_run_without_failures(photos: Path, tmp_path: Path) -> None:
    (photos / "lonely.txt").write_text("no longer alone")
    shard(photos, tmp_path / "whole")
    good = (photos / "trip" / "p5.png").read_bytes()
    (photos / "trip" / "p5.png").write_bytes(good[:200])
    (photos / "p1.png").write_bytes(b"")
    out = tmp_path / "out"
    first = shard(photos, out)
    assert first["failures"] == {"not_an_image": 1, "truncated_image": 1}
    nothing = retry.retry(out, WriteOptions(), progress=False)
    assert (sum(nothing["tried"].values()), sum(nothing["gained"].values())) == (2, 0)
    (photos / "trip" / "p5.png").write_bytes(good)
    some = retry.retry(out, WriteOptions(), progress=False)
    assert (some["gained"]["truncated_image"], some["samples"], some["failures"]) == (1, 7, {"not_an_image": 1})
    assert verify(out, progress=False)["faults"] == []
    (photos / "p1.png").write_bytes(draw((41, 30), "RGBA", seed=1))
    assert retry.retry(out, WriteOptions(), progress=False)["failures"] == {}
    assert contents(out) == contents(tmp_path / "whole")
    assert sum(retry.retry(out, WriteOptions(), progress=False)["tried"].values()) == 0


def test_a_kill_while_a_retried_shard_is_published_is_made_good(photos: Path, tmp_path: Path) -> None:
    """Every point between the first and the last rename, and before the shard was ready."""
    picture = photos / "p1.png"
    good = picture.read_bytes()
    picture.write_bytes(b"")
    shard(photos, tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    picture.write_bytes(good)
    retry.retry(tmp_path / "new", WriteOptions(), progress=False)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    (number,) = {name[:5] for name in new if name.endswith(".tar") and new[name] != old[name]}
    files = [number + suffix for suffix in (".tar", ".index.npy", ".parquet", "_stats.json")]
    for moved in range(5):
        for ready in (True, False):
            out = tmp_path / f"{moved}{ready}"
            shutil.copytree(tmp_path / "old", out)
            stage = out / "_tmp" / "retry"
            stage.mkdir(parents=True)
            shutil.copy(out / "job.json", out / "_tmp" / "job.json")
            for file in files[moved:]:
                shutil.copy(tmp_path / "new" / file, stage / file)
            if ready:
                (stage / f"{number}.ready").touch()
                for file in files[:moved]:
                    shutil.copy(tmp_path / "new" / file, out / file)
            retry.retry(out, WriteOptions(), progress=False)
            assert contents(out) == contents(tmp_path / "new")


def test_retry_refuses_a_source_that_lists_other_records(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "out")
    (photos / "p0.png").rename(photos / "p00.png")
    with pytest.raises(ShardError, match="does not list what the source lists now"):
        retry.retry(tmp_path / "out", WriteOptions(), progress=False)
    with pytest.raises(ShardError, match="holds no finished shards"):
        retry.retry(tmp_path, WriteOptions(), progress=False)


@pytest.fixture
def web(photos: Path) -> Iterator[str]:
    """Address of a server for the photos."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(photos)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_are_fetched_in_order_and_failures_keep_their_reason(web: str, photos: Path, tmp_path: Path) -> None:
    names = [f"p{n}.png" for n in range(4)] + ["missing.png"] + [f"trip/p{n}.png" for n in range(4, 7)]
    records = [Record(image=f"{web}/{name}", captions=(name,), source="web", origin=f"{web}/{name}") for name in names]
    options = OPTIONS.model_copy(update={"fetch": FetchOptions(allow_private=True), "fetch_concurrency": 3})
    manifest = write_shards(records, tmp_path / "out", options, kind="t", licences={}, progress=False)[""]
    assert (manifest.samples, manifest.failures) == (7, {"http_404": 1})
    (row,) = [
        row for row in pq.read_table(tmp_path / "out" / "00002.parquet").to_pylist() if row["status"] != "success"
    ]
    assert (row["url"], row["status"]) == (f"{web}/missing.png", "failed_to_download")
    local = [Record(image=photos / name, captions=(name,), source="web", origin=f"{web}/{name}") for name in names]
    write_shards(local, tmp_path / "local", OPTIONS, kind="t", licences={}, progress=False)
    assert (tmp_path / "local" / "00001.tar").read_bytes() == (tmp_path / "out" / "00001.tar").read_bytes()
    refused = WriteOptions(fetch=FetchOptions(retries=0))
    with pytest.raises(PipelineError, match="none of 8 records became a sample"):
        write_shards(records, tmp_path / "no", refused, kind="t", licences={}, progress=False)


def test_kills_at_the_very_beginning_and_end_are_no_obstacle(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "_tmp").mkdir(parents=True)
    (out / "_tmp" / ".job.json.abcdefgh").touch()
    assert shard(photos, out)["samples"] == 7
    (out / "_tmp").mkdir()
    shutil.copy(out / "job.json", out / "_tmp" / "job.json")
    assert shard(photos, out)["up_to_date"]
    assert not (out / "_tmp").exists()


def test_work_items_are_whole_shards_of_one_split() -> None:
    records = [Record(image=b"", captions=(), source="", origin=str(n), split=("a", "b")[n % 2]) for n in range(5)]
    works = list(plan_work(records, WriteOptions(samples_per_shard=2), {"b": 7}))
    assert [(work.split, work.number, len(work.records)) for work in works] == [("a", 0, 2), ("b", 7, 2), ("a", 1, 1)]


def test_a_plan_counts_itself_what_the_source_does_not() -> None:
    module = ModuleType("list")
    records = [
        Record(image=draw(seed=n), captions=("x",), source="", origin=str(n), split="ab"[n % 2]) for n in range(9)
    ]
    vars(module).update(iter_records=lambda config: iter(records), count=lambda config: None)
    found = plan(sources.Source("list", module, StrictModel()), OPTIONS, 3)
    assert (found["records"], found["splits"], found["shards"], found["tried"]) == (9, {"a": 5, "b": 4}, 5, 3)
    assert (found["failures"], found["bytes"] > 0) == ({}, True)


def test_pools_end_their_threads() -> None:
    pools = Pools(WriteOptions(workers=2))
    record = Record(image=draw(), captions=(), source="", origin="x")
    assert [prepared.reason for prepared in pools.prepare([record] * 3)] == ["", "", ""]
    pools.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("shard", "fetch"))]
