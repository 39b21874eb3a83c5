"""Everything that changes while training: built from a recipe, written to checkpoints, read back from them."""

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.ledger import Ledger
from data_pipelines.loader import Loader, make_loader, open_set
from data_pipelines.reader import Sample
from data_pipelines.shard_set import ShardSet
from data_pipelines.stream import stored
from data_pipelines.tokens import Tokenizer, TokenizerConfig, clip_tokenizer, learn_tokenizer
from vlp import __version__, distributed
from vlp.bundle import VOCABULARY, Bundle, Provenance, check_start, load_tokenizer
from vlp.checkpoint import Saver, load_latest, set_aside
from vlp.flops import StepFlops
from vlp.frozen import FeatureLoader, FrozenHeads, trunks_frozen
from vlp.guard import Guard
from vlp.mirror import Mirror
from vlp.models import build_model, hf_folder, instantiate, locking, resolve_config
from vlp.models.layout import set_channels_last
from vlp.models.lean import LeanModel
from vlp.objectives import base as objectives
from vlp.optim import Ema, build_optimizer, load_numbers, numbers_of
from vlp.recipe import Recipe
from vlp.runlog import RunLog, now, revision


@dataclass(slots=True)
class Run:
    """A run under way."""

    recipe: Recipe
    log: RunLog
    model: nn.Module
    model_cfg: dict[str, Any]
    tokenizer: Tokenizer
    objective: Any
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    guard: Guard
    saver: Saver
    loader: Loader | FeatureLoader
    encoder: Any
    """What the objective encodes with: the lean model, or its heads where both trunks are frozen."""
    flops: StepFlops
    device: torch.device
    total: int
    """Steps of the whole run."""
    step: int = 0
    """Batches done: updates and refused ones."""
    seconds: float = 0.0
    """Training time so far, over all resumes; evaluation left out."""
    best: dict[str, Any] = field(default_factory=dict)
    """Step and value of the best evaluation so far, by `run.keep_best`."""
    account: dict[str, Any] = field(default_factory=dict)
    """Ledger of all ranks and all resumes, as of the last save."""
    mirror: Mirror | None = None
    """Where the run folder is sent, if it belongs on an object store."""
    ema_parts: Ema | None = None
    """Averages of what the objective hands over beside the model."""

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.log.folder


def _in(sample: Sample, columns: Iterable[str]) -> list[str]:
    """Texts of a sample in columns of its json member."""
    return [value for name in columns if isinstance(value := sample.columns.get(name), str)]


