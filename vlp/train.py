"""The trainer: batch -> towers -> objective -> update, with checkpoints, evaluation and a bundle at the end."""

import copy
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.console import progress
from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.ledger import Ledger
from data_pipelines.loader import Loader, make_loader, open_set
from data_pipelines.preprocess import normalise
from data_pipelines.stream import stored
from data_pipelines.tokens import Tokenizer, TokenizerConfig, clip_tokenizer, learn_tokenizer
from vlp import __version__, distributed, evals
from vlp.bundle import VOCABULARY, Bundle, Provenance, pick_device, save_bundle
from vlp.checkpoint import load_latest, save_checkpoint
from vlp.frozen import FeatureLoader, FrozenHeads, trunks_frozen
from vlp.launch import local_ranks
from vlp.models import build_model, hf_folder, resolve_config, trunk_of
from vlp.models.text import TrimmedText
from vlp.objectives import base as objectives
from vlp.optim import Ema, build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from vlp.recipe import Recipe, dump
from vlp.runlog import RunLog, environment, now, revision, training_bar

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 3
"""Steps with a non-finite loss in a row before the run stops."""


class Interrupted(PipelineError):
    """The run was asked to stop; everything is saved."""

    def __init__(self, step: int, folder: Path, signal_number: int) -> None:
        super().__init__(f"stopped at step {step} and saved; the same command with --resume continues (run {folder})")
        self.signal_number = signal_number


@dataclass(slots=True)
class Run:
    """Everything that changes while training."""

    recipe: Recipe
    folder: Path
    model: nn.Module
    model_cfg: dict[str, Any]
    tokenizer: Tokenizer
    objective: Any
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    loader: Loader | FeatureLoader
    encoder: Any
    """What the objective encodes with: the model with trimmed text, or its heads where both trunks are frozen."""
    device: torch.device
    total: int
    """Steps of the whole run."""
    step: int = 0
    """Updates done."""
    seconds: float = 0.0
    """Training time so far, over all resumes; evaluation and saving left out."""
    bad_steps: int = 0
    account: dict[str, Any] = field(default_factory=dict)
    """Ledger of all ranks and all resumes, as of the last save."""


