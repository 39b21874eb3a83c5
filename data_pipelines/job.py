"""A whole sharding job: is it done already, may it replace what is there, write, sum up. The CLI is thin."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipelines.errors import PipelineError, ShardError
from data_pipelines.records import MANIFEST, Manifest, load_manifest, manifest_digest
from data_pipelines.sources import Source
from data_pipelines.write import JOB, TEMP, WriteOptions, describe, write_shards

OURS = re.compile(
    r"\d+(\.tar|\.index\.npy|\.parquet|_stats\.json)|sizes\.json|manifest\.json|job\.json|\.[\w.]+\.\w{8}"
)
"""Names that a sharding job writes, temp files of a killed one included; nothing else is ever removed."""


def shard(source: Source, out: Path, options: WriteOptions, *, overwrite: bool, progress: bool) -> dict[str, Any]:
    """Shards of `source` below `out`; does nothing when they are there already. Returns the summary the CLI prints.

    A job that was interrupted starts again. Other shards are refused unless `overwrite`.
    """
    began = time.monotonic()
    count = getattr(source.module, "count", None)
    total = count(source.config) if count else None
    identity = identify(source)
    job = {"kind": source.name, "options": options.recorded(), "source": identity}
    with _alone(out):
        up_to_date = _prepare(out, job, overwrite)
        if not up_to_date:
            write_shards(
                source.module.iter_records(source.config),
                out,
                options,
                kind=source.name,
                licences={package.spec: f"{package.licence}; {package.credit}" for package in source.packages},
                progress=progress,
                total=total,
                source=identity,
            )
    return summarise(out) | {"up_to_date": up_to_date, "seconds": round(time.monotonic() - began, 1)}


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second process from writing to the same folder; a kill releases the lock."""
    if out.exists() and not out.is_dir():
        raise PipelineError(f"{out} is a file; --out names a folder")
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, such as some network ones: no worse than before
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PipelineError(
                    f"another process is writing to {out}: wait for it, or choose another --out"
                ) from error
        yield
    finally:
        os.close(handle)


def identify(source: Source) -> dict[str, str]:
    """What the records depend on besides the write options: settings, packages or files, and the code."""
    settings = source.config.model_dump(mode="json", exclude={"path", "dir"})
    identity = {"settings": json.dumps(settings, sort_keys=True), "code": code_digest()}
    if source.packages:
        pinned = "\n".join(sorted(package.sha256 for package in source.packages))
        identity["packages"] = hashlib.sha256(pinned.encode()).hexdigest()
    if files := getattr(source.module, "fingerprint", None):
        identity["files"] = files(source.config)
    return identity


def code_digest() -> str:
    """sha256 over the modules that decide what lands in a shard; a changed reader must not pass for the old one."""
    here = Path(__file__).parent
    paths = [
        *sorted((here / "sources").glob("*.py")),
        *(here / name for name in ("images.py", "shard_files.py", "write.py")),
    ]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def _prepare(out: Path, job: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `out` holds the finished job already; otherwise makes room for it or refuses."""
    if (out / JOB).exists():
        before = _read_job(out / JOB)
        if before == job and _is_whole(out):
            return True
        if not overwrite:
            raise PipelineError(
                f"{out} holds other shards (different: {_differences(before, job)}): choose another --out, or replace "
                "them with --overwrite"
            )
        _clear(out)
    elif (out / TEMP / JOB).exists():
        _clear(out)  # an interrupted job of ours: nothing complete is lost
    elif any(out.iterdir()) and not overwrite:
        raise PipelineError(
            f"{out} is not empty and holds no shards of this tool: choose another --out, or add --overwrite"
        )
    return False


def _read_job(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Dotted names of what changed, with old and new value where they are short."""
    flat_before, flat_after = _flatten(before), _flatten(after)
    changed = [name for name in flat_after if flat_before.get(name) != flat_after[name]]
    words = []
    for name in changed:
        old, new = flat_before.get(name), flat_after[name]
        hashed = isinstance(new, str) and len(new) == 64
        words.append(name if hashed else f"{name} was {old!r}, is {new!r}")
    return "; ".join(words) or "files are missing or damaged"


def _flatten(job: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in job.items():
        flat |= {f"{name}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _splits(out: Path) -> list[str]:
    """Split folders with a manifest below `out`; "" for `out` itself."""
    return sorted(
        "" if path.parent == out else path.parent.name for path in (*out.glob(MANIFEST), *out.glob(f"*/{MANIFEST}"))
    )


def _is_whole(out: Path) -> bool:
    """Whether every shard of every manifest has its length. Digests are left to verification."""
    try:
        manifests = [(out / split, load_manifest(out / split)) for split in _splits(out)]
    except ShardError:
        return False
    shards = [(folder / shard.name, shard.bytes) for folder, manifest in manifests for shard in manifest.shards]
    return bool(shards) and all(path.is_file() and path.stat().st_size == size for path, size in shards)


def _clear(out: Path) -> None:
    """Remove what a sharding job wrote, and nothing else; job.json first, so that a kill leaves an unfinished job."""
    begun = [path.name for path in (out / TEMP).iterdir() if path.is_dir()] if (out / TEMP).is_dir() else []
    folders = [out, *(out / split for split in {*_splits(out), *begun} if split)]
    (out / TEMP).mkdir(exist_ok=True)
    if (out / JOB).exists():
        (out / JOB).replace(out / TEMP / JOB)
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_file() and OURS.fullmatch(path.name):
                path.unlink()
        if folder != out and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    shutil.rmtree(out / TEMP)


def summarise(out: Path) -> dict[str, Any]:
    """Counts of a finished output folder, in all and per split, from its manifests."""
    manifests = {split: load_manifest(out / split) for split in _splits(out)}
    parts = {
        split: _counts([manifest]) | {"manifest": manifest_digest(out / split)} for split, manifest in manifests.items()
    }
    kind = next(iter(manifests.values())).kind
    return {"out": str(out), "kind": kind, **_counts(manifests.values()), "splits": parts}


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


def lines(result: Mapping[str, Any]) -> list[str]:
    """A summary for people."""
    head = "up to date, nothing to do" if result["up_to_date"] else f"written in {result['seconds']:.1f} s"
    text = [f"{result['out']}: {head}"]
    for split, part in result["splits"].items():
        failed = sum(part["failures"].values())
        why = f" ({describe(part['failures'])})" if failed else ""
        text.append(
            f"  {split or '.':<18}{part['samples']:>9,} samples of {part['records']:,} records, {failed:,} failures"
            f"{why}, {part['shards']} shards, {part['bytes'] / 1e6:,.1f} MB"
        )
    if any(result["failures"].values()):
        text.append("  every failed row is in the .parquet beside its shard, columns status and error_message")
    return text
