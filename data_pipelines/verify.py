"""Every fault of a folder of shards: inside the tars, and between the tars and the files that describe them.

The bytes are read once: a shard's digest vouches for all of its content, and only where it does not agree is each
sample's own digest asked which one changed.
"""

import hashlib
import io
import json
import mmap
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipelines import console
from data_pipelines.arrays import load_array
from data_pipelines.errors import PipelineError, ShardError
from data_pipelines.folders import JOB, manifest_of, read_job, reason
from data_pipelines.images import MAX_PIXELS
from data_pipelines.parquet import read_columns
from data_pipelines.records import MANIFEST, Manifest, ShardInfo
from data_pipelines.shard_files import BLOCK, INDEX_COLUMNS, INDEX_SUFFIX
from data_pipelines.store import TEMP, Store, join
from data_pipelines.tar_faults import KINDS, Fault, Found, TarCheck

WANTED = (
    "key", "status", "error_message", "source", "caption", "width", "height", "sha256", "stored_sha256", "text_sha256",
)  # fmt: skip
"""Columns of the parquet that are compared."""
Rows = list[dict[str, Any]]


@dataclass
class Outcome:
    """What was found in one shard and the files beside it."""

    name: str
    faults: list[Fault] = field(default_factory=list)
    samples: int = 0
    bytes: int = 0
    records: int | None = None
    failures: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)

    def fault(self, kind: str, detail: str, key: str = "", offset: int | None = None) -> None:
        """Note something wrong."""
        self.faults.append(Fault(kind, self.name, detail, key, offset))


@dataclass(frozen=True)
class Split:
    """One folder of shards and what its manifest says."""

    store: Store
    folder: str
    manifest: Manifest | None
    max_pixels: int

    @property
    def known(self) -> dict[str, ShardInfo]:
        """Shards of the manifest by name."""
        return {info.name: info for info in self.manifest.shards} if self.manifest else {}

    @property
    def tars(self) -> list[str]:
        """Names of the tars that are there."""
        return [name for name in self.store.names(self.folder) if name.endswith(".tar") and name[0] != "."]


def verify(out: Path | str, *, workers: int = 0, max_pixels: int | None = None, progress: bool) -> dict[str, Any]:
    """Check all shards below `out`; returns counts and the list of faults. Raises PipelineError when there is nothing.

    `max_pixels`: limit of width x height; by default that of the folder's own options.
    """
    began = time.monotonic()
    store = Store(out)
    faults, splits = _open(store, max_pixels)
    total: Counter[str] = Counter()
    shards = sum(len(split.tars) for split in splits)
    with (
        console.progress(f"verifying {store}", shards, progress, "shards") as advance,
        ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool,
    ):
        for split in splits:
            outcomes = []
            for outcome in pool.map(partial(check_shard, split), split.tars):
                outcomes.append(outcome)
                faults += outcome.faults
                total.update(shards=1, samples=outcome.samples, bytes=outcome.bytes)
                advance(1)
            faults += _check_manifest(split, outcomes)
    return {
        "out": str(store),
        **{name: total[name] for name in ("shards", "samples", "bytes")},
        "manifest": all(split.manifest for split in splits),
        "faults": [asdict(fault) for fault in faults],
        "seconds": round(time.monotonic() - began, 2),
    }


def _open(store: Store, max_pixels: int | None) -> tuple[list[Fault], list[Split]]:
    faults: list[Fault] = []
    splits = []
    for folder in ("", *(name for name in store.names(kind="directory") if name != TEMP)):
        manifest = None
        if store.size(join(folder, MANIFEST)) is not None:
            try:
                manifest = manifest_of(store, folder)
            except ShardError as error:
                faults.append(Fault("manifest_differs", join(folder, MANIFEST), str(error)))
        limit = manifest.options.get("max_pixels") if manifest else None
        split = Split(store, folder, manifest, max_pixels or (limit if isinstance(limit, int) else MAX_PIXELS))
        if manifest or split.tars:
            splits.append(split)
            if manifest is None and not faults and store.size(JOB) is not None:
                faults.append(Fault("missing_file", join(folder, MANIFEST), "this tool wrote the shards; it is gone"))
    if not splits:
        raise PipelineError(f"{store}: holds no .tar shard and no {MANIFEST}; write some with `vlp shard SOURCE --out`")
    if store.size(join(TEMP, JOB)) is not None:
        faults.append(Fault("unfinished_job", TEMP, "a job was interrupted here; run its command again"))
    return faults, splits


