"""What shards hold, from their parquet alone; one sample with its bytes; and what a job would write."""

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.folders import read_members, read_rows, reason
from data_pipelines.pictures import WriteOptions
from data_pipelines.records import Record
from data_pipelines.shards import Pools
from data_pipelines.sources import Source
from data_pipelines.store import TEMP, Store, join
from data_pipelines.write import describe

OVERHEAD = 2600
"""Bytes of a sample in a tar beside its picture: three headers, json, txt, padding; typical."""
TOP = 10
"""Labels and sources that `stats` names."""


def parquets(store: Store) -> Iterator[tuple[str, str]]:
    """(split, shard name) of every parquet, in order. Raises PipelineError when there is none."""
    found = [
        (split, name.removesuffix(".parquet"))
        for split in ("", *(name for name in store.names(kind="directory") if name != TEMP))
        for name in store.names(split)
        if name.endswith(".parquet") and name[0] != "."
    ]
    if not found:
        raise PipelineError(f"{store}: holds no .parquet of a shard; write shards with `vlp shard SOURCE --out DIR`")
    yield from found


def stats(out: Path | str) -> dict[str, Any]:
    """Counts of rows, failures, captions, labels and sources, and quantiles of sizes and caption lengths."""
    store = Store(out)
    splits: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    captions: Counter[int] = Counter()
    numbers: dict[str, list[int]] = {"width": [], "height": [], "caption words": []}
    rows = 0
    for split, name in parquets(store):
        for row in read_rows(store, split, name):
            rows += 1
            if row["status"] != "success":
                failures[reason(row)] += 1
                continue
            splits[split] += 1
            sources[row.get("source") or ""] += 1
            labels.update(row.get("labels") or ())
            texts = row.get("captions") or [text for text in (row.get("caption"),) if text]
            captions[len(texts)] += 1
            numbers["caption words"] += (len(text.split()) for text in texts)
            numbers["width"].append(row["width"])
            numbers["height"].append(row["height"])
    return {
        "out": str(store),
        "rows": rows,
        "samples": splits.total(),
        "splits": dict(splits),
        "failures": dict(failures.most_common()),
        "captions_per_sample": dict(sorted(captions.items())),
        "labels": len(labels),
        "top_labels": dict(labels.most_common(TOP)),
        "sources": dict(sources.most_common(TOP)),
        "quantiles": {name: _quantiles(values) for name, values in numbers.items() if values},
    }


def _quantiles(values: list[int]) -> dict[str, int]:
    found = np.quantile(values, [0, 0.05, 0.5, 0.95, 1], method="nearest").astype(int).tolist()
    return dict(zip(("min", "p5", "median", "p95", "max"), found, strict=True))


def stats_lines(result: Mapping[str, Any]) -> list[str]:
    """`stats` for people."""
    text = [f"{result['out']}: {result['samples']:,} samples of {result['rows']:,} rows"]
    text += [
        f"  {split or '.':<18}{count:>9,}" for split, count in result["splits"].items() if len(result["splits"]) > 1
    ]
    if result["failures"]:
        text.append(f"  failures: {describe(result['failures'])}")
    for name, values in result["quantiles"].items():
        text.append(f"  {name:<18}" + "  ".join(f"{label} {value:,}" for label, value in values.items()))
    per = ", ".join(f"{count:,} with {number}" for number, count in result["captions_per_sample"].items())
    text.append(f"  captions per sample: {per}")
    if result["labels"]:
        text.append(f"  {result['labels']:,} labels; {describe(result['top_labels'])}")
    text.append(f"  sources: {describe(result['sources'])}")
    return text


