"""Evaluations: one module per task with a `Config` and `run(encoder, data, config)`; the module name is the task.

`run` yields (name, value). Every rank of a process group calls `evaluate` or `evaluate_all`: pictures, texts and
similarities are computed in shares, and each rank returns what one process alone would, bit for bit.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

import vlp.evals
from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import ConfigError
from data_pipelines.shard_set import Train
from vlp import distributed
from vlp.bundle import Bundle
from vlp.evals._encode import Encoder

if TYPE_CHECKING:
    from vlp.recipe import EvalConfig


__all__ = ["Encoder", "check_options", "evaluate", "evaluate_all", "load", "tasks"]


def tasks() -> list[str]:
    """All tasks, as written on the command line."""
    found = (module.name for module in pkgutil.iter_modules(vlp.evals.__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def load(task: str) -> Any:
    """The module of a task. Raises ConfigError for an unknown one."""
    if task not in tasks():
        raise ConfigError(f"task {task!r} is unknown; known: {', '.join(tasks())}")
    return importlib.import_module(f"vlp.evals.{task.replace('-', '_')}")


def check_options(task: str, options: Mapping[str, Any]) -> StrictModel:
    """The validated Config of a task. Raises pydantic's ValidationError with paths below `task` or `options`."""
    if task not in tasks():
        raise _refused(("task",), task, f"unknown; known: {', '.join(tasks())}")
    model = load(task).Config
    for key in options.keys() - model.model_fields.keys():
        known = ", ".join(model.model_fields)
        raise _refused(("options", key), options[key], f"unknown option of {task}; known: {known}")
    try:
        config: StrictModel = model.model_validate(dict(options))
    except ValidationError as error:
        raise ValidationError.from_exception_data(
            task,
            [
                {"type": e["type"], "loc": ("options", *e["loc"]), "input": e["input"], "ctx": e.get("ctx", {})}
                for e in error.errors()
            ],
        ) from error
    return config


def _refused(path: tuple[str, ...], value: Any, reason: str) -> ValidationError:
    return ValidationError.from_exception_data(
        path[0], [{"type": "value_error", "loc": path, "input": value, "ctx": {"error": ValueError(reason)}}]
    )


def evaluate(
    bundle: Bundle | Encoder, task: str, data: Train | Path, options: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """All metrics of one task on shards, in float32; every rank must call it.

    An Encoder in place of the bundle keeps the features for the next task on the same shards. Raises ConfigError for
    an unknown task or option, MissingField where the shards lack what the task needs.
    """
    module = load(task)
    try:
        config = check_options(task, options or {})
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    encoder = bundle if isinstance(bundle, Encoder) else Encoder(bundle)
    with _exact_products():
        return distributed.from_all_ranks(dict(module.run(encoder, data, config)))[0]


def evaluate_all(bundle: Bundle, items: "Iterable[EvalConfig]") -> dict[str, float]:
    """Metrics of several evaluations of a recipe as `name/metric`; shards they share are encoded once."""
    encoder = Encoder(bundle)
    found: dict[str, float] = {}
    for item in items:
        metrics = evaluate(encoder, item.task, item.data, item.options)
        found |= {f"{item.name}/{key}": value for key, value in metrics.items()}
    return found


@contextmanager
def _exact_products() -> Iterator[None]:
    """Plain float32 matrix products: the fast route of a training run would give other numbers than `vlp eval`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
