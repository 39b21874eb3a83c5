"""The same work items on a real local Ray: same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import job, sources
from data_pipelines.errors import PipelineError
from data_pipelines.write import WriteOptions

RUN = """
import sys
from data_pipelines.testing import run_shard
run_shard(*sys.argv[1:])
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the statistics, which hold times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("_stats.json")}


@pytest.mark.slow  # Ray takes seconds to start
def test_ray_writes_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    options = WriteOptions(samples_per_shard=2, image_size=16, resize_mode="keep_ratio")
    job.shard(sources.resolve(str(photos)), tmp_path / "here", options, overwrite=False, progress=False)
    # In a process of its own: Ray leaves sockets and threads to the garbage collector.
    arguments = [str(photos), "--out", "there", "--samples-per-shard", "2", "--image-size", "16", "--on", "ray"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "7 samples of 8 records" in done.stdout
    assert "8/8" in done.stderr
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_cluster_that_is_not_there_is_one_message(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    options = WriteOptions(on="ray:127.0.0.1:1")
    with pytest.raises(PipelineError, match=r"--on ray:127\.0\.0\.1:1: no Ray cluster answers"):
        job.shard(sources.resolve(str(photos)), tmp_path / "out", options, overwrite=False, progress=False)