def make_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer a recipe asks for; `learn` reads all training texts."""
    choice = recipe.tokenizer
    if choice.kind == "clip":
        return clip_tokenizer(choice.context_length)
    if choice.kind == "learn":
        samples = stored(open_set(recipe.data), Ledger(recipe.data.max_bad_share))
        columns = recipe.data.captions.columns
        texts = (text for _, sample in samples for text in (*sample.captions, *sample.labels, *_in(sample, columns)))
        table = recipe.data.labels.table if recipe.data.labels else None
        return learn_tokenizer(chain(texts, table.texts if table else ()), choice.vocab_size, choice.context_length)
    if choice.kind == "weights":
        source = recipe.model.weights or recipe.model.text_weights
        if source is None:
            raise ConfigError("tokenizer.kind='weights' needs model.weights or model.text_weights, to take theirs")
        known = load_tokenizer(Path(source))
        return Tokenizer(known.vocabulary, known.config.model_copy(update={"context_length": choice.context_length}))
    name = resolve_config(recipe.model)["text_cfg"].get("hf_model_name")
    if name is None:
        raise ConfigError("tokenizer.kind='hf' needs a Hugging Face text tower (text_cfg.hf_model_name)")
    vocabulary = (hf_folder(name) / VOCABULARY).read_text(encoding="utf-8")
    return Tokenizer(vocabulary, TokenizerConfig(context_length=choice.context_length, lower=False))


def prepare(recipe: Recipe, folder: Path) -> Run:
    """Build everything from a recipe, in a fixed order under one seed. Trains nothing yet."""
    rank, world = distributed.set_up(recipe.run.device)
    torch.set_float32_matmul_precision("medium")  # the fast fp32 matmul route on CPUs
    threads = recipe.run.threads or (os.cpu_count() or 1) // recipe.run.processes
    if recipe.run.threads or recipe.run.processes > 1:
        torch.set_num_threads(max(1, threads))
    torch.manual_seed(recipe.run.seed)
    device = distributed.pick_device(recipe.run.device)
    tokenizer = make_tokenizer(recipe)
    _check_evals(recipe)
    image, choice = recipe.data.image, recipe.tokenizer
    if recipe.model.weights:
        check_start(recipe.model.weights, tokenizer, image)
    sizes = (image.size, choice.context_length, tokenizer.vocab_size, image.channels)
    model, model_cfg = build_model(recipe.model, *sizes)
    scale = float(model.logit_scale.detach())  # type: ignore[operator]
    model = _place(model, recipe, device)
    flops = StepFlops(model, image.channels)
    distributed.wrap(model, recipe.run.strategy)
    module, options = objectives.load(recipe.objective)
    loader = make_loader(recipe.data, tokenizer, recipe.run.seed, rank, world)
    dims = objectives.Dims(
        embed=int(model_cfg["embed_dim"]), init_logit_scale=scale, classes=loader.classes, clusters=loader.clusters,
        image=image, tokenizer=tokenizer, box_labels=loader.box_names, weights=recipe.model.weights,
    )  # fmt: skip
    objective = module.build(options, dims).to(device)
    if hasattr(objective, "attach"):
        objective.attach(model)
    locking.apply(model, recipe.model, 1.0)  # what thaws later is no frozen trunk
    flops.more = getattr(objective, "more_flops", None)
    frozen = trunks_frozen(model) and not getattr(objective, "whole_towers", False)
    _check_effects(recipe, flops, frozen)
    locking.apply(model, recipe.model, 0.0)
    total = recipe.run.steps or max(1, round((recipe.run.epochs or 0) * loader.plan.steps))
    loader.side_at = lambda step: picture_side(recipe, step / total)
    return Run(
        recipe=recipe,
        log=RunLog(folder, recipe.run.loggers),
        model=model,
        model_cfg=model_cfg,
        tokenizer=tokenizer,
        objective=objective,
        optimizer=build_optimizer(model, objective, recipe.optim),
        ema=Ema(model, recipe.optim.ema) if recipe.optim.ema else None,
        ema_parts=Ema(parts, recipe.optim.ema) if recipe.optim.ema and len(parts := extra_parts(objective)) else None,
        guard=Guard(recipe.run.spike),
        saver=Saver(folder / "checkpoints", recipe.run.keep),
        loader=FeatureLoader(loader, model, device) if frozen else loader,
        encoder=FrozenHeads(model) if frozen else LeanModel(model, recipe.run.strategy == "ddp", recipe.run.compile),
        flops=flops,
        device=device,
        total=total,
    )


def _check_evals(recipe: Recipe) -> None:
    """Raise ConfigError for evaluations without data: now, and not after hours of training."""
    for number, item in enumerate(recipe.evals):
        try:
            shards = ShardSet(item.data)
        except (PipelineError, OSError) as error:
            raise ConfigError(f"evals.{number}.data={item.data}: {error}") from error
        if not len(shards):
            raise ConfigError(f"evals.{number}.data={item.data}: the shards hold no sample")


def _check_effects(recipe: Recipe, flops: StepFlops, frozen: bool) -> None:
    """Raise ConfigError for options that change nothing here, and for sizes that the image tower does not take."""
    run, drop = recipe.run, recipe.model.patch_dropout
    given = {"run.sizes": run.sizes, "run.compile": run.compile, "model.patch_dropout": drop}
    given["run.activation_checkpointing"] = run.activation_checkpointing
    idle = [f"{name}={value}" for name, value in given.items() if value]
    if frozen and idle:
        raise ConfigError(f"{idle[0]} has no effect with both trunks frozen, whose features are computed once")
    for side in (side for side in run.sizes.values() if side < recipe.data.image.size):  # larger ones change nothing
        try:
            flops.sample(side, recipe.tokenizer.context_length)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(f"run.sizes: the image tower takes no pictures of {side} px ({error})") from error


def _place(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """The model on its device in the recipe's precision, memory layout and way of keeping activations."""
    settings = recipe.run
    if settings.activation_checkpointing:
        if hasattr(model.visual, "attnpool"):
            raise ConfigError("run.activation_checkpointing=true has no effect on open_clip's ResNets: leave it out")
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if settings.precision == "bf16":
        scale = model.logit_scale
        model.to(torch.bfloat16)
        scale.data = scale.data.float()  # steps of 1e-3 would round away
    model.to(device)
    return set_channels_last(model, device) if settings.channels_last else model


def picture_side(recipe: Recipe, progress: float) -> int:
    """Side of the training pictures after this share of the run."""
    due = [share for share in recipe.run.sizes if progress < share]
    return recipe.run.sizes[min(due)] if due else recipe.data.image.size


def save(run: Run, wait: bool = False) -> None:
    """Checkpoint of the present state and the account of all data so far, by rank 0; every rank must call it.

    It is written while training goes on; `wait` until it lies on disk. Raises PipelineError when three in a row failed.
    """
    account = Ledger()
    for report in distributed.from_all_ranks(run.loader.ledger.report()):
        account.add(report)
    tensors = {
        "model": distributed.full_state(run.model.state_dict()),
        "optimizer": distributed.full_optimizer_state(run.optimizer, _named(run)),
        "objective": distributed.full_state(run.objective.state_dict()),
    }
    for name, ema in _averages(run).items():
        tensors[name] = distributed.full_state(ema.shadow)
    if distributed.rank() > 0:
        return
    run.account = account.report()
    with run.log.tolerant("ledger.json"):
        run.log.write("ledger.json", run.account)
    state = {
        "loader": run.loader.state_dict(),
        "optimizer": numbers_of(run.optimizer, _named(run)),
        "guard": run.guard.state_dict(),
        "seconds": run.seconds,
        "ema_updates": run.ema.updates if run.ema else 0,
        "best": run.best,
        "ledger": run.account,
        "vlp": __version__,
    }
    run.saver.save(run.step, tensors, state, [run.best["step"]] if run.best else [], wait)