def ls(out: Path | str, *, failed: bool = False, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows as short dicts: split, key, status or reason, size, caption; only failures with `failed`."""
    store = Store(out)
    rows = ((split, row) for split, name in parquets(store) for row in read_rows(store, split, name))
    chosen = ((split, row) for split, row in rows if not failed or row["status"] != "success")
    for split, row in itertools.islice(chosen, limit):
        good = row["status"] == "success"
        yield {
            "split": split, "key": row["key"], "status": "success" if good else reason(row),
            "width": row["width"], "height": row["height"], "url": row["url"],
            "text": row["caption"] if good else row["error_message"],
        }  # fmt: skip


def ls_line(row: Mapping[str, Any]) -> str:
    """One row of `ls` for people."""
    size = f"{row['width']}x{row['height']}" if row["width"] else "-"
    return f"{join(row['split'], row['key'])}  {row['status']:<16}{size:<12}{row['url']}  {row['text'] or ''}"[:200]


def show(out: Path | str, key: str) -> tuple[dict[str, Any], str, bytes]:
    """(the row with its place, extension, bytes of the picture); `key` may be `split/key`; a failed row has no bytes.

    Raises ConfigError when no shard holds the key.
    """
    store = Store(out)
    wanted_split, _, bare = key.rpartition("/")
    for split, name in parquets(store):
        if (wanted_split and split != wanted_split) or not bare.startswith(name):
            continue
        rows = [row for row in read_rows(store, split, name) if row["key"] == bare]
        if rows:
            place, extension, image = _image(store, split, name, bare)
            return rows[0] | {"split": split, "shard": join(split, f"{name}.tar"), **place}, extension, image
    raise ConfigError(f"key {key!r} is in no shard of {store}; `vlp shard ls {store}` lists them")


def _image(store: Store, split: str, name: str, key: str) -> tuple[dict[str, int], str, bytes]:
    for stem, extension, offset, content in read_members(store, split, name):
        if stem == key and extension not in ("json", "txt"):
            return {"offset": offset, "bytes": len(content)}, extension, content
    return {}, "", b""


def show_lines(row: Mapping[str, Any]) -> list[str]:
    """`show` for people: every column that holds something."""
    return [
        f"{name:<16}{json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value}"
        for name, value in row.items()
        if value not in (None, [], "")
    ]


def plan(source: Source, options: WriteOptions, sample: int) -> dict[str, Any]:
    """What a job would write: exact counts from the listing, bytes and seconds from up to `sample` pictures tried.

    The pictures are taken evenly from the whole source.
    """
    splits: Counter[str] = Counter()
    count = getattr(source.module, "count", None)
    known = count(source.config) if count else None
    total = sum(1 for _ in source.module.iter_records(source.config)) if known is None else known
    step = max(1, total // max(1, sample))
    chosen: list[Record] = []
    for number, record in enumerate(source.module.iter_records(source.config)):
        splits[record.split] += 1
        if number % step == 0 and len(chosen) < sample:
            chosen.append(record)
    pools = Pools(options)
    began = time.monotonic()
    try:
        tried = list(pools.prepare(chosen))
    finally:
        pools.close()
    seconds = time.monotonic() - began
    good = [prepared for prepared in tried if not prepared.reason]
    rows = splits.total()
    share = rows / max(1, len(tried))
    return {
        "kind": source.name,
        "records": rows,
        "splits": dict(splits),
        "shards": sum(-(-n // options.samples_per_shard) for n in splits.values()),
        "tried": len(tried),
        "failures": dict(Counter(prepared.reason for prepared in tried if prepared.reason)),
        "bytes": round(share * sum(len(prepared.image) + OVERHEAD for prepared in good)),
        "seconds": round(share * seconds, 1),
        "workers": options.workers or len(os.sched_getaffinity(0)),
    }


def plan_lines(result: Mapping[str, Any]) -> list[str]:
    """`plan` for people."""
    failed = f"; of {result['tried']} tried: {describe(result['failures'])}" if result["failures"] else ""
    return [
        f"{result['kind']}: {result['records']:,} records, {result['shards']:,} shards{failed}",
        *(f"  {split:<18}{count:>9,}" for split, count in result["splits"].items() if split),
        f"  about {result['bytes'] / 1e6:,.0f} MB in {result['seconds']:,.0f} s with {result['workers']} workers",
    ]