def check_shard(split: Split, name: str) -> Outcome:
    """One tar, its index, parquet and statistics, and its line in the manifest."""
    outcome = Outcome(join(split.folder, name))
    info = split.known.get(name)
    if split.manifest and info is None:
        outcome.fault("foreign_shard", "the manifest does not name this shard")
    with _bytes(split.store, outcome.name) as data:
        digest = hashlib.sha256(data).hexdigest()
        check = TarCheck(outcome.name, data, split.max_pixels).run()
        outcome.samples, outcome.bytes = len(check.samples), len(data)
        if info:
            _compare_info(outcome, info, digest)
        stats, rows, trusted = _read_beside(split, outcome, name)
        if stats and stats.get("sha256", digest) != digest and info is None:
            outcome.fault("stats_differ", f"sha256 is {digest}, _stats.json says {stats['sha256']}")
        whole = info is not None and info.sha256 == digest and trusted
        if rows is not None:
            _compare_rows(outcome, check, rows, data if not whole else None, not check.faults)
        _compare_index(split, outcome, check)
        if not whole and info is not None and not check.faults:
            _check_padding(outcome, check, data)
    outcome.faults[:0] = check.faults
    return outcome


@contextmanager
def _bytes(store: Store, name: str) -> Iterator[memoryview]:
    """A shard's content; mapped when it is local."""
    if not store.local or not store.size(name):
        yield memoryview(store.read(name))
        return
    with (store.local / name).open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        with memoryview(mapped) as view:
            yield view


def _compare_info(outcome: Outcome, info: ShardInfo, digest: str) -> None:
    found = {"bytes": outcome.bytes, "sha256": digest, "samples": outcome.samples}
    for name, value in found.items():
        if (expected := getattr(info, name)) != value:
            outcome.fault("manifest_differs", f"{name}: the manifest says {expected}, the shard has {value}")


def _read_beside(split: Split, outcome: Outcome, name: str) -> tuple[dict[str, Any], Rows | None, bool]:
    """Statistics, rows of the parquet, and whether the parquet is the one that was written with the statistics."""
    stem = outcome.name.removesuffix(".tar")
    rows: Rows | None = None
    content = b""
    read = read_job(split.store, f"{stem}_stats.json")
    stats = read or {}
    if read == {}:
        outcome.fault("stats_differ", "_stats.json is no JSON object")
    elif read is None and split.manifest:
        outcome.fault("missing_file", f"{Path(stem).name}_stats.json is not there")
    try:
        content = split.store.read(f"{stem}.parquet")
        names = pq.read_schema(io.BytesIO(content)).names
        rows = read_columns(content, [column for column in WANTED if column in names]).to_pylist()
    except FileNotFoundError:
        if split.manifest:
            outcome.fault("missing_file", f"{Path(stem).name}.parquet is not there")
    except (OSError, ValueError) as error:
        outcome.fault("parquet_differs", f"the parquet cannot be read: {error}")
    if rows is None:
        return stats, None, False
    good = sum(row.get("status") == "success" for row in rows)
    for column, value in {"count": len(rows), "successes": good}.items():
        if stats.get(column, value) != value:
            detail = f"{column}: _stats.json says {stats[column]}, the parquet has {value}"
            outcome.fault("parquet_differs", detail)
    trusted = stats.get("parquet_sha256") == hashlib.sha256(content).hexdigest()
    if "parquet_sha256" in stats and not trusted:
        outcome.fault("parquet_differs", "the parquet is not the one that was written with the shard (sha256)")
    return stats, rows, trusted


