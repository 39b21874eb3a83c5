"""Records -> shards: WebDataset tars in img2dataset's layout, an offset index beside each, one manifest per split.

    out/[split/]00000.tar 00000.index.npy 00000.parquet 00000_stats.json ... sizes.json manifest.json
    out/job.json    written last of all; until then out/_tmp exists

A file appears under its name whole or not at all. Every record is accounted for: records = samples + failures.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from data_pipelines import console
from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, ConfigError, PipelineError
from data_pipelines.files import publish
from data_pipelines.images import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    EncodeFormat,
    ResizeMode,
    encode,
    is_rotated,
    needs_resize,
    open_checked,
    open_header,
    resize_to,
    resized_size,
    swaps_sides,
    upright,
)
from data_pipelines.records import MANIFEST, RESERVED, Manifest, Record, ShardInfo
from data_pipelines.shard_files import Extras, TarWriter, key_digits, write_index, write_json, write_parquet

JOB = "job.json"
"""What made a folder: source, options. Its presence says that the folder is complete."""
TEMP = "_tmp"
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose original bytes may stay, and their member extension."""


class WriteOptions(StrictModel):
    """How pictures become shard members. Names are img2dataset's."""

    image_size: int | None = Field(default=None, ge=1)
    """Target side in pixels; None leaves every picture as it is."""
    resize_mode: ResizeMode = "no"
    resize_only_if_bigger: bool = True
    encode_format: EncodeFormat | None = None
    """None keeps a picture's own format (GIF becomes png). Original bytes are kept wherever nothing has to change."""
    encode_quality: int | None = Field(default=None, ge=0, le=100)
    """1..100 for jpg and webp (default 95), compression level 0..9 for png (default 6)."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Rows per shard; failed rows use up their index."""
    oom_shard_count: int = Field(default=5, ge=1, le=18)
    """Digits of a shard's name."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    workers: int = Field(default=0, ge=0)
    """Threads for checking, resizing and encoding; 0 = one per core. Does not change a byte of the output."""

    @model_validator(mode="after")
    def _consistent(self) -> "WriteOptions":
        if (self.image_size is None) != (self.resize_mode == "no"):
            raise ConfigError(
                f"image_size {self.image_size} with resize_mode {self.resize_mode!r}: give both or neither; modes are "
                "keep_ratio, keep_ratio_largest, center_crop, border"
            )
        if self.encode_quality is not None and self.encode_format is None:
            raise ConfigError(f"encode_quality {self.encode_quality} has no effect without encode_format")
        if self.encode_format == "png" and (self.encode_quality or 0) > 9:
            raise ConfigError(f"encode_quality {self.encode_quality}: png takes a compression level of 0 to 9")
        return self

    def recorded(self) -> dict[str, str | int | float | bool | None]:
        """The options that shape the output, for the manifest."""
        return self.model_dump(exclude={"workers"})


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A record's picture, ready for the tar, or the reason why there is none."""

    sha256: str | None = None
    """Of the original bytes."""
    image: bytes = b""
    extension: str = ""
    original: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    reason: str = ""
    message: str | None = None
    unread: bool = False


def write_shards(
    records: Iterable[Record],
    out: Path,
    options: WriteOptions,
    *,
    kind: str,
    licences: Mapping[str, str],
    progress: bool,
    total: int | None = None,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Manifest]:
    """Write all records below `out`; returns split -> manifest ("" for records without a split).

    `source` says in job.json what the records came from; `total` gives the progress bar an end. Raises PipelineError
    when `out` already holds shards, or when not one sample could be written.
    """
    temp = out / TEMP
    temp.mkdir(parents=True, exist_ok=True)
    write_json(temp / JOB, {"kind": kind, "options": options.recorded(), "source": dict(source or {})})
    folders: dict[str, _Folder] = {}
    try:
        with console.progress(f"sharding {kind}", total, progress, "pictures") as advance:
            for record, prepared in _prepare_all(records, options):
                if record.split not in folders:
                    folders[record.split] = _Folder(out, record.split, options)
                folders[record.split].add(record, prepared)
                advance(1)
        if not any(folder.samples for folder in folders.values()):
            raise PipelineError(_nothing(kind, folders.values()))
        manifests = {split: folder.finish(kind, licences) for split, folder in folders.items()}
    finally:
        for folder in folders.values():
            folder.abandon()
        if not folders:
            shutil.rmtree(temp)  # the source failed before its first record: leave nothing behind
    publish(temp / JOB, out / JOB)
    shutil.rmtree(temp)
    return manifests


