"""The trainer's loop: steps, metrics, evaluations, checkpoints, signals, and a bundle at the end."""

import logging
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from data_pipelines.batch import Batch
from data_pipelines.console import progress
from data_pipelines.errors import ConfigError, PipelineError
from vlp import distributed, evals
from vlp.bundle import Bundle, save_bundle
from vlp.flops import device_peak, mfu
from vlp.frozen import FeatureLoader
from vlp.launch import local_ranks
from vlp.models import locking
from vlp.phases import Recorder, phase, recording
from vlp.recipe import Recipe, dump
from vlp.run import Run, current_bundle, prepare, restore, roll_back, save
from vlp.runlog import RunState, bar_note, environment, training_bar
from vlp.step import train_step

log = logging.getLogger(__name__)

MAX_ROLLBACKS = 3
"""Times a run may go back before it has to get on well."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, what schedulers send, and what they send some time before that if asked to."""


class Interrupted(PipelineError):
    """The run was asked to stop; everything is saved."""

    def __init__(self, step: int, folder: Path, signal_number: int) -> None:
        super().__init__(f"stopped at step {step} and saved; the same command with --resume continues (run {folder})")
        self.signal_number = signal_number


def train(recipe: Recipe, folder: Path, resume: bool = False, show: bool = True) -> dict[str, Any]:
    """Train a recipe into `folder`; the summary, empty on ranks above 0. Raises Interrupted on a signal, all saved."""
    if not resume and (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} holds a run already: continue it with --resume, or choose another --run-dir")
    if distributed.env_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    with local_ranks(processes(recipe), folder, resume), distributed.left_at_the_end(), _signals() as received:
        distributed.set_up(recipe.run.device)
        folder = distributed.from_all_ranks(folder)[0]  # named by the clock, it is another one on every rank
        run = prepare(recipe, folder)
        lead = distributed.rank() == 0
        with _noted(run):
            if resume:
                restore(run)
            locking.set_training(run.model)
            if lead:
                _open_log(run)
            if isinstance(run.loader, FeatureLoader):
                _fill(run, run.loader, show and lead)
            _loop(run, received, show and lead)
            bundle = current_bundle(run)
            summary = _finish(run, bundle) if lead else {}
    return summary


def processes(recipe: Recipe) -> int:
    """Ranks to start on this machine: what the recipe says for CPUs, at most one for each GPU."""
    on_gpu = recipe.run.device != "cpu" and torch.cuda.is_available()
    return min(recipe.run.processes, torch.cuda.device_count()) if on_gpu else recipe.run.processes


@contextmanager
def _noted(run: Run) -> Iterator[None]:
    """However the run ends, the save under way is finished and status.json says how it ended."""
    state: RunState = "failed"
    note = ""
    try:
        try:
            yield
            state = "finished"
        finally:
            run.saver.close()
    except BaseException as error:
        state = "interrupted" if isinstance(error, Interrupted) else "failed"
        note = str(error)
        if isinstance(error, PipelineError) and state == "failed":  # too many bad samples: which, as this rank knows
            rank = distributed.rank()
            run.log.write(f"ledger-rank{rank}.json" if rank else "ledger.json", run.loader.ledger.report())
        raise
    finally:
        run.log.close(state, note)


def _fill(run: Run, loader: FeatureLoader, show: bool) -> None:
    begun = time.perf_counter()
    with progress("features of the frozen trunks", loader.plan.samples, show, "pictures") as advance:
        loader.fill(advance)
    run.seconds += time.perf_counter() - begun


def _open_log(run: Run) -> None:
    for name in ("metrics.jsonl", "evals.jsonl", "refused.jsonl"):
        run.log.truncate(name, run.step)
    data = {str(run.recipe.data.train): run.loader.state_dict()["data"]}
    run.log.write("env.json", environment(run.device, data) | {"ranks": distributed.world_size()})


