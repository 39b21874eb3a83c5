"""Try the failed rows of a finished folder again; what succeeds takes the place in its shard that was left empty.

The result is byte for byte that of a run in which those rows had not failed: keys stay, nothing is counted twice, and
readers of img2dataset's layout see nothing new. A shard is made anew beside the old one, and a small file says that it
is ready; only then are its files renamed into place, so that a kill leaves the old shard, the new one, or a change that
the next `vlp shard retry` completes.
"""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines import console
from data_pipelines.errors import PipelineError, ShardError
from data_pipelines.folders import (
    JOB,
    first_manifest,
    read_finished,
    read_job,
    read_members,
    read_rows,
    reason,
    summarise,
)
from data_pipelines.job import LATER, differences, load_parts, recall, recorded_options, strip_all
from data_pipelines.pictures import Prepared, WriteOptions
from data_pipelines.records import Record
from data_pipelines.shard_files import INDEX_SUFFIX, json_file
from data_pipelines.shards import Members, Pools, Work, clean, make_row, plan_work, shard_name, write_files
from data_pipelines.store import TEMP, Store, join
from data_pipelines.write import conclude, describe, finish

STAGE = f"{TEMP}/retry"
READY = ".ready"
Row = tuple[dict[str, Any], str, Members | None]


def retry(out: Path | str, options: WriteOptions, *, progress: bool) -> dict[str, Any]:
    """Try failed rows again; returns how many were tried and became samples, by reason, and the folder's summary.

    `options`: workers and fetch of this attempt; what shapes the output is taken from the folder. The source must still
    be where it was and list the same records. Raises ShardError when it does not.
    """
    began = time.monotonic()
    store = Store(out)
    with store.alone():
        job = read_finished(store)
        _claim(store, job)
        _recover(store)
        tried: Counter[str] = Counter()
        gained: Counter[str] = Counter()
        with console.progress("retrying failed rows", None, progress, "rows") as advance:
            for work, rows in _planned(store, job):
                before = _retry_shard(work, rows, store, recorded_options(job, options), tried, gained)
                advance(before)
        manifest = first_manifest(store)
        parts = load_parts(store)
        finish(store, parts, recorded_options(job, options), manifest.kind, manifest.licences)
        conclude(store, job)
    found = {"tried": dict(tried), "gained": dict(gained), "seconds": round(time.monotonic() - began, 1)}
    return summarise(store) | found


def _claim(store: Store, job: dict[str, Any]) -> None:
    """Mark the folder as being changed; refuse one that an interrupted extension left."""
    begun = read_job(store, join(TEMP, JOB))
    if begun is not None and strip_all(begun) != strip_all(job):
        raise PipelineError(
            f"{store}: an extension was interrupted ({differences(strip_all(job), strip_all(begun))}): finish it first "
            "with the same `vlp shard extend`"
        )
    store.write(join(TEMP, JOB), json_file(job))


def _planned(store: Store, job: dict[str, Any]) -> Iterator[tuple[Work, list[dict[str, Any]]]]:
    """The shards that hold failed rows, with the records that the sources list for them now."""
    options = recorded_options(job, WriteOptions())
    start: Counter[str] = Counter()
    for part in (job, *job.get(LATER, [])):
        source = recall(part, f"{store}/{JOB}")
        counted = Counter(start)
        for work in plan_work(source.module.iter_records(source.config), options, counted):
            start[work.split] = work.number + 1
            name = shard_name(work.number, options)
            try:
                rows = read_rows(store, work.split, name)
            except FileNotFoundError:
                rows = []
            if [row["url"] for row in rows] != [clean(record.origin) for record in work.records]:
                raise ShardError(
                    f"{store}/{join(work.split, name)}.parquet does not list what the source lists now: records were "
                    "added, removed or renamed. Use `vlp shard extend` for new ones, or shard the source again with "
                    "--overwrite"
                )
            if any(row["status"] != "success" for row in rows):
                yield work, rows


def _retry_shard(
    work: Work,
    rows: list[dict[str, Any]],
    store: Store,
    options: WriteOptions,
    tried: Counter[str],
    gained: Counter[str],
) -> int:
    """Try one shard's failed rows, and replace the shard when one of them succeeds; returns the rows tried."""
    failed = [n for n, row in enumerate(rows) if row["status"] != "success"]
    records: list[Record] = [work.records[n] for n in failed]
    pools = Pools(options)
    try:
        found: dict[int, Prepared] = dict(zip(failed, pools.prepare(records), strict=True))
    finally:
        pools.close()
    for n, prepared in found.items():
        why = reason(rows[n])
        tried[why] += 1
        gained[why] += not prepared.reason
    if any(not prepared.reason for prepared in found.values()):
        _replace(work, rows, found, store, options)
    return len(failed)


def _replace(
    work: Work, rows: list[dict[str, Any]], found: dict[int, Prepared], store: Store, options: WriteOptions
) -> None:
    name = shard_name(work.number, options)
    members = _read_members(store, work.split, name)

    def merged() -> Iterator[Row]:
        for position, row in enumerate(rows):
            if position in found:
                yield make_row(work, position, work.records[position], found[position], options)
            else:
                yield row, "", members[row["key"]]

    stage = join(STAGE, work.split)
    write_files(work, merged(), store, stage, options)
    store.write(join(stage, name + READY), b"")
    _recover(store)


def _read_members(store: Store, split: str, name: str) -> dict[str, Members]:
    """Key -> members of every sample of a shard, all in memory."""
    found: dict[str, dict[str, bytes]] = {}
    for key, extension, _, content in read_members(store, split, name):
        found.setdefault(key, {})[extension] = content
    members = {}
    for key, files in found.items():
        (extension,) = files.keys() - {"json", "txt"}
        members[key] = (extension, files[extension], files["json"], files.get("txt"))
    return members


def _recover(store: Store) -> None:
    """Move the shards that are ready into place, and drop those that are not."""
    for split in ("", *store.names(STAGE, "directory")):
        stage = join(STAGE, split) if split else STAGE
        staged = set(store.names(stage))
        for name in sorted(file.removesuffix(READY) for file in staged if file.endswith(READY)):
            for suffix in (".tar", INDEX_SUFFIX, ".parquet", "_stats.json"):
                if name + suffix in staged:
                    store.move(join(stage, name + suffix), join(split, name + suffix))
            store.remove(join(stage, name + READY))
    store.remove_folder(STAGE)


def lines(result: dict[str, Any]) -> list[str]:
    """A summary for people."""
    tried, gained = result["tried"], result["gained"]
    head = f"{result['out']}: {sum(gained.values()):,} of {sum(tried.values()):,} failed rows became samples"
    return [
        f"{head} in {result['seconds']:.1f} s",
        *(f"  {reason:<24}{gained[reason]:>9,} of {count:,}" for reason, count in sorted(tried.items())),
        f"  {result['samples']:,} samples of {result['records']:,} records",
        f"  still failing: {describe(result['failures']) or 'none'}",
    ]
