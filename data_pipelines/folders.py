"""What a folder of shards says about itself: its job, its manifests, the rows and members of its shards."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipelines.errors import ShardError
from data_pipelines.parquet import read_columns
from data_pipelines.records import MANIFEST, Manifest, parse_manifest
from data_pipelines.store import Store, join

JOB = "job.json"
"""What made a folder: source, options. Its presence says that the folder is complete."""
INPUT = "input"
"""Key of job.json: where the source lay, for `vlp shard retry`; a folder that was moved is still the same source."""
Job = dict[str, Any]


def read_job(store: Store, name: str) -> Job | None:
    """A job file's content, {} when it is damaged, None when it is missing."""
    try:
        found = json.loads(store.read(name))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_finished(store: Store) -> Job:
    """job.json of a finished folder. Raises ShardError when there is none."""
    job = read_job(store, JOB)
    if not job:
        raise ShardError(f"{store} holds no finished shards of this tool: write some with `vlp shard SOURCE --out DIR`")
    return job


def splits(store: Store) -> list[str]:
    """Split folders with a manifest; "" for the folder itself."""
    return [name for name in ("", *store.names(kind="directory")) if store.size(join(name, MANIFEST)) is not None]


def manifest_of(store: Store, split: str) -> Manifest:
    """Manifest of a split. Raises ShardError when it is damaged."""
    name = join(split, MANIFEST)
    return parse_manifest(store.read(name), f"{store}/{name}")


def first_manifest(store: Store) -> Manifest:
    """Manifest of the first split. Raises ShardError when there is none."""
    for split in splits(store):
        return manifest_of(store, split)
    raise ShardError(f"{store} holds no {MANIFEST}, so it is no finished shard folder")


def is_whole(store: Store) -> bool:
    """Whether every shard of every manifest has its length. Digests are left to verification."""
    try:
        shards = [(split, info) for split in splits(store) for info in manifest_of(store, split).shards]
    except ShardError:
        return False
    return bool(shards) and all(store.size(join(split, info.name)) == info.bytes for split, info in shards)


def summarise(store: Store) -> dict[str, Any]:
    """Counts of a finished output folder, in all and per split, from its manifests."""
    manifests = {split: manifest_of(store, split) for split in splits(store)}
    parts = {
        split: _counts([manifest]) | {"manifest": hashlib.sha256(store.read(join(split, MANIFEST))).hexdigest()}
        for split, manifest in manifests.items()
    }
    return {"out": str(store), "kind": first_manifest(store).kind, **_counts(manifests.values()), "splits": parts}


def _counts(manifests: Iterable[Manifest]) -> dict[str, Any]:
    manifests = list(manifests)
    failures: Counter[str] = Counter()
    for manifest in manifests:
        failures.update(manifest.failures)
    return {
        "records": sum(manifest.records for manifest in manifests),
        "samples": sum(manifest.samples for manifest in manifests),
        "failures": dict(sorted(failures.items())),
        "shards": sum(len(manifest.shards) for manifest in manifests),
        "bytes": sum(shard.bytes for manifest in manifests for shard in manifest.shards),
    }


def read_rows(store: Store, folder: str, name: str) -> list[dict[str, Any]]:
    """All rows of a shard's parquet. Raises FileNotFoundError."""
    return read_columns(store.read(join(folder, f"{name}.parquet"))).to_pylist()  # type: ignore[no-any-return]


def read_members(store: Store, folder: str, name: str) -> Iterator[tuple[str, str, int, bytes]]:
    """(key, extension, offset, content) of every file in a shard's tar."""
    with tarfile.open(fileobj=io.BytesIO(store.read(join(folder, f"{name}.tar")))) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if (stream := tar.extractfile(member)) is not None:
                yield key, extension, member.offset_data, stream.read()


def reason(row: Mapping[str, Any]) -> str:
    """Name under which a failed row is counted."""
    return str(row.get("error_message") or row.get("status")).partition(":")[0]
