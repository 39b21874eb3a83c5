"""Recipe: everything a run needs, in one frozen object.

YAML file -> at most one `extends` -> dotted `key=value` overrides -> Recipe. Defaults live in the models alone; a
recipe file states differences. The resolved recipe is saved with the run.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import ConfigError
from data_pipelines.loader import DataConfig
from data_pipelines.shard_set import Train
from vlp.distributed import Strategy
from vlp.evals import check_options
from vlp.loggers import flat
from vlp.models import ModelConfig
from vlp.objectives import base as objectives
from vlp.optim import OptimConfig


class TokenizerChoice(StrictModel):
    """Where token ids come from."""

    kind: Literal["clip", "learn", "hf", "weights"] = "clip"
    """clip: OpenAI CLIP's vocabulary. learn: a small one from the training captions. hf: the text tower's own.
    weights: the one that comes with model.weights, else with model.text_weights."""
    vocab_size: int = 4096
    """Size for `learn`."""
    context_length: int = 77


class EvalConfig(StrictModel):
    """One evaluation during and after training."""

    name: str
    """Prefix of its metrics."""
    task: str = "retrieval"
    data: Train
    """Shards, as for `data.train`."""
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0 = only at the end."""
    options: dict[str, Any] = {}
    """Options of the task: those of its `Config` in `vlp/evals`."""

    @field_validator("data", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _known_options(self) -> "EvalConfig":
        check_options(self.task, self.options)
        return self


class RunConfig(StrictModel):
    """Length, precision and housekeeping of a run."""

    seed: int = 0
    steps: int | None = None
    """Length in optimiser steps; give either this or `epochs`."""
    epochs: float | None = None
    precision: Literal["fp32", "amp_bf16", "bf16"] = "amp_bf16"
    """amp_bf16: matrix products in bfloat16 under autocast. bf16: weights too, half the memory, less exact updates.
    fp32: with the fast float32 matmul route."""
    channels_last: bool = True
    """Memory layout of pictures; faster for convolutions."""
    activation_checkpointing: bool = False
    """Compute the towers' activations again in the backward pass instead of keeping them: a third more time."""
    compile: bool = False
    """torch.compile the image tower, and the text tower unless its texts are trimmed: a minute or more at the start."""
    strategy: Strategy = "ddp"
    """With several ranks. ddp: each holds the whole model. fsdp: they share its towers (FSDP2), for large models."""
    device: str = "auto"
    processes: int = Field(1, ge=1)
    """Ranks `vlp train` starts on this machine; below torchrun, torchrun says how many. For CPUs."""
    threads: int | None = None
    """Torch threads per rank; default all cores, shared out. Bit-equal results need an equal number."""
    sizes: dict[float, int] = {}
    """Progressive resizing: share of the run -> side of the training pictures until then; afterwards full size."""
    log_every: int = Field(10, ge=1)
    loggers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow."""
    save_every: int = Field(200, ge=0)
    """Steps between checkpoints; 0 = none by steps. One is always written at the end and when interrupted."""
    save_minutes: float = Field(0.0, ge=0)
    """Minutes of training between checkpoints; 0 = none by time."""
    save_epochs: float = Field(0.0, ge=0)
    """Epochs between checkpoints; 0 = none by epochs."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints that stay."""
    keep_best: str | None = None
    """Metric of an evaluation, such as `val/image_to_text/R@1`: the checkpoint of its highest value stays as well."""
    spike: float | None = Field(5.0, gt=1)
    """A step whose loss is over so many times the mean of the last ones is refused like one that is not finite."""
    max_bad_steps: int = Field(3, ge=1)
    """Refused steps in a row after which the run goes back or stops."""
    on_bad_steps: Literal["rollback", "stop"] = "rollback"
    """rollback: to the weights of the last checkpoint, on with the data that follows the refused steps."""

    @field_validator("sizes")
    @classmethod
    def _shares_and_sides(cls, value: dict[float, int]) -> dict[float, int]:
        if odd := {share: side for share, side in value.items() if not 0 < share < 1 or side < 1}:
            raise ValueError(f"{odd}: give shares of the run between 0 and 1, and sides in pixels, such as {{0.6: 48}}")
        return value

    def save_steps(self, epoch: int) -> tuple[int, ...]:
        """Every how many steps a checkpoint is due, for epochs of so many steps; by steps, by epochs or both."""
        found = (self.save_every, max(1, round(self.save_epochs * epoch)) if self.save_epochs else 0)
        return tuple(steps for steps in found if steps)


class Recipe(StrictModel):
    """data + tokenizer + model + objective + optim + evals + run."""

    description: str = ""
    data: DataConfig
    tokenizer: TokenizerChoice = TokenizerChoice()
    model: ModelConfig = ModelConfig()
    objective: dict[str, Any] = {"name": "clip"}
    optim: OptimConfig = OptimConfig()
    evals: tuple[EvalConfig, ...] = ()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.run.steps is None) == (self.run.epochs is None):
            raise ConfigError(f"run.steps={self.run.steps}, run.epochs={self.run.epochs}: give exactly one of them")
        objectives.load(self.objective)
        best = self.run.keep_best
        if best is not None and best.partition("/")[0] not in [item.name for item in self.evals]:
            names = ", ".join(item.name for item in self.evals) or "none"
            raise ConfigError(f"run.keep_best={best!r} must begin with the name of an evaluation; there are: {names}")
        return self