def _nothing(kind: str, folders: Iterable["_Folder"]) -> str:
    failures: Counter[str] = Counter()
    first = ""
    for folder in folders:
        failures += folder.failures
        first = first or folder.first_failure
    if not failures:
        return f"{kind}: the source has no records, so there is nothing to write"
    return f"{kind}: none of {failures.total()} records became a sample ({describe(failures)}); the first: {first}"


def describe(failures: Mapping[str, int]) -> str:
    """Failure counts in words, most frequent first."""
    return ", ".join(
        f"{name} {count:,}" for name, count in sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    )


def _prepare_all(records: Iterable[Record], options: WriteOptions) -> Iterator[tuple[Record, _Prepared]]:
    """Records with their pictures, in order, a bounded number in flight."""
    workers = options.workers or len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="shard")
    pending: deque[tuple[Record, Future[_Prepared]]] = deque()
    try:
        for record in records:
            pending.append((record, pool.submit(prepare, record, options)))
            if len(pending) > 4 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(record: Record, options: WriteOptions) -> _Prepared:
    """Read, hash, check, resize and encode one picture; what is wrong with it comes back as a value."""
    try:
        data = _read(record.image)
    except BadSample as error:
        return _Prepared(reason=error.reason, message=str(error), unread=True)
    digest = hashlib.sha256(data).hexdigest()
    if record.problem:
        return _Prepared(digest, reason=record.problem.partition(":")[0], message=record.problem, unread=True)
    try:
        size, mode = options.image_size or 0, options.resize_mode
        original = open_header(data, options.max_pixels).size
        resize = needs_resize(*original, size, mode, options.resize_only_if_bigger)
        image = open_checked(data, options.max_pixels, resized_size(*original, size, mode) if resize else None)
        kept = KEPT.get(image.format or "", "")
        # A turned picture is re-encoded upright: the fast decoders of the training path do not read EXIF.
        if kept and kept == (options.encode_format or kept) and not resize and not is_rotated(image):
            return _Prepared(digest, data, kept, original, original)
        turned = original[::-1] if swaps_sides(image) else original
        image = upright(image)
        if resize:
            image = resize_to(image, size, mode, options.resize_only_if_bigger, turned)
        target = options.encode_format or ("webp" if kept == "webp" else "jpg" if kept == "jpg" else "png")
        return _Prepared(digest, encode(image, target, options.encode_quality), target, original, image.size)
    except BadSample as error:
        return _Prepared(digest, reason=error.reason, message=str(error))


def _read(image: bytes | Path) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        if (size := image.stat().st_size) > MAX_FILE_BYTES:
            raise BadSample("file_too_big", f"{size} bytes, limit {MAX_FILE_BYTES}")
        return image.read_bytes()
    except OSError as error:
        raise BadSample("unreadable", error.strerror or str(error)) from error


class _Folder:
    """The shards of one split while they are written."""

    def __init__(self, out: Path, split: str, options: WriteOptions) -> None:
        if split and not split.replace("-", "_").isidentifier():
            raise ValueError(f"Record.split {split!r}: use letters, digits, - and _, because it becomes a folder name")
        self.path = out / split
        if next(self.path.glob("*.tar"), None) is not None:
            raise PipelineError(
                f"{self.path} already holds shards: choose another --out, or replace them with --overwrite"
            )
        self.temp = out / TEMP / (split or ".")  # also tells a later run which folders belong to this job
        self.temp.mkdir(exist_ok=True)
        self.options = options
        self.records = 0
        self.samples = 0
        self.failures: Counter[str] = Counter()
        self.first_failure = ""
        self._sources: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self._extras = Extras()
        self._shards: list[ShardInfo] = []
        self._shard: _Shard | None = None

    def add(self, record: Record, prepared: _Prepared) -> None:
        """Account for one record and write it, closing the shard when it is full."""
        if clash := RESERVED & set(record.extra):
            raise ValueError(f"Record.extra holds columns that the writer computes: {', '.join(sorted(clash))}")
        if self._shard is None:
            name = f"{len(self._shards):0{self.options.oom_shard_count}d}"
            self._shard = _Shard(name, self.temp / f"{name}.tar")
        position = len(self._shard.rows)
        digits = key_digits(self.options.samples_per_shard)
        self._shard.add(f"{self._shard.name}{position:0{digits}d}" if digits else self._shard.name, record, prepared)
        self._extras.see(record.extra)
        self._digest.update(f"{record.origin}\0{prepared.sha256 or ''}\n".encode("utf-8", "replace"))
        self.records += 1
        if prepared.reason:
            self.failures[prepared.reason] += 1
            self.first_failure = self.first_failure or f"{record.origin}: {prepared.message}"
        else:
            self.samples += 1
            self._sources[_clean(record.source)] += 1
        if position + 1 == self.options.samples_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.publish(self.path, self._extras))
            self._shard = None

    def finish(self, kind: str, licences: Mapping[str, str]) -> Manifest:
        """Publish the last shard, sizes.json and the manifest."""
        self._close_shard()
        write_json(self.path / "sizes.json", {shard.name: shard.samples for shard in self._shards})
        manifest = Manifest(
            kind=kind,
            source_digest=self._digest.hexdigest(),
            records=self.records,
            samples=self.samples,
            failures=dict(sorted(self.failures.items())),
            sources=dict(sorted(self._sources.items())),
            licences=dict(sorted(licences.items())),
            options=self.options.recorded(),
            shards=tuple(self._shards),
        )
        assert manifest.records == manifest.samples + sum(manifest.failures.values())
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
        return manifest

    def abandon(self) -> None:
        """Close and remove an unfinished shard's temp file."""
        if self._shard is not None:
            self._shard.stream.close()
            self._shard.temp.unlink(missing_ok=True)
            self._shard = None