def _newest(run: Run) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
    """The newest whole checkpoint, on every rank the same. Raises PipelineError where ranks see different ones."""
    if run.mirror is not None:
        run.mirror.fetch()  # on other machines than that of rank 0 there is nothing yet
    found = load_latest(run.folder / "checkpoints")
    steps = distributed.from_all_ranks(found and int(found[1]["step"]))
    if len(set(steps)) > 1:
        seen = ", ".join(f"rank {rank}: {'none' if step is None else step}" for rank, step in enumerate(steps))
        raise PipelineError(
            f"the ranks see different checkpoints in {run.folder.absolute()} ({seen}): the folder has to be shared by "
            "all machines, and readable"
        )
    if found and distributed.rank() == 0:  # all have read
        set_aside(run.folder / "checkpoints", found[1]["name"])
    return found


def restore(run: Run) -> None:
    """Continue from the newest whole checkpoint; from the start if there is none at all."""
    found = _newest(run)
    if found is None:
        return
    _load_weights(run, *found)
    _, state = found
    run.loader.load_state_dict(state["loader"])
    run.guard.load_state_dict(state["guard"])
    run.best = state["best"]
    run.account = state["ledger"]
    if distributed.rank() == 0:
        run.loader.ledger.add(run.account)
    run.step, run.seconds = int(state["step"]), float(state["seconds"])
    locking.apply(run.model, run.recipe.model, run.step / run.total)


def roll_back(run: Run) -> int | None:
    """Weights, averages and optimiser of the newest whole checkpoint, while the data goes on; its step, or None.

    What the refused batches have in common with the weights stays behind, and none of them comes again.
    """
    run.saver.wait()
    distributed.from_all_ranks(None)  # rank 0 may still have been writing
    found = _newest(run)
    if found is None:
        return None
    _load_weights(run, *found)
    run.guard.rollbacks += 1
    run.guard.in_a_row = 0
    return int(found[1]["step"])


def _load_weights(run: Run, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
    distributed.load_full_state(run.model.state_dict(), tensors["model"])
    distributed.load_full_optimizer_state(run.optimizer, _named(run), tensors["optimizer"])
    load_numbers(run.optimizer, _named(run), state["optimizer"])
    distributed.load_full_state(run.objective.state_dict(), tensors.get("objective", {}))
    for name, ema in _averages(run).items():
        ema.updates = int(state["ema_updates"])
        distributed.load_full_state(ema.shadow, tensors[name])


def _averages(run: Run) -> dict[str, Ema]:
    """Averages that are kept, under their names in checkpoints."""
    found = {"ema": run.ema, "ema_parts": run.ema_parts}
    return {name: ema for name, ema in found.items() if ema is not None}


def extra_parts(objective: Any) -> nn.ModuleDict:
    """What an objective hands over beside the model, by name; for most nothing."""
    return nn.ModuleDict(objective.extra_parts() if hasattr(objective, "extra_parts") else {})


def _parts(run: Run) -> dict[str, nn.Module]:
    """Copies of them, averaged where there are averages, ready for inference."""
    parts = copy.deepcopy(extra_parts(run.objective)).float().eval()
    if run.ema_parts is not None:
        parts.load_state_dict(run.ema_parts.shadow)
    return dict(parts.items())


def _named(run: Run) -> dict[str, nn.Parameter]:
    parts = {"model": run.model, "objective": run.objective}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}


def current_bundle(run: Run) -> Bundle:
    """The averaged weights if there are any, else the present ones, ready for inference; every rank must call it."""
    weights = distributed.full_state(run.model.state_dict() if run.ema is None else run.ema.shadow)
    if run.recipe.run.strategy == "ddp":
        model = copy.deepcopy(run.model).float()  # averages are finer than the weights may be
    else:  # a sharded model cannot be copied
        with torch.random.fork_rng():
            model = instantiate(run.model_cfg)
    model.load_state_dict(weights)
    provenance = Provenance(
        created=now(),
        vlp_version=__version__,
        revision=revision(),
        recipe=run.recipe.model_dump(mode="json"),
        data={str(run.recipe.data.train): run.loader.state_dict()["data"]},
        steps=run.step,
        samples=run.step * run.recipe.data.batch_size,
    )
    model = model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    image = run.recipe.data.image
    return Bundle(run.folder.name, model, run.model_cfg, image, run.tokenizer, provenance, parts=_parts(run))
