"""Remote shards: fetched whole, once, verified, shared between processes, evicted by use; commands only by name."""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from data_pipelines.errors import ConfigError, PipelineError, ShardError
from data_pipelines.loader import DataConfig, Loader
from data_pipelines.remote import CHUNK, SHARD_FETCH, DiskCache, allow
from data_pipelines.shard_set import ShardSet
from data_pipelines.testing import Handler, Web, draw
from data_pipelines.tokens import learn_tokenizer


@pytest.fixture
def bucket(starter_shards: Path) -> Iterator[str]:
    """The shards of one split in fsspec's memory file system."""
    system = fsspec.filesystem("memory")
    for path in (starter_shards / "unseen_concepts").iterdir():
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def local(starter_shards: Path) -> ShardSet:
    return ShardSet(starter_shards / "unseen_concepts")


def test_a_remote_folder_reads_as_the_local_one_and_is_fetched_at_first_use(
    bucket: str, starter_shards: Path, tmp_path: Path
) -> None:
    cache = DiskCache(tmp_path)
    shards, here = ShardSet(bucket, cache=cache), local(starter_shards)
    assert not list(tmp_path.rglob("*.tar")), "nothing is fetched to find out what there is"
    assert (len(shards), shards.digest) == (len(here), here.digest)
    assert [shards.read(number) for number in range(len(shards))] == [here.read(n) for n in range(len(here))]
    assert {path.name for path in tmp_path.rglob("0*")} == {"00000.tar", "00000.index.npy"}
    fsspec.filesystem("memory").pipe("/bucket/00000.tar", b"gone")
    assert ShardSet(bucket, cache=cache).read(3) == here.read(3), "the copy is used"


def test_tars_by_url_need_no_manifest(bucket: str, starter_shards: Path, tmp_path: Path) -> None:
    shards = ShardSet(f"{bucket}/{{00000..00000}}.tar", cache=DiskCache(tmp_path))
    assert [shards.read(n).key for n in range(3)] == [local(starter_shards).read(n).key for n in range(3)]


def test_web_addresses_go_through_the_safe_fetcher(starter_shards: Path, web: Web, tmp_path: Path) -> None:
    for path in (starter_shards / "unseen_concepts").iterdir():
        web.routes[f"/shards/{path.name}"] = partial(Handler.answer, body=path.read_bytes())
    address = f"{web.url}/shards"
    with pytest.raises(ConfigError, match=r"data\.fetch\.allow_private=true"):
        ShardSet(address, cache=DiskCache(tmp_path))
    assert not web.asked, "an address of the own network is not even dialled"
    cache = DiskCache(tmp_path, options=SHARD_FETCH.model_copy(update={"allow_private": True}))
    shards, here = ShardSet(address, cache=cache), local(starter_shards)
    assert shards.digest == here.digest
    assert [shards.read(number) for number in range(len(shards))] == [here.read(n) for n in range(len(here))]
    with pytest.raises(PipelineError, match="list the tars"):
        ShardSet(f"{web.url}/nowhere", cache=cache)


