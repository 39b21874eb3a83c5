"""The same shards on an S3 server: written, verified, re-sharded and streamed. Runs where `make prove-data` was."""

import socket
import subprocess
import sys
import time
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

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # s3fs warns about its own insides

MOTO = Path(sys.prefix) / "peers/moto/bin/moto_server"
"""In an environment of its own: its demands on versions contradict those of s3fs."""
OPTIONS = WriteOptions(image_size=16, resize_mode="keep_ratio", samples_per_shard=3)


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return not sock.connect_ex(("127.0.0.1", port))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on a server of this machine."""
    pytest.importorskip("s3fs")
    if not MOTO.exists():
        pytest.skip("the S3 server is not installed: make prove-data does it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b",
                "DEFAULT_REGION": "us-east-1"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = subprocess.Popen([MOTO, "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not listens(port):
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    finally:
        server.terminate()
        server.wait()


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
