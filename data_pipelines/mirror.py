"""Whole folders on an object store: the files first, the list of them last, so that half a folder never counts.

The list, `complete.json`, has the sha256 of every file. Who replaces a folder removes the list first; who reads one
without a list is told so, and every byte that arrives is checked.
"""

import fcntl
import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

from data_pipelines.errors import PipelineError
from data_pipelines.files import cache_dir, fsync_dir, publish, sha256_file
from data_pipelines.store import Store, join

log = logging.getLogger(__name__)

LISTING = "complete.json"
TRIES = 4
PAUSE = 0.25
"""Seconds before the second try; four times as long before each further one."""

T = TypeVar("T")


class StoreError(PipelineError, OSError):
    """A store did not do what it was asked, several times; a save that ends with it has failed as on a full disk."""


def as_url(where: Path | str) -> str | None:
    """The URL that a path was before its two slashes became one; None for a place on this machine."""
    found = re.fullmatch(r"([a-z][a-z0-9+.-]+):/{1,2}([^/].*)", str(where))
    return f"{found[1]}://{found[2]}".rstrip("/") if found and found[1] != "file" and not Path(where).exists() else None


def tried(what: str, call: Callable[[], T]) -> T:
    """Call a store, and again after an error of the network. Raises FileNotFoundError at once, else StoreError."""
    for attempt in range(TRIES):
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:  # every store's client has errors of its own
            if attempt == TRIES - 1:
                raise StoreError(f"{what}: {error}") from error
            log.warning("%s: %s; trying again", what, error)
            time.sleep(PAUSE * 4**attempt)
    raise AssertionError("the last attempt returns or raises")


def listing(store: Store, name: str) -> dict[str, str] | None:
    """File -> sha256 of a folder that is whole; None for any other. Raises PipelineError for a bad list."""
    try:
        content = tried(f"{store}/{join(name, LISTING)}", lambda: store.read(join(name, LISTING)))
    except FileNotFoundError:
        return None
    try:
        files = {str(inner): str(digest) for inner, digest in json.loads(content)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{store}/{join(name, LISTING)}: not a list of files ({error})") from error
    for inner in files:
        if PurePosixPath(inner).is_absolute() or ".." in PurePosixPath(inner).parts:
            raise PipelineError(f"{store}/{join(name, LISTING)}: {inner!r} would lie outside the folder")
    return files


def push(folder: Path, store: Store, name: str) -> None:
    """Make `name` on the store equal to a folder of this machine. Raises StoreError; then `name` does not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LISTING)
    wanted = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    try:
        known = listing(store, name)
    except StoreError:
        raise
    except PipelineError:  # a list that broke off, on a store that shows half files
        known = {}
    if known == wanted:
        return
    if known is not None:
        tried(f"{store}/{name}", lambda: store.remove(join(name, LISTING)))
    for inner in wanted:
        send(folder / inner, store, join(name, inner))
    for inner in sorted((known or {}).keys() - wanted.keys()):
        tried(f"{store}/{name}", lambda inner=inner: store.remove(join(name, inner)))  # type: ignore[misc]
    text = json.dumps({"files": wanted}, indent=2).encode()
    tried(f"{store}/{name}", lambda: store.write(join(name, LISTING), text))


def send(path: Path, store: Store, name: str) -> None:
    """Copy one file to the store. Raises StoreError."""

    def copy() -> None:
        store.send(path, name)
        if store.size(name) != path.stat().st_size:
            raise OSError(f"{store.size(name)} bytes arrived of {path.stat().st_size}")

    tried(f"{store}/{name}", copy)


def fetch(store: Store, name: str, path: Path, sha256: str = "") -> None:
    """Copy one file from the store, whole or not at all. Raises FileNotFoundError, StoreError."""

    def copy() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.part")
        store.fetch(name, temp)
        if sha256 and (found := sha256_file(temp)) != sha256:
            raise OSError(f"sha256 {found}, the list says {sha256}")
        publish(temp, path)

    tried(f"{store}/{name}", copy)


def pull(store: Store, name: str, folder: Path) -> None:
    """Copy a whole folder from the store to `folder`, which must not exist. Raises PipelineError."""
    wanted = listing(store, name)
    if wanted is None:
        raise PipelineError(f"{store}/{name}: no {LISTING} there, so it is no folder that was sent whole")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as scratch:
        temp = Path(scratch) / "folder"
        temp.mkdir()
        for inner, digest in wanted.items():
            fetch(store, join(name, inner), temp / inner, digest)
        temp.rename(folder)
    fsync_dir(folder.parent)


def remove(store: Store, name: str) -> None:
    """Remove a folder, its list first. Raises StoreError."""
    tried(f"{store}/{name}", lambda: store.remove(join(name, LISTING)))
    tried(f"{store}/{name}", lambda: store.remove_folder(name))


def local_copy(url: str) -> Path | None:
    """A whole folder at a URL, copied below the cache folder unless it is there already; None if it is not whole."""
    store = Store(url)
    found = listing(store, "")
    if found is None:
        return None
    return _kept(url, sorted(found.items()), lambda folder: pull(store, "", folder))


def local_file(url: str) -> Path:
    """One file at a URL, copied below the cache folder unless it is there already. Raises PipelineError."""
    where, _, name = url.rpartition("/")
    store = Store(where)
    try:
        return _kept(url, tried(url, lambda: store.version(name)), lambda path: fetch(store, name, path))
    except FileNotFoundError as error:
        raise PipelineError(f"{url}: no such file") from error


def _kept(url: str, version: object, bring: Callable[[Path], None]) -> Path:
    """The copy below the cache folder of what a URL has in this version; brought here if it is not there."""
    digest = hashlib.sha256(json.dumps([url, version]).encode()).hexdigest()
    path = cache_dir() / "folders" / digest[:16] / url.rpartition("/")[2]
    with alone(path.parent):
        if not path.exists():
            bring(path)
    return path


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
