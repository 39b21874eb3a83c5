"""One shard: its work item, the writing of its files, and the account of a shard that is done already.

A shard's bytes depend on its work item and the options alone, so any thread, process or machine may write it.
"""

import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Semaphore
from typing import Any, TypeVar

from data_pipelines.console import Advance
from data_pipelines.errors import PipelineError
from data_pipelines.parquet import read_columns
from data_pipelines.pictures import Prepared, WriteOptions, prepare
from data_pipelines.records import BOX_FIELDS, RESERVED, Box, Record, ShardInfo
from data_pipelines.resize import WHOLE, Frame
from data_pipelines.shard_files import INDEX_SUFFIX, Extras, TarWriter, json_file, key_digits, parquet_file
from data_pipelines.store import Store, join

T = TypeVar("T")
R = TypeVar("R")
GROUP = 4
"""Pictures from disk that are handed to a thread together: handing over costs a twentieth of the work on one."""
Members = tuple[str, bytes, bytes, bytes | None]
"""Image extension, image, json and txt of a sample."""


@dataclass(frozen=True, slots=True)
class Work:
    """One shard to write: its rows, and everything else its bytes depend on."""

    split: str
    number: int
    records: tuple[Record, ...]
    types: Mapping[str, int]
    """Types of the passthrough columns, from the first shard of the split up to this one (Extras.rank)."""


@dataclass(frozen=True, slots=True)
class Done:
    """What is known of a written shard: all that a manifest needs."""

    info: ShardInfo
    records: int
    failures: Mapping[str, int]
    sources: Mapping[str, int]
    origins: tuple[str, ...]
    digests: tuple[str, ...]
    """sha256 of each row's original bytes, empty where there were none."""
    first_failure: str = ""


@dataclass
class Pools:
    """Threads of one process. URLs wait in threads of their own, and never more than `workers` pictures are decoded."""

    options: WriteOptions
    local: ThreadPoolExecutor = field(init=False)
    fetching: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.workers = self.options.workers or len(os.sched_getaffinity(0))
        self.gate = Semaphore(self.workers)
        self.local = ThreadPoolExecutor(self.workers, thread_name_prefix="shard")
        self.fetching = ThreadPoolExecutor(self.options.fetch_concurrency, thread_name_prefix="fetch")

    def submit(self, record: Record) -> Future[Prepared]:
        """Prepare a record's picture in the background."""
        pool = self.fetching if isinstance(record.image, str) else self.local
        return pool.submit(prepare, record, self.options, self.gate)

    def prepare(self, records: Sequence[Record]) -> Iterator[Prepared]:
        """Prepared pictures in order, a bounded number in flight."""
        if any(isinstance(record.image, str) for record in records):
            return in_order(self.submit, records, 4 * self.workers + 2 * self.options.fetch_concurrency)
        groups = [records[first : first + GROUP] for first in range(0, len(records), GROUP)]
        return chain.from_iterable(in_order(self._submit_group, groups, 2 * self.workers))

    def _submit_group(self, records: Sequence[Record]) -> Future[Iterable[Prepared]]:
        return self.local.submit(lambda: [prepare(record, self.options, self.gate) for record in records])

    def close(self) -> None:
        """End the threads; what has not begun is dropped."""
        self.local.shutdown(cancel_futures=True)
        self.fetching.shutdown(cancel_futures=True)