def make_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer a recipe asks for; `learn` reads all training texts."""
    choice = recipe.tokenizer
    if choice.kind == "clip":
        return clip_tokenizer(choice.context_length)
    if choice.kind == "learn":
        samples = stored(open_set(recipe.data), Ledger(recipe.data.max_bad_share))
        texts = (text for _, sample in samples for text in (*sample.captions, *sample.labels))
        return learn_tokenizer(texts, choice.vocab_size, choice.context_length)
    name = resolve_config(recipe.model)["text_cfg"].get("hf_model_name")
    if name is None:
        raise ConfigError("tokenizer.kind='hf' needs a Hugging Face text tower (text_cfg.hf_model_name)")
    vocabulary = (hf_folder(name) / VOCABULARY).read_text(encoding="utf-8")
    return Tokenizer(vocabulary, TokenizerConfig(context_length=choice.context_length, lower=False))


def prepare(recipe: Recipe, folder: Path) -> Run:
    """Build everything from a recipe, in a fixed order under one seed. Trains nothing yet."""
    rank, world = distributed.set_up()
    torch.set_float32_matmul_precision("medium")  # the fast fp32 matmul route on CPUs
    threads = recipe.run.threads or (os.cpu_count() or 1) // recipe.run.processes
    if recipe.run.threads or recipe.run.processes > 1:
        torch.set_num_threads(max(1, threads))
    torch.manual_seed(recipe.run.seed)
    device = pick_device(recipe.run.device)
    tokenizer = make_tokenizer(recipe)
    choice = recipe.tokenizer
    model, model_cfg = build_model(recipe.model, recipe.data.image.size, choice.context_length, tokenizer.vocab_size)
    model.to(device)
    if recipe.run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scale = float(model.logit_scale.detach())  # type: ignore[operator]
    module, options = objectives.load(recipe.objective)
    objective = module.build(options, objectives.Dims(int(model_cfg["embed_dim"]), scale)).to(device)
    loader = make_loader(recipe.data, tokenizer, recipe.run.seed, rank, world)
    frozen = trunks_frozen(model)
    total = recipe.run.steps or max(1, round((recipe.run.epochs or 0) * loader.plan.steps))
    loader.side_at = lambda step: picture_side(recipe, step / total)
    return Run(
        recipe=recipe,
        folder=folder,
        model=model,
        model_cfg=model_cfg,
        tokenizer=tokenizer,
        objective=objective,
        optimizer=build_optimizer(model, objective, recipe.optim),
        ema=Ema(model, recipe.optim.ema) if recipe.optim.ema else None,
        loader=FeatureLoader(loader, model, device) if frozen else loader,
        encoder=FrozenHeads(model) if frozen else TrimmedText(model),
        device=device,
        total=total,
    )


def train_step(run: Run, batch: Batch) -> dict[str, float]:
    """One update. A non-finite loss changes no weight and is counted."""
    optim = run.recipe.optim
    batch = batch.to(run.device)
    loss_output = compute_loss(run, batch)
    rate = learning_rate(run.step, run.total, optim)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    loss_output.loss.backward()
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    distributed.average_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip or float("inf"))
    finite = bool(torch.isfinite(loss_output.loss) & torch.isfinite(norm))
    if finite:
        run.optimizer.step()
        _clamp_scale(run)
        if run.ema is not None:
            run.ema.update(run.model)
        run.bad_steps = 0
    else:
        _refuse_step(run, batch)
    run.step += 1
    values = {"loss": float(loss_output.loss.detach())} | {k: float(v) for k, v in loss_output.parts.items()}
    scale = float(run.model.logit_scale.detach().exp())  # type: ignore[operator]
    return values | {"lr": rate, "grad_norm": float(norm), "logit_scale": scale}


def compute_loss(run: Run, batch: Batch) -> objectives.LossOutput:
    """Both towers under autocast, the loss over the batch of all ranks in float32."""
    if batch.image_features is not None:
        pixels = batch.image_features
    else:
        pixels = normalise(batch.pixels, run.recipe.data.image)
        if run.recipe.run.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
    amp = run.recipe.run.precision == "amp_bf16"
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=amp):
        features = run.objective.encode(run.encoder, pixels, batch)
    scale: Tensor = run.model.logit_scale.exp()  # type: ignore[operator]
    output: objectives.LossOutput = run.objective(features, scale)
    return output


def picture_side(recipe: Recipe, progress: float) -> int:
    """Side of the training pictures after this share of the run."""
    due = [share for share in recipe.run.sizes if progress < share]
    return recipe.run.sizes[min(due)] if due else recipe.data.image.size


@torch.no_grad()
def _clamp_scale(run: Run) -> None:
    highest = torch.log(torch.tensor(run.recipe.optim.max_logit_scale))
    run.model.logit_scale.clamp_(0.0, float(highest))  # type: ignore[operator]


def _refuse_step(run: Run, batch: Batch) -> None:
    run.bad_steps += 1
    log.warning("step %d: the loss is not finite; weights left unchanged; keys %s", run.step, ", ".join(batch.keys[:8]))
    if run.bad_steps >= MAX_BAD_STEPS:
        raise PipelineError(
            f"the loss was not finite {MAX_BAD_STEPS} steps in a row, up to step {run.step}: lower optim.lr, "
            "or use run.precision=fp32"
        )


def save(run: Run, runlog: RunLog) -> None:
    """Checkpoint of the present state and the account of all data so far, by rank 0; every rank must call it."""
    account = Ledger()
    for report in distributed.from_all_ranks(run.loader.ledger.report()):
        account.add(report)
    if distributed.rank() > 0:
        return
    run.account = account.report()
    runlog.write("ledger.json", run.account)
    tensors = {
        "model": dict(run.model.state_dict()),
        "optimizer": optimizer_tensors(run.optimizer),
        "objective": dict(run.objective.state_dict()),
        "rng": {"torch": torch.get_rng_state()},
    }
    if run.ema is not None:
        tensors["ema"] = run.ema.shadow
    state = {
        "loader": run.loader.state_dict(),
        "seconds": run.seconds,
        "ema_updates": run.ema.updates if run.ema else 0,
        "ledger": run.account,
        "vlp": __version__,
    }
    save_checkpoint(run.folder / "checkpoints", run.step, tensors, state, run.recipe.run.keep)


def restore(run: Run) -> None:
    """Continue from the newest whole checkpoint; from the start if there is none."""
    found = load_latest(run.folder / "checkpoints")
    if found is None:
        return
    tensors, state = found
    run.model.load_state_dict(tensors["model"])
    load_optimizer_tensors(run.optimizer, tensors["optimizer"])
    run.objective.load_state_dict(tensors.get("objective", {}))
    torch.set_rng_state(tensors["rng"]["torch"])
    if run.ema is not None:
        run.ema.updates = int(state["ema_updates"])
        for key, value in tensors["ema"].items():
            run.ema.shadow[key].copy_(value)
    run.loader.load_state_dict(state["loader"])
    run.account = state["ledger"]
    if distributed.rank() == 0:
        run.loader.ledger.add(run.account)
    run.step, run.seconds = int(state["step"]), float(state["seconds"])


def current_bundle(run: Run) -> Bundle:
    """The averaged weights if there are any, else the present ones, ready for inference."""
    model = copy.deepcopy(run.model)
    if run.ema is not None:
        model.load_state_dict(run.ema.shadow)
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
    return Bundle(run.folder.name, model, run.model_cfg, run.recipe.data.image, run.tokenizer, provenance)


def train(recipe: Recipe, folder: Path, resume: bool = False, show: bool = True) -> dict[str, Any]:
    """Train a recipe into `folder`; the summary, empty on ranks above 0. Raises Interrupted on a signal, all saved."""
    runlog = RunLog(folder)
    if not resume and (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} holds a run already: continue it with --resume, or choose another --run-dir")
    if distributed.env_rank() == 0:
        (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    with local_ranks(recipe.run.processes, folder, resume), distributed.left_at_the_end():
        run = prepare(recipe, folder)
        lead = distributed.rank() == 0
        if resume:
            restore(run)
        if lead:
            _open_log(run, runlog)
        if isinstance(run.loader, FeatureLoader):
            begun = time.perf_counter()
            total = run.loader.plan.samples
            with progress("features of the frozen trunks", total, show and lead, "pictures") as advance:
                run.loader.fill(advance)
            run.seconds += time.perf_counter() - begun
        with _signals() as received:
            try:
                _loop(run, runlog, received, show and lead)
            except PipelineError as error:
                if not isinstance(error, Interrupted):  # too many bad samples: which, as far as this rank knows
                    name = "ledger.json" if lead else f"ledger-rank{distributed.rank()}.json"
                    runlog.write(name, run.loader.ledger.report())
                raise
    return _finish(run, runlog) if lead else {}


def _open_log(run: Run, runlog: RunLog) -> None:
    for name in ("metrics.jsonl", "evals.jsonl"):
        runlog.truncate(name, run.step)
    data = {str(run.recipe.data.train): run.loader.state_dict()["data"]}
    runlog.write("env.json", environment(run.device, data) | {"ranks": distributed.world_size()})


def _loop(run: Run, runlog: RunLog, received: Callable[[], int], show: bool) -> None:
    every = run.recipe.run
    set_training(run.model)
    with training_bar(show) as bar:
        task = bar.add_task("training", total=run.total, completed=run.step, note="")
        batches: Iterator[Batch] = iter(run.loader) if run.step < run.total else iter(())
        begun = time.perf_counter()
        for batch in batches:
            values = train_step(run, batch)
            seconds = time.perf_counter() - begun
            run.seconds += seconds
            speed = len(batch.keys) * distributed.world_size() / max(seconds, 1e-9)
            bar.update(task, completed=run.step, note=f"loss {values['loss']:.3f}  {speed:.0f} samples/s")
            if distributed.rank() == 0:
                _note(run, runlog, values)
            last = run.step >= run.total
            stop = distributed.any_rank(bool(received()), run.device)
            if stop or last or (every.save_every and run.step % every.save_every == 0):
                save(run, runlog)
            if stop and not last:
                raise Interrupted(run.step, run.folder, received() or signal.SIGTERM)
            if last:
                break
            begun = time.perf_counter()


def _note(run: Run, runlog: RunLog, values: dict[str, float]) -> None:
    """Metrics and evaluations that are due at this step."""
    if run.step % run.recipe.run.log_every == 0 or run.step == run.total:
        runlog.append("metrics.jsonl", {"step": run.step, "seconds": round(run.seconds, 2), **values})
    due = [item for item in run.recipe.evals if (item.every and run.step % item.every == 0) or run.step == run.total]
    if not due:
        return
    bundle = current_bundle(run)
    for item in due:
        metrics = evals.evaluate(bundle, item.task, item.data)
        runlog.append("evals.jsonl", {"step": run.step, **{f"{item.name}/{key}": v for key, v in metrics.items()}})


def set_training(model: nn.Module) -> None:
    """Training mode, but frozen trunks keep theirs: their batch-norm statistics must not drift."""
    model.train()
    for tower in (getattr(model, "visual", None), getattr(model, "text", None)):
        trunk = trunk_of(tower) if tower is not None else None
        if trunk is not None and not any(p.requires_grad for p in trunk.parameters()):
            trunk.eval()


def _finish(run: Run, runlog: RunLog) -> dict[str, Any]:
    bundle = save_bundle(current_bundle(run), run.folder / "bundle")
    last = [row for row in runlog.rows("evals.jsonl") if row["step"] == run.step]
    metrics = {key: value for row in last for key, value in row.items() if key != "step"}
    summary = {
        "metrics": metrics,
        "train_seconds": round(run.seconds, 1),
        "steps": run.step,
        "samples": run.step * run.recipe.data.batch_size,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "quarantined": run.account["quarantined"],
        "bundle": str(bundle),
    }
    runlog.write("summary.json", summary)
    return summary


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Remember SIGINT and SIGTERM instead of dying in the middle of a step; a second Ctrl-C acts at once."""
    caught: list[int] = []

    def remember(number: int, _frame: object) -> None:
        caught.append(number)
        if len(caught) > 1:
            signal.default_int_handler(number, None)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