def test_what_arrives_must_be_what_the_manifest_says(bucket: str, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    content = bytearray(system.cat("/bucket/00000.tar"))
    content[len(content) // 2] ^= 1
    system.pipe("/bucket/00000.tar", bytes(content))
    shards = ShardSet(bucket, cache=DiskCache(tmp_path))
    with pytest.raises(PipelineError, match="sha256"):
        shards.read(0)
    assert not list(tmp_path.rglob("*.tar")), "a wrong file is never published"


def test_a_missing_manifest_or_shard_says_what_to_do(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="list the tars"):
        ShardSet("memory://nowhere", cache=DiskCache(tmp_path))
    with pytest.raises(PipelineError, match="Protocol not known"):
        ShardSet("nonsense://bucket", cache=DiskCache(tmp_path))
    with pytest.raises(ShardError, match=r"memory://bucket/7\.tar: is not there"):
        ShardSet(f"{bucket}/7.tar", cache=DiskCache(tmp_path))


def test_the_entry_used_longest_ago_goes_first(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    cache = DiskCache(tmp_path / "cache", limit=2500)
    paths = []
    for number in range(4):
        (source / f"{number}.tar").write_bytes(bytes(1000))
        location = f"file://{source}/{number}.tar"
        paths.append(cache.path(location))
        cache.get(location, paths[-1])
        os.utime(paths[-1].parent, (number, number))
        if number == 1:
            cache.get(f"file://{source}/0.tar", paths[0])  # used again
    assert [path.is_file() for path in paths] == [True, False, False, True]


def test_what_a_killed_download_left_is_removed_and_never_read(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"x" * 10)
    cache = DiskCache(tmp_path / "cache")
    path = cache.path(f"file://{tmp_path}/0.tar")
    path.parent.mkdir(parents=True)
    (path.parent / f".{path.name}.abc").write_bytes(b"half")
    cache.get(f"file://{tmp_path}/0.tar", path)
    assert path.read_bytes() == b"x" * 10
    assert [found.name for found in path.parent.iterdir()] == ["0.tar"]


FETCH = """
import sys
from pathlib import Path
from data_pipelines.remote import DiskCache
cache = DiskCache(Path(sys.argv[2]))
path = cache.path(sys.argv[1])
cache.get(sys.argv[1], path)
print(len(path.read_bytes()), path.stat().st_ino)
"""


def test_processes_share_one_download(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(os.urandom(20 * CHUNK))
    command = [sys.executable, "-c", FETCH, f"file://{tmp_path}/0.tar", str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(answers) == 1, "all saw the same whole file"
    assert answers.pop().startswith(str(20 * CHUNK))


def test_a_killed_download_leaves_nothing_that_counts(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(200 * CHUNK))
    cache = DiskCache(tmp_path / "cache")
    location = f"file://{tmp_path}/0.tar"
    path = cache.path(location)
    process = subprocess.Popen([sys.executable, "-c", FETCH, location, str(cache.root)])
    while not list(cache.root.glob("*/.0.tar.*")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not path.is_file() or path.stat().st_size == 200 * CHUNK
    cache.get(location, path)
    assert path.stat().st_size == 200 * CHUNK


def test_a_program_runs_only_if_the_recipe_names_it_and_never_through_a_shell(
    starter_shards: Path, tmp_path: Path
) -> None:
    tar = starter_shards / "unseen_concepts" / "00000.tar"
    with pytest.raises(ConfigError, match="data.pipe"):
        ShardSet(f"pipe:cat {tar}", cache=DiskCache(tmp_path))
    canary = tmp_path / "canary"
    for command in (f"cat; touch {canary}", f"cat {tar} | touch {canary}", f"/bin/cat {tar}"):
        with pytest.raises(PipelineError):
            ShardSet(f"pipe:{command}", cache=DiskCache(tmp_path), pipe=("cat",))
    assert not canary.exists()
    shards = ShardSet(f"pipe:cat {tar}", cache=DiskCache(tmp_path), pipe=("cat",))
    assert shards.read(5) == local(starter_shards).read(5)
    allow("s3://bucket", ())


def test_a_rank_fetches_its_own_shards_ahead_of_time_and_no_others(tmp_path: Path) -> None:
    """Eight remote shards in eight partitions, two ranks: each fetches four, before it reads the last of them."""
    system = fsspec.filesystem("memory")
    infos = []
    for number in range(8):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for row in range(4):
                for suffix, data in (("png", draw((8, 8), seed=row)), ("txt", b"words")):
                    info = tarfile.TarInfo(f"{number}{row}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        system.pipe(f"/ahead/{number:05}.tar", content.getvalue())
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        infos.append({"name": f"{number:05}.tar", "samples": 4, "bytes": len(content.getvalue()), "sha256": digest})
    manifest = {
        "kind": "folder", "source_digest": "", "records": 32, "samples": 32, "failures": {}, "sources": {},
        "licences": {}, "options": {}, "shards": infos,
    }  # fmt: skip
    system.pipe("/ahead/manifest.json", json.dumps(manifest).encode())
    tokenizer = learn_tokenizer(["some words"], vocab_size=300, context_length=8)
    config = DataConfig.model_validate(
        {
            "train": "memory://ahead",
            "batch_size": 8,
            "partitions": 8,
            "window": 1,
            "image": {"size": 8},
            "prefetch": 1,
            "read_ahead": 1,  # both small: the next epoch, which has other shards for each rank, stays out of reach
        }
    )
    fetched = []
    for rank in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLP_CACHE", str(tmp_path / str(rank)))
            loader = Loader(config, tokenizer, 0, rank, 2)
            list(itertools.islice(loader, loader.plan.steps - 3))
        fetched.append({path.parent.name for path in (tmp_path / str(rank)).rglob("*.tar")})
    assert [len(found) for found in fetched] == [4, 4]
    assert not fetched[0] & fetched[1]
    system.rm("/ahead", recursive=True)