def in_order(submit: Callable[[T], "Future[R]"], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Results in the order of the items, with up to `ahead` further ones under way."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(submit(item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def shard_name(number: int, options: WriteOptions) -> str:
    """00003 for shard 3."""
    return f"{number:0{options.oom_shard_count}d}"


def plan_work(records: Iterable[Record], options: WriteOptions, start: Mapping[str, int]) -> Iterator[Work]:
    """Records grouped into shards, split by split, in order; `start` says how many shards a split has already."""
    waiting: dict[str, list[Record]] = {}
    numbers, types = Counter(start), dict[str, Extras]()

    def close(split: str) -> Work:
        numbers[split] += 1
        return Work(split, numbers[split] - 1, tuple(waiting.pop(split)), dict(types[split].rank))

    for record in records:
        split = record.split
        if split not in types:
            _check_split(split)
            types[split] = Extras()
        if clash := RESERVED & set(record.extra):
            raise ValueError(f"Record.extra holds columns that the writer computes: {', '.join(sorted(clash))}")
        types[split].see(record.extra)
        waiting.setdefault(split, []).append(record)
        if len(waiting[split]) == options.samples_per_shard:
            yield close(split)
    for split in [split for split in types if split in waiting]:
        yield close(split)


def _check_split(split: str) -> None:
    if split and not split.replace("-", "_").isidentifier():
        raise ValueError(f"Record.split {split!r}: use letters, digits, - and _, because it becomes a folder name")


def write_shard(work: Work, store: Store, options: WriteOptions, pools: Pools, advance: Advance) -> Done:
    """Write all files of one shard; the statistics come last and mark it as done."""
    rows = _prepared_rows(work, options, pools, advance)
    return write_files(work, rows, store, work.split, options)


def _prepared_rows(
    work: Work, options: WriteOptions, pools: Pools, advance: Advance
) -> Iterator[tuple[dict[str, Any], str, Members | None]]:
    for position, (record, prepared) in enumerate(zip(work.records, pools.prepare(work.records), strict=True)):
        yield make_row(work, position, record, prepared, options)
        advance(1)


def make_row(
    work: Work, position: int, record: Record, prepared: Prepared, options: WriteOptions
) -> tuple[dict[str, Any], str, Members | None]:
    """A row, the reason of its failure ("" for a sample), and the tar members of a sample."""
    digits = key_digits(options.samples_per_shard)
    name = shard_name(work.number, options)
    row = _row(f"{name}{position:0{digits}d}" if digits else name, record, prepared)
    if prepared.reason:
        return row, prepared.reason, None
    member = {name: value for name, value in row.items() if name != "boxes" or value}
    text = json.dumps(member, indent=4, ensure_ascii=False).encode()
    caption = row["caption"].encode() if record.captions else None
    row["stored_sha256"] = hashlib.sha256(prepared.image).hexdigest()
    row["text_sha256"] = hashlib.sha256(text + (caption or b"")).hexdigest()
    return row, "", (prepared.extension, prepared.image, text, caption)


def write_files(
    work: Work, rows: Iterable[tuple[dict[str, Any], str, Members | None]], store: Store, folder: str,
    options: WriteOptions,
) -> Done:  # fmt: skip
    """Tar, index, parquet and statistics of a shard below `folder`, in this order, each whole or not at all."""
    start = time.time()
    name = shard_name(work.number, options)
    table: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    with _writing(store), store.scratch() as scratch, _growing(scratch / f"{work.split}-{name}.tar") as temp:
        with temp.open("wb", buffering=1 << 20) as stream:
            tar = TarWriter(stream)
            for row, reason, members in rows:
                table.append(row)
                reasons[reason or "success"] += 1
                if members:
                    tar.add(row["key"], *members)
            digest = tar.close()
        store.put(temp, join(folder, f"{name}.tar"))
    parquet = parquet_file(table, Extras(work.types))
    statuses = Counter(row["status"] for row in table)
    end = time.time()
    stats = {
        "count": len(table),
        "successes": statuses["success"],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "duration": end - start,
        "start_time": start,
        "end_time": end,
        "status_dict": dict(sorted(reasons.items())),
        "bytes": tar.bytes,
        "sha256": digest,
        "parquet_sha256": hashlib.sha256(parquet).hexdigest(),
    }
    with _writing(store):
        store.write(join(folder, name + INDEX_SUFFIX), tar.index_file())
        store.write(join(folder, f"{name}.parquet"), parquet)
        store.write(join(folder, f"{name}_stats.json"), json_file(stats))
    return _account(name, stats, table)


@contextmanager
def _writing(store: Store) -> Iterator[None]:
    """A full disk and its like as a message; what is finished stays."""
    try:
        yield
    except OSError as error:
        raise PipelineError(
            f"{store}: cannot be written ({error.strerror or error}); finished shards stay, and the same command goes "
            "on from there"
        ) from error


@contextmanager
def _growing(temp: Path) -> Iterator[Path]:
    """A temp file that is gone afterwards, whatever happens."""
    try:
        yield temp
    finally:
        temp.unlink(missing_ok=True)


def _account(name: str, stats: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> Done:
    good = [row for row in table if row["status"] == "success"]
    failed = next((row for row in table if row["status"] != "success"), None)
    return Done(
        info=ShardInfo(name=f"{name}.tar", samples=len(good), bytes=stats["bytes"], sha256=stats["sha256"]),
        records=len(table),
        failures={reason: count for reason, count in stats["status_dict"].items() if reason != "success"},
        sources=Counter(row["source"] for row in good),
        origins=tuple(row["url"] for row in table),
        digests=tuple(row["sha256"] or "" for row in table),
        first_failure=f"{failed['url']}: {failed['error_message']}" if failed else "",
    )


ACCOUNTED = ["url", "source", "status", "error_message", "sha256"]
"""Columns of the parquet that an account is made of."""


def load_done(store: Store, folder: str, name: str) -> Done | None:
    """The account of a shard that was written whole, from its statistics and parquet; no picture is read.

    None when the shard is not there, not finished, or of another length than its statistics say.
    """
    try:
        stats = json.loads(store.read(join(folder, f"{name}_stats.json")))
        size = store.size(join(folder, f"{name}.tar"))
        if not isinstance(stats, dict) or size is None or size != stats.get("bytes"):
            return None
        content = store.read(join(folder, f"{name}.parquet"))
        rows = read_columns(content, ACCOUNTED).to_pylist()
    except (OSError, ValueError):  # missing, not JSON, or not parquet (pyarrow.ArrowInvalid is a ValueError)
        return None
    return _account(name, stats, rows) if len(rows) == stats.get("count") else None


def _row(key: str, record: Record, prepared: Prepared) -> dict[str, Any]:
    """A row of the parquet and of the json member."""
    width, height = prepared.size or (None, None)
    original_width, original_height = prepared.original or (None, None)
    captions = [clean(caption) for caption in record.captions]
    return {
        "url": clean(record.origin),
        "caption": captions[0] if captions else None,
        "captions": captions,
        "labels": [clean(label) for label in record.labels],
        "source": clean(record.source),
        "boxes": [dict(zip(BOX_FIELDS, box, strict=True)) for box in shown(record.boxes, prepared.frame)],
        **{name: clean(value) if isinstance(value, str) else value for name, value in record.extra.items()},
        "key": key,
        "status": "failed_to_download" if prepared.unread else "failed_to_resize" if prepared.reason else "success",
        "error_message": clean(prepared.message) if prepared.message else None,
        "width": width,
        "height": height,
        "original_width": original_width,
        "original_height": original_height,
        "sha256": prepared.sha256,
    }


def clean(text: str) -> str:
    """Text without lone surrogates (undecodable file names, broken JSON escapes), which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def shown(boxes: Sequence[Box], frame: Frame) -> Iterator[Box]:
    """Boxes as fractions of the stored picture, which shows `frame` of the original: cut at its edges, or left out."""
    if frame == WHOLE:
        yield from boxes
        return
    left, top, right, bottom = frame
    for box in boxes:
        x0, x1 = (min(max((x - left) / (right - left), 0.0), 1.0) for x in (box[0], box[2]))
        y0, y1 = (min(max((y - top) / (bottom - top), 0.0), 1.0) for y in (box[1], box[3]))
        if x0 < x1 and y0 < y1:
            yield x0, y0, x1, y1, box[4]
