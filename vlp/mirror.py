"""A run folder on an object store (`--run-dir s3://...`): worked on here, sent there at every checkpoint.

A checkpoint is saved when it lies on the store: its files, then its list (`data_pipelines.mirror`). Metrics and the
like go before it. What is removed here is removed there after the newer one is whole; nothing that another machine
left is.
"""

import hashlib
import logging
from pathlib import Path

from data_pipelines.errors import PipelineError
from data_pipelines.files import cache_dir
from data_pipelines.mirror import LISTING, alone, fetch, pull, push, remove, send, tried
from data_pipelines.store import Store
from vlp.checkpoint import checkpoints

log = logging.getLogger(__name__)

CHECKPOINTS, BUNDLE, SUMMARY = "checkpoints", "bundle", "summary.json"


class Mirror:
    """One run at a URL, and its copy below the cache folder."""

    def __init__(self, url: str) -> None:
        """Raises PipelineError where no client is installed for the URL."""
        self.url, self.store = url, Store(url)
        digest = hashlib.sha256(url.encode()).hexdigest()[:16]
        self.folder = cache_dir() / "runs" / digest / url.rpartition("/")[2]
        self._seen: set[str] = set()

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """Whether a run lies there. Raises OSError."""
        return bool(self._names()) or tried(self.url, lambda: self.store.size("recipe.yaml")) is not None

    def _names(self, whole: bool = True) -> list[str]:
        """Checkpoints on the store, oldest first."""
        found = tried(self.url, lambda: self.store.names(CHECKPOINTS, "directory"))
        return [name for name in found if not whole or self._whole(name)]

    def _whole(self, name: str) -> bool:
        where = f"{CHECKPOINTS}/{name}/{LISTING}"
        return tried(self.url, lambda: self.store.size(where)) is not None

    def fetch(self) -> None:
        """Bring the newest whole checkpoint and the files beside it here, unless there is one as new.

        One that arrives damaged is named, and the one before is taken. Raises PipelineError if all are, OSError.
        """
        with alone(self.folder.parent):
            here, there = [path.name for path in checkpoints(self.folder / CHECKPOINTS)], self._names()
            if not there or (here and here[-1] >= there[-1]):
                return
            for name in tried(self.url, self.store.names):
                fetch(self.store, name, self.folder / name)
            for name in reversed(there):
                if name in here:
                    return
                try:
                    pull(self.store, f"{CHECKPOINTS}/{name}", self.folder / CHECKPOINTS / name)
                    return
                except OSError as error:
                    log.warning("%s; trying the one before", error)
            raise PipelineError(f"{self.url}: none of {len(there)} checkpoints arrives whole (see above)")

    def push(self) -> None:
        """Send what is new here, the checkpoints last. Raises OSError; then the newest one there counts as before."""
        self._send_files()
        for path in checkpoints(self.folder / CHECKPOINTS):
            push(path, self.store, f"{CHECKPOINTS}/{path.name}")
        here = {path.name for path in checkpoints(self.folder / CHECKPOINTS)}
        self._seen |= here
        for name in self._names(whole=False):
            if name not in here and (name in self._seen or not self._whole(name)):
                remove(self.store, f"{CHECKPOINTS}/{name}")

    def finish(self) -> None:
        """Send bundle and report as well, the summary last. Raises OSError."""
        if (self.folder / BUNDLE).is_dir():
            push(self.folder / BUNDLE, self.store, BUNDLE)
        self._send_files()
        if (self.folder / SUMMARY).is_file():
            send(self.folder / SUMMARY, self.store, SUMMARY)

    def end(self, finished: bool) -> None:
        """Send what is left; bundle, report and summary where the run is finished. Raises PipelineError."""
        try:
            self.finish() if finished else self.push()
        except OSError as error:
            raise PipelineError(
                f"{self.url}: not all of the run was sent ({error}); it lies whole in {self.folder}, and "
                "--resume on this machine sends it"
            ) from error

    def _send_files(self) -> None:
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.name != SUMMARY and not path.name.startswith("."):
                send_growing(path, self.store)


def send_growing(path: Path, store: Store) -> None:
    """Send a small file as it is at this moment; the run may be writing to it. Raises OSError."""
    content = path.read_bytes()
    tried(f"{store}/{path.name}", lambda: store.write(path.name, content))