def _compare_rows(
    outcome: Outcome, check: TarCheck, rows: Rows, data: memoryview | None, sound: bool
) -> None:  # fmt: skip
    """Keys, captions, sizes and digests; `data` is given when each sample's digest is to be computed."""
    outcome.records = len(rows)
    good = {row["key"]: row for row in rows if row.get("status") == "success"}
    for row in rows:
        if row.get("status") == "success":
            outcome.sources[row.get("source") or ""] += 1
        else:
            outcome.failures[reason(row)] += 1
    there = {sample.key for sample in check.samples}
    if missing := [key for key in good if key not in there]:
        detail = f"{len(missing)} samples of the parquet are not in the tar, {missing[0]} to {missing[-1]}"
        outcome.fault("parquet_differs", detail, missing[0])
    for sample in check.samples:
        listed = good.get(sample.key)
        if listed is None:
            outcome.fault("parquet_differs", "the parquet lists no such sample", sample.key, sample.offset)
            continue
        _compare_row(outcome, sample, listed)
        if data is not None and listed.get("stored_sha256"):
            _compare_content(outcome, sample, listed, data)
    keys = [sample.key for sample in check.samples]
    if sound and not missing and sorted(keys) == sorted(good) and keys != list(good):
        outcome.fault("parquet_differs", "the samples are in another order than the rows")


def _compare_row(outcome: Outcome, sample: Found, row: Mapping[str, Any]) -> None:
    caption, text = row.get("caption"), sample.text
    if caption is not None and text is None and "txt" not in sample.members:
        outcome.fault("missing_member", "no txt, the parquet has a caption", sample.key, sample.offset)
    elif text is not None and text != (caption or ""):
        kind = "parquet_differs" if text else "empty_member"
        outcome.fault(kind, f"txt {text[:40]!r}, parquet {caption!r:.40}", sample.key, sample.members["txt"].header)
    if sample.size and row.get("width") and sample.size != (row["width"], row["height"]):
        detail = f"picture of {sample.size}, parquet {(row['width'], row['height'])}"
        outcome.fault("parquet_differs", detail, sample.key, sample.offset)
    if "json" not in sample.members:
        outcome.fault("missing_member", "no json", sample.key, sample.offset)
    for name in ("key", "sha256"):
        found = (sample.columns or row).get(name, row.get(name))
        if found != row.get(name):
            detail = f"{name}: json {found!r:.70}, parquet {row.get(name)!r:.70}"
            outcome.fault("parquet_differs", detail, sample.key, sample.members["json"].header)


def _compare_content(outcome: Outcome, sample: Found, row: Mapping[str, Any], data: memoryview) -> None:
    """Which member's bytes changed since the shard was written."""
    parts = {name: data[member.start : member.start + member.size] for name, member in sample.members.items()}
    image = next((name for name in parts if name in KINDS), None)
    if image and hashlib.sha256(parts[image]).hexdigest() != row["stored_sha256"]:
        member = sample.members[image]
        outcome.fault("payload_changed", f"{member.name} is not what was written", sample.key, member.start)
    text = bytes(parts.get("json", b"")) + bytes(parts.get("txt", b""))
    if hashlib.sha256(text).hexdigest() != row["text_sha256"]:
        changed = "txt" if "txt" in parts and sample.text != row.get("caption") else "json"
        if changed in sample.members:
            member = sample.members[changed]
            outcome.fault("payload_changed", f"{member.name} is not what was written", sample.key, member.start)


