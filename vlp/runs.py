"""Run folders side by side: what each one is, and where two of them differ."""

import base64
import html
import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.errors import ConfigError
from vlp.curves import compare_curves, is_share, natural
from vlp.loggers import flat
from vlp.report import STYLE
from vlp.runlog import STATUS, RunLog

RECIPE = "recipe.yaml"
MAIN = ("image_to_text/R@1", "text_to_image/R@1", "/top1")
"""Endings of the metrics that stand for a run."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One line of `vlp runs ls`."""

    name: str
    recipe: str
    """Name within the folder's name, else the recipe's description."""
    state: str
    """running, finished, interrupted, failed; killed: it said no goodbye; unknown: written by an older vlp."""
    steps: int
    total: int | None
    loss: float | None
    """The last one logged."""
    metrics: dict[str, float]
    """The last evaluation of each name."""
    seconds: float
    """Of training."""

    @property
    def main(self) -> dict[str, float]:
        """The metrics that stand for the run."""
        return {name: self.metrics[name] for name in sorted(self.metrics, key=natural) if name.endswith(MAIN)}


def list_runs(folder: Path) -> list[RunInfo]:
    """The runs in a folder, by name; a folder is one if it holds a recipe.yaml. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; runs are kept in runs/ unless --run-dir says otherwise")
    return [describe(path.parent) for path in sorted(folder.glob(f"*/{RECIPE}"))]


def describe(folder: Path) -> RunInfo:
    """What one run folder says of itself. Raises ConfigError for a folder that is no run."""
    recipe = read_recipe(folder)
    runlog = RunLog(folder, ())
    metrics, evals = runlog.rows("metrics.jsonl"), runlog.rows("evals.jsonl")
    summary = _read(folder / "summary.json")
    last = metrics[-1] if metrics else {}
    stamped = re.fullmatch(r"\d{8}-\d{6}-(.+)", folder.absolute().name)
    return RunInfo(
        name=str(folder) if folder.name in ("", ".", "..") else folder.name,
        recipe=stamped[1] if stamped else str(recipe.get("description", "")),
        state=_state(folder, bool(summary)),
        steps=int(last.get("step", summary.get("steps", 0))),
        total=recipe.get("run", {}).get("steps"),
        loss=last.get("loss"),
        metrics={key: value for row in evals for key, value in row.items() if key not in ("step", "seconds")},
        seconds=float(last.get("seconds", summary.get("train_seconds", 0.0))),
    )


def _state(folder: Path, summarised: bool) -> str:
    status = _read(folder / STATUS)
    state = str(status.get("state", "finished" if summarised else "unknown"))
    if state == "running" and status.get("host") == platform.node() and not Path(f"/proc/{status.get('pid')}").exists():
        return "killed"
    return state


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def read_recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run, as plain data. Raises ConfigError."""
    if not (folder / RECIPE).is_file():
        raise ConfigError(f"{folder}: no run; a run folder holds {RECIPE}. `vlp runs ls {folder.parent}` lists runs")
    content: dict[str, Any] = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    return content


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """{"runs": one entry each, "recipe": differing keys, "metrics": all}; values in the order of `folders`."""
    if len({str(folder.absolute()) for folder in folders}) < max(2, len(folders)):
        raise ConfigError("runs compare: give two or more different run folders")
    infos = [describe(folder) for folder in folders]
    recipes = [flat(read_recipe(folder)) for folder in folders]
    keys = sorted({key for recipe in recipes for key in recipe}, key=natural)
    values = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    names = sorted({name for info in infos for name in info.metrics}, key=natural)
    return {
        "runs": [asdict(info) for info in infos],
        "recipe": {key: found for key, found in values.items() if any(value != found[0] for value in found)},
        "metrics": {
            "steps": [info.steps for info in infos],
            "seconds": [info.seconds for info in infos],
            "loss": [info.loss for info in infos],
            **{name: [info.metrics.get(name) for info in infos] for name in names},
        },
    }


def draw(folders: Sequence[Path]) -> bytes:
    """PNG of the loss and of the main metrics that the runs share, over steps and over seconds."""
    infos = [describe(folder) for folder in folders]
    shared = [name for name in infos[0].main if all(name in info.main for info in infos)]
    runs = {}
    for folder, label in zip(folders, labels(folders), strict=True):
        runlog = RunLog(folder, ())
        runs[label] = (runlog.rows("metrics.jsonl"), runlog.rows("evals.jsonl"))
    stream = io.BytesIO()
    compare_curves(runs, shared[:3]).savefig(stream, format="png", dpi=110, facecolor="white")
    return stream.getvalue()


def labels(folders: Sequence[Path]) -> list[str]:
    """A short name for each run that tells them apart."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [os.path.normpath(folder) for folder in folders]


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """The picture (.png), or a self-contained page with tables and picture (.html). Raises ConfigError."""
    if out.suffix not in (".png", ".html"):
        raise ConfigError(f"--out {out}: the file name must end in .png or .html")
    content, png = compare(folders), draw(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        out.write_bytes(png)
        return out
    head = ["", *labels(folders)]
    tables = "".join(
        f"<h2>{title}</h2>{_table(head, rows)}"
        for title, rows in (
            ("state", {"state": [run["state"] for run in content["runs"]]}),
            ("recipe, where it differs", content["recipe"]),
            ("metrics", {name: [show(name, v) for v in values] for name, values in content["metrics"].items()}),
        )
    )
    picture = f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    out.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>runs compared</title><style>{STYLE}</style><h1>runs compared</h1>{picture}{tables}</html>",
        encoding="utf-8",
    )
    return out


def _table(head: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> str:
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join(
        f"<tr><td class=m>{html.escape(name)}</td>"
        + "".join(f"<td class=n>{html.escape(str(value))}</td>" for value in values)
        + "</tr>"
        for name, values in rows.items()
    )
    return f"<table><tr>{top}</tr>{body}</table>" if rows else "<p class=m>nothing</p>"


def show(name: str, value: float | None) -> str:
    """A metric for people: fractions in per cent, whole numbers whole."""
    if value is None or math.isnan(value):
        return "-"
    if is_share(name):
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
