"""What a run leaves behind: env.json, metrics.jsonl, evals.jsonl, and the progress bar while it lasts."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
    """Git revision of the source tree the package runs from; empty for an installed wheel."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
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
    """Appends JSON lines to a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace `name` by one JSON object."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(
            json.dumps(content, indent=2, ensure_ascii=False, default=str), encoding="utf-8"
        )

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one line to a JSON-lines file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All lines of a JSON-lines file; empty where there is none."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def truncate(self, name: str, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        rows = [row for row in self.rows(name) if row["step"] <= step]
        if (self.folder / name).is_file():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (self.folder / name).write_text(text, encoding="utf-8")


def training_bar(enabled: bool) -> Progress:
    """Progress on stderr with loss and speed; tasks carry the field `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )
