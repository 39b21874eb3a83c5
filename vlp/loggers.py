"""Dashboards beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow. One class each, opened at the first row.

All keep what they write inside the run folder or beside it, unless their own environment variables name a server
(WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME). The ids of a run are kept in `loggers.json`:
a resumed run goes on in the same place. No dashboard may end a training run: one that fails is closed and named.
"""

import importlib.util
import json
import logging
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from data_pipelines.errors import ConfigError

log = logging.getLogger(__name__)

IDS = "loggers.json"
TENSORBOARD = "tensorboard"
"""Sub-folder of the run, and name of the logger."""


class Backend(Protocol):
    """What a logger does."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Values of one step by their full names, such as train/loss."""

    def close(self, state: str) -> None:
        """Everything out. `state`: finished, interrupted or failed."""


class TensorBoard:
    """Event files in `tensorboard/`; needs no server."""

    def __init__(self, folder: Path, first: int, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # rows that a killed run wrote after its last checkpoint are hidden: they come again
        purge = first if resumed else None
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge, flush_secs=20)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, state: str) -> None:
        """Flush and close the file."""
        self._writer.close()


class Wandb:
    """A W&B run named after the folder, the recipe as its config; offline with WANDB_MODE=offline."""

    def __init__(self, folder: Path, first: int, resumed: bool) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vlp"),
            name=folder.name,
            id=_remember(folder, "wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(folder),
            config=_recipe(folder),
            settings=wandb.Settings(silent=True, console="off"),  # its capture of stderr would break the progress bar
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        """One row; W&B joins the rows of a step."""
        self._run.log(dict(values), step=step)

    def close(self, state: str) -> None:
        """Finish the run; it counts as crashed unless it finished."""
        self._run.finish(exit_code=0 if state == "finished" else 1)


class Mlflow:
    """An MLflow run; default store `mlflow.db` (SQLite) in the folder that holds the runs."""

    def __init__(self, folder: Path, first: int, resumed: bool) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        store = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute().parent / 'mlflow.db'}")
        self._client, self._metric = MlflowClient(tracking_uri=store), Metric
        self._run = _remember(folder, "mlflow", lambda: self._create(folder))
        self._client.update_run(self._run, status="RUNNING")
        if not resumed:
            parameters = [Param(key, str(value)[:6000]) for key, value in flat(_recipe(folder)).items()]
            for start in range(0, len(parameters), 100):  # more in one call are refused
                self._client.log_batch(self._run, params=parameters[start : start + 100])

    def _create(self, folder: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vlp")
        found = self._client.get_experiment_by_name(name)
        artifacts = (folder.absolute().parent / "mlartifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        return str(self._client.create_run(experiment, run_name=folder.name).info.run_id)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """One metric each; MLflow allows no @ in names: R@1 becomes R_at_1."""
        now = int(time.time() * 1000)
        names = {name: re.sub(r"[^\w\-. /:]", "_", name.replace("@", "_at_")) for name in values}
        metrics = [self._metric(names[name], value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, state: str) -> None:
        """Mark the run FINISHED, KILLED (interrupted) or FAILED."""
        self._client.set_terminated(self._run, {"finished": "FINISHED", "interrupted": "KILLED"}.get(state, "FAILED"))


BACKENDS: dict[str, Callable[[Path, int, bool], Backend]] = {TENSORBOARD: TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
"""Name in `run.loggers`, which is also the name of the package and of our extra -> class."""


class Loggers:
    """The dashboards of one run, behind one call. Opens nothing before the first row."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Raises ConfigError for an unknown logger and for one whose package is missing, unless it is the default."""
        for name in names:
            if name not in BACKENDS:
                raise ConfigError(f"run.loggers: {name!r} is unknown; known: {', '.join(BACKENDS)}")
            if name != TENSORBOARD and importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"run.loggers: {name!r} needs a package that is not installed: pip install 'vlp[{name}]', "
                    "or leave it out of run.loggers"
                )
        self._folder, self._names = folder, tuple(names)
        self._open: dict[str, Backend] | None = None
        self._seen: dict[str, int] = {}

    def seen(self, file: str, step: int) -> None:
        """Rows of `file` up to this step went out before the run was resumed: W&B and MLflow do not get them twice."""
        self._seen[file] = step

    def write(self, file: str, row: Mapping[str, Any]) -> None:
        """Pass on the numbers of one row of metrics.jsonl (as train/...) or evals.jsonl (named already)."""
        step = int(row["step"])
        prefix = "train/" if file == "metrics.jsonl" else ""
        values = {f"{prefix}{key}": float(value) for key, value in row.items() if key != "step" and _number(value)}
        if self._open is None:
            self._open = {}
            for name in self._names:
                self._guarded(name, self._start, name, step)
        for name, backend in tuple(self._open.items()):
            if name == TENSORBOARD or step > self._seen.get(file, -1):
                self._guarded(name, backend.write, values, step)

    def close(self, state: str = "finished") -> None:
        """Close what was opened; a later row opens it again."""
        for name, backend in (self._open or {}).items():
            self._guarded(name, backend.close, state)
        self._open = None

    def _start(self, name: str, step: int) -> None:
        assert self._open is not None
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"not installed; pip install {name}, or leave it out of run.loggers")
        self._open[name] = BACKENDS[name](self._folder, step, bool(self._seen))

    def _guarded(self, name: str, action: Callable[..., None], *arguments: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the dashboards' own insides
                action(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever ails a dashboard, the run goes on
            log.warning("logger %s is switched off, training goes on (%s: %s)", name, type(error).__name__, error)
            self._open = {key: value for key, value in (self._open or {}).items() if key != name}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries, and lists of them, as one level of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _remember(folder: Path, name: str, make: Callable[[], str]) -> str:
    """The id under which this run is known to a logger: from loggers.json, or a new one that is kept there."""
    path = folder / IDS
    ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in ids:
        ids[name] = make()
        path.write_text(json.dumps(ids), encoding="utf-8")
    return str(ids[name])