def recipe_names() -> list[str]:
    """All recipes that come with the package, as `folder/name`."""
    root = resources.files("vlp").joinpath("recipes")
    folders = [item for item in root.iterdir() if item.is_dir()]
    return sorted(
        f"{folder.name}/{item.name.removesuffix('.yaml')}"
        for folder in folders
        for item in folder.iterdir()
        if item.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """The YAML of a recipe of the package, or of a file. Raises ConfigError listing what exists."""
    if name in recipe_names():
        return resources.files("vlp").joinpath("recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
        raise ConfigError(f"recipe {name!r}: no such file")
    raise ConfigError(
        f"recipe {name!r} is unknown; known: {', '.join(recipe_names())}; or give the path of a .yaml file"
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe. Raises ConfigError with one line per problem."""
    settings = _read(name)
    parent = settings.pop("extends", None)
    if parent is not None:
        base = _read(parent)
        if "extends" in base:
            raise ConfigError(f"recipe {name!r} extends {parent!r}, which extends another: one level is allowed")
        settings = merge(base, settings)
    for override in overrides:
        apply_override(settings, override)
    return validate(settings)


def _read(name: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(recipe_text(name))
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {name!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {name!r}: expected keys such as data, model, run")
    return content


def validate(settings: Mapping[str, Any]) -> Recipe:
    """Recipe from plain data."""
    try:
        return Recipe.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigError(explain(error, known_keys(Recipe))) from error


def known_keys(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Dotted prefix -> keys allowed there."""
    found = {prefix: list(model.model_fields)}
    for name, item in model.model_fields.items():
        if isinstance(item.annotation, type) and issubclass(item.annotation, BaseModel):
            found |= known_keys(item.annotation, f"{prefix}.{name}".lstrip("."))
    return found


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, dictionaries key by key; an objective of another name replaces the old one whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        renamed = key == "objective" and isinstance(old, dict) and value.get("name", old.get("name")) != old.get("name")
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) and not renamed else value
    return merged


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value`; the value is read as YAML. List entries are addressed by their number.

    Another `objective.name` drops the options of the old objective, as `merge` does.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: expected key=value, for example optim.lr=1e-3")
    target: Any = settings
    *parents, last = path.split(".")
    for part in parents:
        if isinstance(target, list):
            target = _entry(target, part, override)
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
        else:
            raise ConfigError(f"override {override!r}: {part!r} lies below a plain value")
    value = yaml.safe_load(text)
    if isinstance(target, list):
        _entry(target, last, override)
        target[int(last)] = value
    elif isinstance(target, dict):
        if path == "objective.name" and target.get("name") != value:
            target.clear()
        target[last] = value
    else:
        raise ConfigError(f"override {override!r}: {last!r} lies below a plain value")


def _entry(items: list[Any], number: str, override: str) -> Any:
    if not number.isdigit() or int(number) >= len(items):
        raise ConfigError(f"override {override!r}: {number!r} is no entry of a list of {len(items)}")
    return items[int(number)]


FIXED = ("tokenizer", "model", "objective", "optim", "run.seed", "run.precision", "run.sizes")
"""What decides where a run goes and must stay when it is resumed; of `data` the loader's state decides by content."""


def check_resumable(recipe: Recipe, path: Path) -> None:
    """Raise ConfigError where `recipe` would take a run elsewhere than the one saved in `path`, with which it began.

    Its length, evaluations, what is saved and logged, and how the work is done may change.
    """
    before, after = (_deciding(one) for one in (load_recipe(str(path)), recipe))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            raise ConfigError(
                f"{key}: the run began with {before.get(key)!r} and cannot be resumed with {after.get(key)!r}: leave "
                f"it as in {path}, or start another run from the weights by model.weights={path.parent}"
            )


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of all that must not change, defaults of the objective filled in."""
    _, options = objectives.load(recipe.objective)
    settings = recipe.model_dump(mode="json")
    settings["objective"] = {"name": recipe.objective["name"], **options.model_dump(mode="json")}
    settings["optim"].pop("accumulate")  # other ways to the same result
    settings["objective"].pop("exchange", None)
    return {key: value for key, value in flat(settings).items() if key.startswith(FIXED)}


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