class _Shard:
    """One open shard: the tar grows in a temp file, the rows wait for the parquet."""

    def __init__(self, name: str, temp: Path) -> None:
        self.name = name
        self.temp = temp
        self.stream = temp.open("wb")
        self.tar = TarWriter(self.stream)
        self.rows: list[dict[str, Any]] = []
        self._status: Counter[str] = Counter()
        self._start = time.time()

    def add(self, key: str, record: Record, prepared: _Prepared) -> None:
        """One row, and its tar members unless it failed."""
        status = "failed_to_download" if prepared.unread else "failed_to_resize" if prepared.reason else "success"
        row = _row(key, status, record, prepared)
        self.rows.append(row)
        self._status[prepared.reason or "success"] += 1
        if status == "success":
            member = {name: value for name, value in row.items() if name != "boxes" or value}
            text = json.dumps(member, indent=4, ensure_ascii=False).encode()
            caption = row["caption"].encode() if record.captions else None
            self.tar.add(key, prepared.extension, prepared.image, text, caption)

    def publish(self, folder: Path, extras: Extras) -> ShardInfo:
        """Give the shard's files their names; the statistics come last and mark it as done."""
        folder.mkdir(parents=True, exist_ok=True)
        digest = self.tar.close()
        self.stream.close()
        path = folder / f"{self.name}.tar"
        publish(self.temp, path)
        write_index(path, self.tar.index)
        write_parquet(path.with_suffix(".parquet"), self.rows, extras)
        end = time.time()
        statuses = Counter(row["status"] for row in self.rows)
        stats = {
            "count": len(self.rows),
            "successes": statuses["success"],
            "failed_to_download": statuses["failed_to_download"],
            "failed_to_resize": statuses["failed_to_resize"],
            "duration": end - self._start,
            "start_time": self._start,
            "end_time": end,
            "status_dict": dict(sorted(self._status.items())),
        }
        write_json(folder / f"{self.name}_stats.json", stats)
        return ShardInfo(name=path.name, samples=statuses["success"], bytes=self.tar.bytes, sha256=digest)


def _row(key: str, status: str, record: Record, prepared: _Prepared) -> dict[str, Any]:
    """A row of the parquet and of the json member."""
    width, height = prepared.size or (None, None)
    original_width, original_height = prepared.original or (None, None)
    captions = [_clean(caption) for caption in record.captions]
    return {
        "url": _clean(record.origin),
        "caption": captions[0] if captions else None,
        "captions": captions,
        "labels": [_clean(label) for label in record.labels],
        "source": _clean(record.source),
        "boxes": [dict(zip(("x0", "y0", "x1", "y1", "label"), box, strict=True)) for box in record.boxes],
        **{name: _clean(value) if isinstance(value, str) else value for name, value in record.extra.items()},
        "key": key,
        "status": status,
        "error_message": _clean(prepared.message) if prepared.message else None,
        "width": width,
        "height": height,
        "original_width": original_width,
        "original_height": original_height,
        "sha256": prepared.sha256,
    }


def _clean(text: str) -> str:
    """Text without lone surrogates (undecodable file names, broken JSON escapes), which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