def _loop(run: Run, received: Callable[[], int], show: bool) -> None:
    every = run.recipe.run.save_steps(run.loader.plan.steps)
    saved = time.monotonic()
    with training_bar(show) as bar, recording(Recorder()) as recorder, closing(_batches(run)) as batches:
        task = bar.add_task("training", total=run.total, completed=run.step, note="")
        recorder.step()
        for batch in batches:
            values = train_step(run, batch)
            spent = recorder.step()
            values |= _speed(run, batch, spent)
            note = bar_note(values["loss"], values["samples_per_second"], values["data_wait"], values.get("mfu"))
            bar.update(task, completed=run.step, note=note)
            _go_back_if_due(run)
            best = _note(run, values)
            minutes = run.recipe.run.save_minutes
            late = bool(minutes) and time.monotonic() - saved > 60 * minutes
            stop, late = distributed.any_rank((bool(received()), late), run.device)
            last = run.step >= run.total
            if stop or last or best or late or any(run.step % steps == 0 for steps in every):
                save(run, wait=stop or last)
                saved = time.monotonic()
            if stop and not last:
                raise Interrupted(run.step, run.folder, received() or signal.SIGTERM)
            recorder.step()  # evaluations and saves are no part of a step


def _batches(run: Run) -> Generator[Batch]:
    batches = iter(run.loader)
    while run.step < run.total:
        with phase("data"):
            batch = next(batches)
        yield batch


def _speed(run: Run, batch: Batch, spent: Mapping[str, float]) -> dict[str, float]:
    """Samples a second over all ranks, share of the time waited for data and, where metrics are due, MFU."""
    seconds = max(sum(spent.values()), 1e-9)
    run.seconds += seconds
    mine = len(batch.keys) / seconds
    values = {"samples_per_second": mine * distributed.world_size(), "data_wait": spent.get("data", 0.0) / seconds}
    if batch.image_features is not None or run.step % run.recipe.run.log_every:
        return values
    peak = device_peak(run.device, run.recipe.run.precision)
    return values | {"mfu": mfu(mine, run.flops.sample_of(batch), peak)}


def _go_back_if_due(run: Run) -> None:
    if run.guard.in_a_row < run.recipe.run.max_bad_steps:
        return
    step = roll_back(run) if run.guard.rollbacks < MAX_ROLLBACKS else None
    if step is None:
        raise PipelineError(
            f"{run.guard.in_a_row} steps in a row refused up to step {run.step}, and "
            + (
                f"going back {MAX_ROLLBACKS} times did not help"
                if run.guard.rollbacks
                else "no checkpoint to go back to"
            )
            + ": lower optim.lr, use run.precision=fp32, and look at the keys in refused.jsonl"
        )
    log.warning("step %d: back to the weights of step %d; the data goes on", run.step, step)


def _note(run: Run, values: dict[str, float]) -> bool:
    """Metrics and evaluations that are due at this step, on every rank; whether an evaluation was the best so far."""
    settings, lead = run.recipe.run, distributed.rank() == 0
    if lead and (run.step % settings.log_every == 0 or run.step == run.total):
        run.log.append("metrics.jsonl", {"step": run.step, "seconds": round(run.seconds, 2), **values})
    due = [item for item in run.recipe.evals if (item.every and run.step % item.every == 0) or run.step == run.total]
    if not due:
        return False
    found = evals.evaluate_all(current_bundle(run), due)
    if lead:
        run.log.append("evals.jsonl", {"step": run.step, **found})
    name = settings.keep_best
    if name is None or name.partition("/")[0] not in [item.name for item in due]:
        return False
    if name not in found:
        raise ConfigError(f"run.keep_best={name!r} is no metric of the evaluations; there are: {', '.join(found)}")
    if run.best and found[name] <= run.best["value"]:
        return False
    run.best = {"metric": name, "step": run.step, "value": found[name]}
    return True


def _finish(run: Run, trained: Bundle) -> dict[str, Any]:
    bundle = save_bundle(trained, run.folder / "bundle")
    last = [row for row in run.log.rows("evals.jsonl") if row["step"] == run.step]
    metrics = {key: value for row in last for key, value in row.items() if key != "step"}
    summary = {
        "metrics": metrics,
        "train_seconds": round(run.seconds, 1),
        "steps": run.step,
        "refused_steps": run.guard.refused,
        "failed_saves": run.saver.failed,
        "samples": run.step * run.recipe.data.batch_size,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "quarantined": run.account["quarantined"],
        **({"best": run.best} if run.best else {}),
        "bundle": str(bundle),
    }
    run.log.write("summary.json", summary)
    return summary


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Remember signals instead of dying in the middle of a step; a second Ctrl-C acts at once."""
    caught: list[int] = []

    def remember(number: int, _frame: object) -> None:
        caught.append(number)
        if caught.count(signal.SIGINT) > 1:
            signal.default_int_handler(number, None)

    before = {number: signal.signal(number, remember) for number in STOPPING}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
