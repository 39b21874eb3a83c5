"""Steps that name what they read and wrote by sha256 and follow each other by hash: any changed byte shows.

A record's digest covers the one before it, a report's covers all of them and its page. This finds damage and mistakes;
who can write the report can also make a new one that fits, so its digest has to be kept where they cannot write.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.errors import ConfigError, ShardError
from data_pipelines.files import sha256_file, write_atomic
from data_pipelines.records import MANIFEST, load_manifest

FORMAT = 1
REPORT = "backdoor.json"
CLEANED = "clean.json"
"""What `vlp clean` tells of itself, in the folder of its run."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One step before it is chained. `missing`: why it was not run; empty if it was."""

    name: str
    missing: str = ""
    inputs: tuple[tuple[str, Path], ...] = ()
    """(what it is, file); the manifest of a folder of shards stands for its tars."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """What it is -> sha256, of inputs that are not at hand."""
    version: str = ""
    """Of vlp; empty where it is not known."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as the report says."""

    step: str
    """Empty for the report itself."""
    what: str
    """A file, or a part of the report."""
    why: str


def digest_of(content: Mapping[str, Any]) -> str:
    """Hex sha256 of plain data but for its own `digest`, in one spelling."""
    plain = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(
        json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def chained(steps: Iterable[Step], start: str, folder: Path) -> list[Record]:
    """Records of steps, each with the digest of the one before it; `start`: what the first one follows.

    Paths are written as seen from `folder`, so that both can move together.
    """
    records: list[Record] = []
    for step in steps:
        record = {
            "name": step.name, "ran": not step.missing, "missing": step.missing, "version": step.version,
            "inputs": [named(what, path, folder) for what, path in step.inputs], "digests": dict(step.digests),
            "settings": dict(step.settings), "results": dict(step.results), "previous": start,
        }  # fmt: skip
        # as it will be read again: tuples are lists then
        record = json.loads(json.dumps(record, default=str))
        start = record["digest"] = digest_of(record)
        records.append(record)
    return records


def named(what: str, path: Path, folder: Path) -> dict[str, str]:
    """A file as records name it."""
    return {"what": what, "path": os.path.relpath(path.resolve(), folder.resolve()), "sha256": sha256_file(path)}


def text_of(content: Mapping[str, Any]) -> str:
    """JSON as reports are written; a check takes no other spelling."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data whole or not at all."""
    write_atomic(path, lambda stream: stream.write(text_of(content).encode()))


def read_json(path: Path, option: str, keys: Sequence[str] = ()) -> Record:
    """What a command wrote. Raises ConfigError that names `option` for a file that cannot be read or lacks a key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not found.keys() >= set(keys):
            raise ValueError(f"not an object with the keys {', '.join(keys)}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error})") from error
    return found


def check(path: Path, expected: str | None = None) -> tuple[list[Difference], int]:
    """(all that differs from what the report in a file says, number of files that were compared).

    `expected`: the digest that it had when it was written. Raises ConfigError for a file that is no report.
    """
    report = read_json(path, "REPORT")
    try:
        if report["format"] > FORMAT:
            raise ConfigError(f"{path}: written by a newer version: install a newer vlp")
        steps: Sequence[Record] = report["steps"]
        found = [*_own(path, report, expected), *_links(report["start"], steps)]
        files: dict[tuple[str, str], str] = {(report["page"]["path"], report["page"]["sha256"]): ""}
        for step in steps:
            for item in step["inputs"]:
                files.setdefault((item["path"], item["sha256"]), step["name"])
        for (file, sha256), name in files.items():
            found += [Difference(name, *change) for change in _changes(path.resolve().parent / file, sha256)]
    except (KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ConfigError(f"REPORT {path}: not a report of `vlp backdoor report` ({error!r})") from error
    return found, len(files)


def _own(path: Path, report: Record, expected: str | None) -> Iterator[Difference]:
    """The report by itself."""
    digest = digest_of(report)
    if report["digest"] != digest:
        yield Difference("", path.name, "its content does not have the digest that it states")
    elif path.read_bytes() != text_of(report).encode():
        yield Difference("", path.name, "is not spelled as it was written")
    if expected is not None and expected != digest:
        yield Difference("", path.name, f"has the digest {digest}, not the one expected")


def _links(start: str, steps: Sequence[Record]) -> Iterator[Difference]:
    for step in steps:
        if step["previous"] != start:
            yield Difference(step["name"], "record", "does not follow the record before it")
        if step["digest"] != digest_of(step):
            yield Difference(step["name"], "record", "was changed")
        start = step["digest"]


def _changes(path: Path, sha256: str) -> Iterator[tuple[str, str]]:
    """(file, what happened to it); of a manifest that is as it was, the tars as well."""
    if not path.is_file():
        yield os.path.normpath(path), "is missing"
    elif sha256_file(path) != sha256:
        yield os.path.normpath(path), "was changed"
    elif path.name == MANIFEST:
        yield from _tars(path)


def _tars(path: Path) -> Iterator[tuple[str, str]]:
    try:
        shards = load_manifest(path.parent).shards
    except ShardError as error:
        yield os.path.normpath(path), str(error)
        return
    for shard in shards:
        yield from _changes(path.parent / shard.name, shard.sha256)
