"""Named lists of labels with their templates. In a folder they outlive the process, and all workers see the same ones;
without one they live in memory.
"""

import logging
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from data_pipelines.config import StrictModel
from data_pipelines.files import write_atomic
from server.errors import ApiError

log = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Small letters, because some file systems know no others apart."""
SUFFIX = ".json"


class LabelSet(StrictModel):
    """One list."""

    name: str
    labels: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)
    created: int
    """Seconds since the epoch."""


@dataclass(slots=True)
class LabelSets:
    """All of them. Methods block (they may read a file), and may be called from several threads."""

    folder: Path | None
    most: int
    """Sets that can be kept."""
    _known: dict[str, tuple[int, LabelSet]] = field(default_factory=dict)
    """Name -> (time of its file, its content)."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self) -> list[LabelSet]:
        """Every set by name; damaged files are left out and logged."""
        found: list[LabelSet] = []
        for name in self._names():
            try:
                found.append(self.get(name))
            except ApiError as error:  # removed in between, or damaged
                log.warning("label set %s: %s", name, error.message)
        return found

    def get(self, name: str) -> LabelSet:
        """The set of that name. Raises ApiError 404, 409 when its file is damaged."""
        if self.folder is None or NAME.fullmatch(name) is None:
            with self._lock:
                if name not in self._known:
                    raise _missing(name)
                return self._known[name][1]
        path = self.folder / (name + SUFFIX)
        try:
            changed = path.stat().st_mtime_ns
            known = self._known.get(name)
            if known is not None and known[0] == changed:
                return known[1]
            found = LabelSet.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise _missing(name) from error
        except (OSError, ValidationError, ValueError) as error:
            log.error("label set %s is damaged: %s", name, error)
            raise ApiError(
                409, f"label set {name!r} is damaged: delete it or make it again", "label_set_damaged"
            ) from error
        with self._lock:
            self._known[name] = (changed, found)
        return found

    def put(self, given: LabelSet, replace: bool) -> bool:
        """Keep a set; whether it is a new one. Durable when it returns. Raises ApiError 409."""
        with self._lock:
            names = self._names()
            new = given.name not in names
            if not new and not replace:
                message = f'label set {given.name!r} exists: "replace": true puts this one in its place'
                raise ApiError(409, message, "label_set_exists", "name")
            if new and len(names) >= self.most:
                raise ApiError(
                    409, f"{self.most} label sets are kept already: delete one", "too_many_label_sets", "name"
                )
            if self.folder is None:
                self._known[given.name] = (0, given)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                content = given.model_dump_json(indent=1).encode()
                write_atomic(self.folder / (given.name + SUFFIX), lambda stream: stream.write(content))
                self._known.pop(given.name, None)
            return new

    def delete(self, name: str) -> None:
        """Forget a set. Raises ApiError 404."""
        with self._lock:
            if name not in self._names():
                raise _missing(name)
            self._known.pop(name, None)
            if self.folder is not None:
                (self.folder / (name + SUFFIX)).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        if self.folder is None:
            return sorted(self._known)
        if not self.folder.is_dir():
            return []
        stems = (path.name.removesuffix(SUFFIX) for path in self.folder.iterdir() if path.name.endswith(SUFFIX))
        return sorted(stem for stem in stems if NAME.fullmatch(stem))


def _missing(name: str) -> ApiError:
    return ApiError(404, f"there is no label set {name[:64]!r}; GET /v1/label-sets lists them", "label_set_not_found")
