"""kill -9 at random moments of real sharding: what is left is whole, and the next run ends as if nothing had been."""

import multiprocessing
import random
import tarfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipelines import retry
from data_pipelines.testing import draw, run_shard
from data_pipelines.verify import verify
from data_pipelines.write import WriteOptions

OPTIONS = ("--samples-per-shard", "4", "--image-size", "16", "--workers", "2")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the statistics, which hold times."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("_stats.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Fresh processes that need not import everything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipelines.cli", "data_pipelines.job", "data_pipelines.sources.folder"])
    return context


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Sixty small pictures, three of them broken."""
    root = tmp_path / "many"
    root.mkdir()
    for number in range(60):
        data = draw((32, 32), format="JPEG", seed=number)
        (root / f"{number:04}.jpg").write_bytes(data[:300] if number % 20 == 7 else data)
        (root / f"{number:04}.txt").write_text(f"picture {number}")
    return root


class Killer:
    """Runs a command again and again, and kills it at a random moment of its usual duration."""

    def __init__(self, processes: ForkServerContext, arguments: list[str], seed: int) -> None:
        self.processes, self.arguments, self.random = processes, arguments, random.Random(seed)
        self.duration = 0.0

    def run(self) -> None:
        """To the end; also measures how long that takes."""
        process = self.processes.Process(target=run_shard, args=self.arguments)
        began = time.monotonic()
        process.start()
        process.join()
        assert process.exitcode == 0
        self.duration = time.monotonic() - began

    def kill(self) -> bool:
        """Whether the process was killed; False when it was done before."""
        process = self.processes.Process(target=run_shard, args=self.arguments)
        process.start()
        process.join(self.random.uniform(0, self.duration))
        process.kill()
        process.join()
        return process.exitcode != 0


def check_what_is_left(out: Path, whole: dict[str, bytes]) -> None:
    """A file that has a name has its final content, and a shard that has statistics has all its files."""
    for path in out.glob("*") if out.exists() else ():
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith("_stats.json"):
            assert path.read_bytes() == whole[path.name], f"{path.name} is not whole"
    for path in out.glob("*_stats.json"):
        for suffix in (".tar", ".index.npy", ".parquet"):
            assert (out / path.name.replace("_stats.json", suffix)).exists()


def check_union(out: Path, names: set[str]) -> None:
    """Every input once: in a tar, or as a failed row."""
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert sorted(row["url"] for row in rows) == sorted(names)
    keys: list[str] = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            keys += (name for name in tar.getnames() if name.endswith("jpg"))
    assert keys == [f"{row['key']}.jpg" for row in rows if row["status"] == "success"]
    assert verify(out, progress=False)["faults"] == []


def campaign(processes: ForkServerContext, many: Path, tmp_path: Path, kills: int) -> None:
    Killer(processes, [str(many), "--out", str(tmp_path / "whole"), *OPTIONS], seed=0).run()
    whole = contents(tmp_path / "whole")
    killed = finished = round = 0
    killer = Killer(processes, [str(many), "--out", str(tmp_path / "0"), *OPTIONS], seed=kills)
    killer.run()
    while killed < kills:
        round += 1
        out = tmp_path / str(round)
        killer.arguments[2] = str(out)
        for _ in range(5):  # a few kills of one job, then to its end
            if not killer.kill():
                finished += 1
                break
            killed += 1
            check_what_is_left(out, whole)
        killer.run()
        assert contents(out) == whole
    check_union(out, {path.name for path in many.glob("*.jpg")})
    assert killed > finished, "hardly any process was killed at work"


def test_twenty_kills_leave_whole_shards(processes: ForkServerContext, many: Path, tmp_path: Path) -> None:
    campaign(processes, many, tmp_path, kills=20)


@pytest.mark.slow
def test_two_hundred_kills_leave_whole_shards(processes: ForkServerContext, many: Path, tmp_path: Path) -> None:
    campaign(processes, many, tmp_path, kills=200)


def test_kills_of_a_retry(processes: ForkServerContext, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Killer(processes, [str(many), "--out", str(out), *OPTIONS], seed=0).run()
    for number in (7, 27, 47):
        (many / f"{number:04}.jpg").write_bytes(draw((32, 32), format="JPEG", seed=number))
    Killer(processes, [str(many), "--out", str(tmp_path / "whole"), *OPTIONS], seed=0).run()
    whole = contents(tmp_path / "whole")
    killer = Killer(processes, ["retry", str(out)], seed=1)
    killer.duration = 0.3
    for _ in range(6):
        killer.kill()
    retry.retry(out, WriteOptions(), progress=False)
    found = contents(out)
    assert found.keys() == whole.keys()
    assert [name for name in found if found[name] != whole[name]] == ["job.json"]  # it knows the files as they were
    check_union(out, {path.name for path in many.glob("*.jpg")})
