"""Records -> shards: WebDataset tars in img2dataset's layout, an offset index beside each, one manifest per split.

    out/[split/]00000.tar 00000.index.npy 00000.parquet 00000_stats.json ... sizes.json manifest.json
    out/job.json    written last of all; until then out/_tmp exists

A file appears under its name whole or not at all. Every record is accounted for: records = samples + failures.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines import console
from data_pipelines.distribute import executor
from data_pipelines.errors import PipelineError
from data_pipelines.folders import INPUT, JOB
from data_pipelines.pictures import WriteOptions
from data_pipelines.records import MANIFEST, Manifest, Record, ShardInfo
from data_pipelines.shard_files import json_file
from data_pipelines.shards import Done, Work, clean, in_order, load_done, plan_work, shard_name
from data_pipelines.store import TEMP, Store, join

__all__ = ["WriteOptions", "describe", "write_shards"]


@dataclass
class Part:
    """The account of one split, shard by shard in order; small however many rows there are."""

    shards: list[ShardInfo] = field(default_factory=list)
    records: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    first_failure: str = ""

    def __post_init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, done: Done) -> None:
        """Account for the next shard."""
        self.shards.append(done.info)
        self.records += done.records
        self.failures.update(done.failures)
        self.sources.update(done.sources)
        self.first_failure = self.first_failure or done.first_failure
        for origin, content in zip(done.origins, done.digests, strict=True):
            self._digest.update(f"{origin}\0{content}\n".encode())

    def manifest(self, kind: str, options: WriteOptions, licences: Mapping[str, str]) -> Manifest:
        """What vouches for the split."""
        manifest = Manifest(
            kind=kind,
            source_digest=self._digest.hexdigest(),
            records=self.records,
            samples=sum(shard.samples for shard in self.shards),
            failures=dict(sorted(self.failures.items())),
            sources=dict(sorted(self.sources.items())),
            licences=dict(sorted(licences.items())),
            options=options.recorded(),
            shards=tuple(self.shards),
        )
        assert manifest.records == manifest.samples + sum(manifest.failures.values())
        return manifest


Parts = dict[str, Part]
"""Split -> its account."""


def write_shards(
    records: Iterable[Record],
    out: Path | str,
    options: WriteOptions,
    *,
    kind: str,
    licences: Mapping[str, str],
    progress: bool,
    total: int | None = None,
    source: Mapping[str, Any] | None = None,
    place: Mapping[str, str] | None = None,
    resume: bool = False,
) -> dict[str, Manifest]:
    """Write all records below `out`, a path or a URL; returns split -> manifest ("" for records without a split).

    `source` says in job.json what the records came from, `place` where that lay; `total` gives the progress bar an end.
    With `resume`, shards of the same job that are finished already are kept, and their pictures are not read again.
    Raises PipelineError when `out` already holds other shards, or when not one sample could be written.
    """
    store = Store(out)
    job = {"kind": kind, "options": options.recorded(), "source": dict(source or {}), INPUT: dict(place or {})}
    fresh = not resume
    store.write(join(TEMP, JOB), json_file(job))
    parts: Parts = {}
    try:
        for work, done in run(records, store, options, kind=kind, progress=progress, total=total, resume=resume):
            fresh = False
            parts.setdefault(work.split, Part()).add(done)
        manifests = finish(store, parts, options, kind, licences)
    finally:
        if fresh:
            store.remove_folder(TEMP)  # the source failed before its first shard: leave nothing behind
    conclude(store, job)
    return manifests


def run(
    records: Iterable[Record],
    store: Store,
    options: WriteOptions,
    *,
    kind: str,
    progress: bool,
    total: int | None,
    resume: bool,
    start: Mapping[str, int] | None = None,
) -> Iterator[tuple[Work, Done]]:
    """Every shard of these records in order, as it is finished; with `resume`, finished ones are only accounted for.

    `start`: shards that a split has already, of other records.
    """
    under_way: deque[Work] = deque()

    def planned() -> Iterator[Work]:
        seen: set[str] = set(start or {})
        for work in plan_work(records, options, start or {}):
            if not resume and work.split not in seen:
                _refuse_shards(store, work.split)
                seen.add(work.split)
            under_way.append(work)
            yield work

    def submit(work: Work) -> "Future[Done]":
        done = load_done(store, work.split, shard_name(work.number, options)) if resume else None
        if done is None or done.origins != tuple(clean(record.origin) for record in work.records):
            return write(work)
        advance(done.records)
        future: Future[Done] = Future()
        future.set_result(done)
        return future

    with (
        console.progress(f"sharding {kind}", total, progress, "pictures") as advance,
        executor(store, options, advance) as (write, ahead),
    ):
        for done in in_order(submit, planned(), ahead):
            yield under_way.popleft(), done


def _refuse_shards(store: Store, split: str) -> None:
    if any(name.endswith(".tar") for name in store.names(split)):
        raise PipelineError(
            f"{join(str(store), split)} already holds shards: choose another --out, or replace them with --overwrite"
        )


def finish(
    store: Store, parts: Parts, options: WriteOptions, kind: str, licences: Mapping[str, str]
) -> dict[str, Manifest]:
    """Write sizes.json and the manifest of every split from the accounts of its shards."""
    if not any(shard.samples for part in parts.values() for shard in part.shards):
        raise PipelineError(_nothing(kind, parts.values()))
    manifests = {}
    for split, part in parts.items():
        manifest = manifests[split] = part.manifest(kind, options, licences)
        store.write(join(split, "sizes.json"), json_file({shard.name: shard.samples for shard in part.shards}))
        store.write(join(split, MANIFEST), json_file(manifest.model_dump(mode="json")))
    return manifests


def conclude(store: Store, job: Mapping[str, Any]) -> None:
    """Mark the folder as complete, and remove what only an unfinished one has."""
    store.write(JOB, json_file(job))
    store.remove_folder(TEMP)


def _nothing(kind: str, parts: Iterable[Part]) -> str:
    failures: Counter[str] = Counter()
    first = ""
    for part in parts:
        failures.update(part.failures)
        first = first or part.first_failure
    if not failures:
        return f"{kind}: the source has no records, so there is nothing to write"
    return f"{kind}: none of {failures.total()} records became a sample ({describe(failures)}); the first: {first}"


def describe(failures: Mapping[str, int]) -> str:
    """Failure counts in words, most frequent first."""
    return ", ".join(
        f"{name} {count:,}" for name, count in sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    )
