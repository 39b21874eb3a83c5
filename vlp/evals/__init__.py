"""Evaluations: one module per task with `run(bundle, data) -> Iterator[(name, value)]`; the module name is the task."""

import importlib
import pkgutil
from pathlib import Path

import vlp.evals
from data_pipelines.errors import ConfigError
from vlp.bundle import Bundle


def tasks() -> list[str]:
    """All tasks, as written on the command line."""
    found = (module.name for module in pkgutil.iter_modules(vlp.evals.__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def evaluate(bundle: Bundle, task: str, data: Path) -> dict[str, float]:
    """All metrics of one task on one folder of shards. Raises ConfigError for an unknown task."""
    if task not in tasks():
        raise ConfigError(f"task {task!r} is unknown; known: {', '.join(tasks())}")
    module = importlib.import_module(f"vlp.evals.{task.replace('-', '_')}")
    return dict(module.run(bundle, data))
