"""Existing WebDataset tars, to be sharded anew, merged, selected from, or re-encoded.

A tar, a folder of them (sub-folders with tars are splits), a pattern such as `data/0000*.tar` or
`data/{00000..00012}.tar`, or several of these joined by `::`; also in object stores. Captions, labels, source, boxes
and all other columns of the json members come along; a `cls` member becomes a column, members of other kinds are left
out. A sample without a usable picture, or whose text cannot be read, is a counted failure. A damaged tar stops the job,
because nobody can tell how much of it is lost; with `damaged: count` it becomes one failure.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand

from data_pipelines import rows
from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, PipelineError, ShardError
from data_pipelines.keep import load_keys
from data_pipelines.places import Place, place
from data_pipelines.reader import Sample, Shard
from data_pipelines.records import Record


class Config(StrictModel):
    """Which tars, and what to take from them."""

    path: Path | str
    keys: Path | None = None
    """Keep-list: text with a key per line, or parquet with a column `key`; a key found nowhere is a failure."""
    caption_col: tuple[str, ...] = ()
    """Columns of the json members that hold captions. Empty: `captions`, else the txt member."""
    label_col: tuple[str, ...] = ()
    """Empty: `labels`, else `label`."""
    box_col: str | None = None
    """None: boxes."""
    columns: tuple[str, ...] | None = None
    """Columns to pass through; None = all others."""
    template: rows.Template | None = None
    """Caption of a sample that has a label only."""
    split_by: str | None = None
    """Column that names the split of a sample. None: the sub-folder of its tar."""
    damaged: Literal["stop", "count"] = "stop"


@dataclass(frozen=True, slots=True)
class _Tar:
    """One tar of the input."""

    place: Place
    source: str
    split: str = ""

    @property
    def name(self) -> str:
        return f"{self.split}/{self.place.name}" if self.split else self.place.name


def iter_records(config: Config) -> Iterator[Record]:
    """One record per sample, tars in name order."""
    keys = load_keys(config.keys) if config.keys else None
    met: set[str] = set()
    for tar in _tars(config):
        try:
            for key, record in _read(tar, config, keys):
                met.add(key)
                yield record
        except ShardError as error:
            if config.damaged == "stop":
                raise ShardError(f"{error}; leave it out, or count it as one failure with --damaged count") from error
            yield _failed(tar, tar.name, f"damaged_shard: {error}")
    for key in sorted((keys or frozenset()) - met):
        yield Record(b"", (), "tars", key, problem=f"missing_key: {key} of {config.keys} is in none of the tars")


def _read(tar: _Tar, config: Config, keys: frozenset[str] | None) -> Iterator[tuple[str, Record]]:
    """The samples of one tar with their keys."""
    reading = _reading(config)
    with _local(tar.place) as path:
        shard = Shard(path)
        for number in range(len(shard)):
            try:
                sample = shard.read(number)
            except BadSample as error:
                if keys is None:  # its key is not known; with a keep-list it turns up as missing
                    yield "", _failed(tar, f"{tar.name}#{number}", str(error))
                continue
            if keys is None or sample.key in keys:
                yield sample.key, _record(sample, tar, reading)


def _reading(config: Config) -> rows.Reading:
    boxes = config.box_col or "boxes"
    return rows.Reading(
        captions=config.caption_col or ("captions",),
        labels=config.label_col or ("labels",),
        boxes=boxes,
        used=frozenset((*config.caption_col, *config.label_col, "label", boxes)),
        passed=config.columns,
        template=config.template,
        split=config.split_by,
        must_have_text=bool(config.caption_col or config.label_col),
    )


def _record(sample: Sample, tar: _Tar, reading: rows.Reading) -> Record:
    number = {} if sample.cls is None else {"cls": sample.cls}  # a member of its own becomes a column
    row = {
        **number,
        **sample.columns,
        "captions": list(sample.captions),
        "labels": list(sample.labels) or sample.columns.get("label"),
    }
    url = sample.columns.get("url")
    origin = url if isinstance(url, str) and url else f"{tar.name}#{sample.key}"
    return rows.record(row, reading, sample.image, origin, tar.source, tar.split)


def _failed(tar: _Tar, origin: str, problem: str) -> Record:
    return Record(b"", (), tar.source, origin, split=tar.split, problem=problem)


@contextmanager
def _local(tar: Place) -> Iterator[Path]:
    """The tar as a local file; a remote one is copied, whole, for as long as it is read."""
    if tar.local:
        yield Path(tar.path)
        return
    with tempfile.TemporaryDirectory(prefix="vlp-tar-") as folder:
        path = Path(folder) / tar.name
        try:
            tar.fs.get_file(tar.path, str(path))
        except OSError as error:
            raise ShardError(f"{tar}: cannot be fetched ({error})") from error
        yield path


def count(config: Config) -> int | None:
    """Number of records by the sizes.json beside the tars; None where one is not in it, or with a keep-list."""
    folders: dict[str, dict[str, int]] = {}
    total = 0
    for tar in _tars(config):
        folder = tar.place.parent
        if folder.path not in folders:
            folders[folder.path] = _sizes(folder)
        size = folders[folder.path].get(tar.place.name)
        if size is None or config.keys:
            return None
        total += size
    return total


def _sizes(folder: Place) -> dict[str, int]:
    """Samples of the tars in a folder; empty where nobody has written them down."""
    try:
        with Place(folder.fs, f"{folder.path}/sizes.json", folder.local).open() as stream:
            found = json.load(stream)
    except (PipelineError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fingerprint(config: Config) -> str:
    """Changes when a tar is added, removed or written, and when the keep-list changes."""
    lines = [f"{tar.name}\0{tar.place.state()}\n" for tar in _tars(config)]
    lines += sorted(load_keys(config.keys)) if config.keys else ()
    return hashlib.sha256("".join(lines).encode("utf-8", "replace")).hexdigest()


def _tars(config: Config) -> list[_Tar]:
    parts = (name for part in str(config.path).split("::") for name in braceexpand(part, escape=False))
    return [tar for part in parts for tar in _expand(place(part))]


def _expand(where: Place) -> list[_Tar]:
    found: list[_Tar] = []
    if where.is_dir():
        children = where.children()
        found = [_Tar(tar, where.name) for tar in children if tar.name.endswith(".tar")] or [
            _Tar(tar, where.name, split.name)
            for split in children
            if split.is_dir()
            for tar in split.children()
            if tar.name.endswith(".tar")
        ]
    elif where.exists():
        found = [_Tar(where, where.parent.name)]
    elif "*" in where.name:
        tars = (Place(where.fs, path, where.local) for path in sorted(where.fs.glob(where.path)))
        found = [_Tar(tar, tar.parent.name) for tar in tars]
    if not found:
        raise PipelineError(f"{where}: no .tar there; give a tar, a folder of tars, or a pattern such as 'dir/0*.tar'")
    return found
