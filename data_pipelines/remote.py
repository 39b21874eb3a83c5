"""Shards that lie elsewhere: fetched whole into a disk cache that all processes of the machine share.

The cache has a size limit; what was used longest ago goes first. An entry is published by a rename, so it is whole or
absent. Removing one that another process has mapped does no harm: its pages live until they are unmapped.
"""

import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

import fsspec

from data_pipelines.errors import BadSample, ConfigError, PipelineError, ShardError
from data_pipelines.fetch import FetchOptions, fetch_into
from data_pipelines.files import cache_dir, publish, sha256_file
from data_pipelines.urls import WEB

log = logging.getLogger(__name__)

CHUNK = 1 << 20
TRIES = 3
STRIPES = 64
"""Lock files of a cache; two URLs that share one wait for each other, which is all that happens."""
PIPE = "pipe:"
SHARD_FETCH = FetchOptions(
    timeout=30, total_timeout=3600, max_bytes=1 << 40, retries=0, disallowed_header_directives=()
)  # fmt: skip
"""A shard is large, its address is the user's own choice, and the cache tries again by itself."""


class Absent(PipelineError):
    """There is nothing at a location, or no client that could look."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL or a command, not a local path."""
    return location.startswith(PIPE) or "://" in location


def allow(location: str, programs: tuple[str, ...]) -> None:
    """Raise ConfigError for a `pipe:` whose program the recipe does not name."""
    if location.startswith(PIPE) and shlex.split(location[len(PIPE) :])[:1] not in [[name] for name in programs]:
        raise ConfigError(
            f"data.train: {location!r} runs a program; name it in data.pipe to allow that (now: {list(programs)})"
        )


def download(location: str, sink: BinaryIO, options: FetchOptions) -> None:
    """Copy what is behind a web address, an fsspec URL or an allowed `pipe:` command into a file or buffer.

    Raises Absent, OSError, ShardError, and ConfigError for a web address that the options do not admit.
    """
    if location.partition("://")[0].lower() not in WEB:
        with _opened(location) as source:
            shutil.copyfileobj(source, sink, CHUNK)
        return
    try:
        fetch_into(sink, location, options)
    except BadSample as error:
        if error.reason in ("http_404", "http_410"):
            raise Absent(f"{location}: is not there") from error
        if error.reason in ("private_address", "bad_port"):
            raise ConfigError(f"{location}: {error}; in a recipe, data.fetch.allow_private=true does") from error
        raise ShardError(f"{location}: {error.reason}: {error}") from error


@contextmanager
def _opened(location: str) -> Iterator[IO[bytes]]:
    """Stream of a URL, or of the output of a `pipe:` command, which no shell interprets."""
    if not location.startswith(PIPE):
        try:
            stream = fsspec.open(location, "rb").open()
        except FileNotFoundError as error:
            raise Absent(f"{location}: is not there") from error
        except (ImportError, ValueError) as error:  # no client for s3, or no such protocol
            raise Absent(f"{location}: {error}") from error
        with stream:
            yield stream
        return
    with subprocess.Popen(shlex.split(location[len(PIPE) :]), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout
    if process.returncode:
        raise OSError(f"{location!r} ended with {process.returncode}")


class DiskCache:
    """Whole files by URL, under a folder with a size limit. Holds nothing but the settings."""

    def __init__(self, root: Path | None = None, limit: int = 100 << 30, options: FetchOptions = SHARD_FETCH) -> None:
        """`limit`: bytes; default folder: `remote` in the cache of vlp. `options`: for web addresses."""
        self.root, self.limit, self.options = root or cache_dir() / "remote", limit, options

    def path(self, location: str, sha256: str = "") -> Path:
        """Where a file lies once it was fetched; another expected content is another entry."""
        digest = hashlib.sha256(f"{location} {sha256}".encode()).hexdigest()
        return self.root / digest[:16] / location.rpartition("/")[2].rpartition(" ")[2]

    def get(self, location: str, path: Path, sha256: str = "", optional: bool = False) -> None:
        """Make `path` (see `path`, or a file beside that) a local copy. Raises ShardError.

        An `optional` file may be absent at the source.
        """
        if not path.is_file():
            with self._lock(path):
                if not path.is_file():
                    self._fetch(location, path, sha256, optional)
        if path.is_file():
            os.utime(path.parent)

    def _fetch(self, location: str, path: Path, sha256: str, optional: bool) -> None:
        for dead in path.parent.glob(f".{path.name}.*"):  # of a process that was killed: the lock is ours
            dead.unlink(missing_ok=True)
        for attempt in range(TRIES):
            try:
                self._download(location, path, sha256)
                break
            except Absent as error:
                if optional:
                    return
                raise ShardError(str(error)) from error
            except (OSError, ShardError) as error:
                if attempt == TRIES - 1:
                    raise ShardError(f"{location}: cannot be fetched ({error})") from error
                log.warning("%s: %s; trying again", location, error)
                time.sleep(0.2 * 4**attempt)
        self._evict(keep=path.parent)

    def _download(self, location: str, path: Path, sha256: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as target:
                download(location, target, self.options)
            if sha256 and (found := sha256_file(Path(name))) != sha256:
                raise ShardError(f"{location}: sha256 {found}, the manifest says {sha256}")
            publish(Path(name), path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _evict(self, keep: Path) -> None:
        """Remove the entries used longest ago until the rest fits the limit."""
        with self._lock(None):
            found = []
            for folder in (path for path in self.root.iterdir() if path.is_dir()):
                with suppress(FileNotFoundError):
                    size = sum(path.stat().st_size for path in folder.iterdir())
                    found.append((folder.stat().st_mtime, folder, size))
            total = sum(size for *_, size in found)
            for _, folder, size in sorted(found):
                if total > self.limit and folder != keep:
                    shutil.rmtree(folder, ignore_errors=True)
                    total -= size

    @contextmanager
    def _lock(self, path: Path | None) -> Iterator[None]:
        """One process at a time for a file, or for the eviction (None)."""
        stripe = "evict" if path is None else str(int(path.parent.name, 16) % STRIPES)
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".lock-{stripe}").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
