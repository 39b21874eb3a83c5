"""What several test folders share: the real starter shards, written once and reused over runs."""

import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines import job, sources
from data_pipelines.files import cache_dir
from data_pipelines.write import WriteOptions


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    """Training sets for its process how exactly matrices are multiplied, which what pictures look like depends on."""
    torch = sys.modules.get("torch")
    before = torch.get_float32_matmul_precision() if torch is not None else "highest"
    yield
    if (torch := sys.modules.get("torch")) is not None and torch.get_float32_matmul_precision() != before:
        torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def starter_shards() -> Path:
    """Folder of `vlp shard starter` (train/ val/ unseen_vendor/ unseen_concepts/), as the present code writes it.

    Read-only. Kept in the cache under a name made of everything it depends on, so changed code never meets old shards.
    Missing packages fail here, and never skip a test: `vlp data fetch starter` fetches them.
    """
    starter = sources.resolve("starter")
    options = WriteOptions(**starter.module.WRITE)
    identity = json.dumps([job.identify(starter), options.recorded()], sort_keys=True)
    out = cache_dir() / "shards" / f"starter-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:  # a second test run waits instead of failing
        fcntl.flock(lock, fcntl.LOCK_EX)
        job.shard(starter, out, options, overwrite=True, progress=False)
    return out