def _compare_index(split: Split, outcome: Outcome, check: TarCheck) -> None:
    path = outcome.name.removesuffix(".tar") + INDEX_SUFFIX
    try:
        index = load_array(io.BytesIO(split.store.read(path)))
    except FileNotFoundError:
        if split.manifest:
            outcome.fault("missing_file", f"{Path(path).name} is not there")
        return
    except (ValueError, EOFError, OSError) as error:
        outcome.fault("index_differs", f"the index cannot be read: {error}")
        return
    rows = [_index_row(sample) for sample in check.samples]
    if index.shape != (len(rows), len(INDEX_COLUMNS)):
        outcome.fault("index_differs", f"index of {index.shape}, the tar holds {len(rows)} samples")
        return
    wrong = (n for n, (row, found) in enumerate(zip(rows, index.tolist(), strict=True)) if row != found)
    if (first := next(wrong, None)) is not None:
        sample = check.samples[first]
        outcome.fault("index_differs", f"index {index[first].tolist()}, tar {rows[first]}", sample.key, sample.offset)


def _index_row(sample: Found) -> list[int]:
    image = next((member for name, member in sample.members.items() if name in KINDS), None)
    members = (image, sample.members.get("json"), sample.members.get("txt"))
    return [number for member in members for number in ((member.start, member.size) if member else (0, 0))]


def _check_padding(outcome: Outcome, check: TarCheck, data: memoryview) -> None:
    """Bytes between members, which no digest of a sample covers."""
    for sample in check.samples:
        for member in sample.members.values():
            end = member.start + member.size
            if any(data[end : end + -member.size % BLOCK]):
                outcome.fault("payload_changed", f"padding behind {member.name} is not zero", sample.key, end)


def _check_manifest(split: Split, outcomes: list[Outcome]) -> list[Fault]:
    """What only the whole folder shows: missing shards, and sums that do not agree."""
    if split.manifest is None:
        return []
    there = {Path(outcome.name).name for outcome in outcomes}
    known = split.known
    faults = [
        Fault("missing_shard", join(split.folder, name), "the manifest names this shard; the file is not there")
        for name in known
        if name not in there
    ]
    faults += _check_sizes(split)
    ours = [outcome for outcome in outcomes if Path(outcome.name).name in known]
    if faults or any(outcome.records is None for outcome in ours):
        return faults
    sums: dict[str, Any] = {
        "records": sum(outcome.records or 0 for outcome in ours),
        "samples": sum(info.samples for info in known.values()),
        "failures": dict(sum((outcome.failures for outcome in ours), Counter())),
        "sources": dict(sum((outcome.sources for outcome in ours), Counter())),
    }
    return [
        Fault(
            "manifest_differs",
            join(split.folder, MANIFEST),
            f"{name}: manifest {getattr(split.manifest, name)}, shards {value}",
        )
        for name, value in sums.items()
        if getattr(split.manifest, name) != value
    ]


def _check_sizes(split: Split) -> list[Fault]:
    name = join(split.folder, "sizes.json")
    expected = {info.name: info.samples for info in split.known.values()}
    try:
        found = json.loads(split.store.read(name))
    except FileNotFoundError:
        return [Fault("missing_file", name, "open_clip reads the number of samples from it")]
    except ValueError as error:
        return [Fault("manifest_differs", name, f"not JSON: {error}")]
    return [] if found == expected else [Fault("manifest_differs", name, "other counts than the manifest's")]


def lines(result: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    faults = result["faults"]
    head = f"{result['shards']} shards, {result['samples']:,} samples, {result['bytes'] / 1e6:,.1f} MB"
    text = [f"{result['out']}: {head}, {len(faults)} faults, {result['seconds']:.1f} s"]
    if not result["manifest"]:
        text.append("  without a manifest: samples that were lost before cannot be seen")
    for fault in faults:
        place = f" byte {fault['offset']}" if fault["offset"] is not None else ""
        key = f" {fault['key']}" if fault["key"] else ""
        text.append(f"  {fault['kind']:<18}{fault['shard']}{key}{place}: {fault['detail']}")
    return text
