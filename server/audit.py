"""The audit log: one JSON line per request that changes something, each with the hash of the line before.

A line that is changed, dropped or inserted breaks the chain from there on; cutting lines off the end does not, so keep
the last hash elsewhere now and then. Lines hold who, what and when, never content.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from data_pipelines.errors import PipelineError

START = "0" * 64
TAIL = 65_536
"""Bytes read from the end to find the last line; lines are far shorter."""


class AuditLog:
    """Appends to one file, which several processes may share."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, entry: dict[str, Any]) -> str:
        """Write a line and wait until it is on disk; returns its hash. Blocks."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # ends with the handle, and with the process
            size = os.fstat(handle).st_size
            tail = os.pread(handle, TAIL, max(0, size - TAIL))
            line = _line(entry, _last_hash(tail))
            torn = b"\n" if tail and not tail.endswith(b"\n") else b""
            os.pwrite(handle, torn + line, size)
            os.fsync(handle)
        finally:
            os.close(handle)
        return str(json.loads(line)["hash"])


def _line(entry: dict[str, Any], previous: str) -> bytes:
    content = {**entry, "previous": previous}
    return (_canonical({**content, "hash": _digest(content)}) + "\n").encode()


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _last_hash(tail: bytes) -> str:
    """Of the last whole line; one that a crash cut short is skipped, and `verify` will name it."""
    for line in reversed(tail.splitlines()):
        try:
            return str(json.loads(line)["hash"])
        except (ValueError, KeyError, TypeError):
            continue
    return START


def verify(path: Path) -> int:
    """Number of lines. Raises PipelineError naming the first line that does not follow from the one before."""
    previous = START
    count = 0
    with path.open("rb") as stream:
        for count, line in enumerate(stream, 1):
            try:
                content = json.loads(line)
                given = content.pop("hash")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PipelineError(f"{path}: line {count} is no line of an audit log") from error
            if content.get("previous") != previous or _digest(content) != given:
                raise PipelineError(f"{path}: line {count} was changed, or lines before it are missing")
            previous = given
    return count
