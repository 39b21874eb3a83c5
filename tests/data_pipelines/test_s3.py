"""The same shards on an S3 server: written, verified, re-sharded and streamed. Runs where `make prove-data` was."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipelines import sources
from data_pipelines.job import shard
from data_pipelines.pictures import WriteOptions
from data_pipelines.remote import DiskCache
from data_pipelines.shard_set import ShardSet
from data_pipelines.verify import verify
from tests.s3_server import make_bucket, point_to, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # s3fs warns about its own insides

OPTIONS = WriteOptions(image_size=16, resize_mode="keep_ratio", samples_per_shard=3)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on a server of this machine."""
    with s3_server() as port:
        point_to(f"127.0.0.1:{port}", monkeypatch)
        make_bucket()
        yield "s3://bucket"


def test_s3_holds_the_same_bytes_and_streams_them(photos: Path, bucket: str, tmp_path: Path) -> None:
    here, there = tmp_path / "out", f"{bucket}/out"
    for out in (here, there):
        result = shard(sources.resolve(str(photos)), out, OPTIONS, overwrite=False, progress=False)
        assert (result["samples"], result["up_to_date"]) == (7, False)
    system, root = fsspec.core.url_to_fs(there)
    for path in here.iterdir():
        assert path.name.endswith("_stats.json") or system.cat(f"{root}/{path.name}") == path.read_bytes()
    assert verify(there, progress=False)["faults"] == []
    remote, local = ShardSet(there, cache=DiskCache(tmp_path / "cache")), ShardSet(here)
    assert remote.digest == local.digest
    assert [remote.read(n) for n in range(len(remote))] == [local.read(n) for n in range(len(local))]
    again = shard(sources.resolve(there, "tars"), f"{bucket}/again", WriteOptions(), overwrite=False, progress=False)
    assert again["samples"] == 7
