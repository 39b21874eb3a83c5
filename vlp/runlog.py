"""What a run leaves behind: env.json, metrics.jsonl, evals.jsonl, and the progress bar while it lasts."""

import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipelines.files import write_atomic
from vlp import distributed
from vlp.loggers import TENSORBOARD, Loggers

log = logging.getLogger(__name__)

STATUS = "status.json"
RunState = Literal["finished", "interrupted", "failed"]
"""How a run can end by itself; one that was killed leaves `running` behind."""
PACKAGES = (
    "torch",
    "open_clip_torch",
    "timm",
    "transformers",
    "tokenizers",
    "webdataset",
    "pillow",
    "simplejpeg",
    "numpy",
)


def now() -> str:
    """UTC time, ISO 8601, whole seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def revision() -> str:
    """Git revision of the source tree the package runs from, VLP_REVISION in an image; else empty."""
    if built := os.environ.get("VLP_REVISION"):
        return built
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment(device: torch.device, data: Mapping[str, str]) -> dict[str, Any]:
    """What a figure of this run depends on."""
    from vlp import __version__

    return {
        "time": now(),
        "vlp": __version__,
        "revision": revision(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "data": dict(data),
    }


class RunLog:
    """Appends JSON lines to a run folder and passes them on to the dashboards; rank 0 alone appends."""

    def __init__(self, folder: Path, loggers: Sequence[str] = (TENSORBOARD,)) -> None:
        """`loggers`: names of vlp.loggers.BACKENDS; nothing is opened before the first row. Raises ConfigError."""
        self._loggers = Loggers(folder, loggers)
        self._running = False
        self.folder = folder
        self.failed = 0
        """Writes that failed."""

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace `name` by one JSON object."""
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
        write_atomic(self.folder / name, lambda file: file.write(text.encode()))

    @contextmanager
    def tolerant(self, name: str) -> Iterator[None]:
        """A full disk is named and counted, but does not end a run: only checkpoints that cannot be saved do."""
        try:
            yield
        except OSError as error:
            self.failed += 1
            log.error("%s not written (%s); the run goes on", self.folder / name, error)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one line, with its `step`, to a JSON-lines file."""
        path = self.folder / name
        with self.tolerant(name):
            if not self._running:
                self.write(STATUS, {"state": "running", "pid": os.getpid(), "host": platform.node(), "since": now()})
                self._running = True
            size = path.stat().st_size if path.is_file() else 0
            try:
                with path.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            except OSError:
                os.truncate(path, size)  # half a line would spoil the next one
                raise
        self._loggers.write(name, row)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All lines of a JSON-lines file; empty where there is none. A last line that a kill cut off is left out."""
        path = self.folder / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise
        return found

    def truncate(self, name: str, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        rows = self.rows(name)
        if rows:
            self._loggers.seen(name, rows[-1]["step"])
        kept = [row for row in rows if row["step"] <= step]
        if (self.folder / name).is_file():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            write_atomic(self.folder / name, lambda file: file.write(text.encode()))

    def close(self, state: RunState, note: str = "") -> None:
        """Note how the run ended and close the dashboards; does nothing on ranks above 0."""
        if distributed.env_rank() > 0:
            return
        self._loggers.close(state)
        self._running = False
        with self.tolerant(STATUS):
            self.write(STATUS, {"state": state, "time": now(), "note": note})


def training_bar(enabled: bool) -> Progress:
    """Progress on stderr with the time left; tasks carry the field `note`, made by `bar_note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )


def bar_note(loss: float, samples_per_second: float, data_wait: float, utilisation: float | None = None) -> str:
    """`loss 1.234  456 samples/s  data 3 %  MFU 41.0 %`; `data_wait` and `utilisation` are shares 0..1."""
    speed = f"{samples_per_second:,.0f}" if samples_per_second >= 10 else f"{samples_per_second:.1f}"
    share = "" if utilisation is None else f"  MFU {100 * utilisation:.1f} %"
    return f"loss {loss:.3f}  {speed} samples/s  data {100 * data_wait:.0f} %{share}"
