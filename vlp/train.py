"""The trainer's loop: steps, metrics, evaluations, checkpoints, signals, and a bundle at the end."""

import logging
import math
import shlex
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
from vlp.checkpoint import checkpoints
from vlp.flops import device_peak, mfu
from vlp.frozen import FeatureLoader
from vlp.launch import local_ranks
from vlp.mirror import Mirror
from vlp.models import locking
from vlp.phases import Recorder, phase, recording
from vlp.recipe import Recipe, check_resumable, dump
from vlp.run import Run, current_bundle, prepare, restore, roll_back, save
from vlp.runlog import RunState, bar_note, environment, training_bar
from vlp.step import train_step

log = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
MAX_ROLLBACKS = 3
"""Times a run may go back before it has to get on well."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, what schedulers send, and what they send some time before that if asked to."""


class Interrupted(PipelineError):
    """The run was asked to stop; everything is saved."""

    def __init__(self, state: str, folder: Path, where: Mirror | Path, signal_number: int) -> None:
        command = shlex.join(["vlp", "train", str(folder / RECIPE), "--run-dir", str(where), "--resume"])
        super().__init__(f"stopped {state}; to continue: {command}")
        self.signal_number = signal_number


def train(
    recipe: Recipe, folder: Path, resume: bool = False, show: bool = True, mirror: Mirror | None = None
) -> dict[str, Any]:
    """Train a recipe into `folder`; the summary, empty on ranks above 0. Raises Interrupted on a signal, all saved.

    `mirror`: the store that `folder` is a copy of.
    """
    where = mirror or folder
    if not resume and (folder / "checkpoints").exists():
        raise ConfigError(f"{where} holds a run already: continue it with --resume, or choose another --run-dir")
    if distributed.env_rank() == 0:
        if mirror is not None and resume:
            mirror.fetch()
            if folder.is_dir():
                mirror.push()  # what an earlier run could not send
        folder.mkdir(parents=True, exist_ok=True)
        if resume and checkpoints(folder / "checkpoints") and (folder / RECIPE).is_file():
            check_resumable(recipe, folder / RECIPE)
        (folder / RECIPE).write_text(dump(recipe), encoding="utf-8")
    with (
        local_ranks(processes(recipe), folder, resume),
        distributed.left_at_the_end(),
        _signals(folder, where) as received,
    ):
        distributed.set_up(recipe.run.device)
        first = distributed.from_all_ranks(folder)[0]
        if mirror is None:  # with one, every machine has a copy of its own
            folder = first  # named by the clock, it is another one on every rank
        run = prepare(recipe, folder)
        lead = distributed.rank() == 0
        run.mirror = mirror
        if mirror is not None and lead:
            run.saver.after = mirror.push
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
            name = f"ledger-rank{rank}.json" if rank else "ledger.json"
            with run.log.tolerant(name):
                run.log.write(name, run.loader.ledger.report())
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
    received()  # from here on a signal waits for the end of a step
    if run.step:
        _evaluate(run)  # what was due when the run was stopped
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
            if distributed.rank() == 0 and (run.step % run.recipe.run.log_every == 0 or run.step == run.total):
                run.log.append("metrics.jsonl", {"step": run.step, "seconds": round(run.seconds, 2), **values})
            minutes = run.recipe.run.save_minutes
            late = bool(minutes) and time.monotonic() - saved > 60 * minutes
            stop, late = distributed.any_rank((bool(received()), late), run.device)
            last = run.step >= run.total
            due = stop or last or late or any(run.step % steps == 0 for steps in every)
            if due:  # before the evaluations: they may take long, or fail
                save(run, wait=stop or last)
                saved = time.monotonic()
            if stop:
                state, where = f"at step {run.step} and saved", run.mirror or run.folder
                raise Interrupted(state, run.folder, where, received() or signal.SIGTERM)
            if _evaluate_or_save(run, due):
                saved = time.monotonic()
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


def _evaluate_or_save(run: Run, saved: bool) -> bool:
    """Evaluations due at this step; saves the best so far, and before an error, unless that is done. Whether it did."""
    try:
        best = _evaluate(run)
    except PipelineError:  # raised on all ranks alike
        if not saved:
            save(run, wait=True)
        raise
    if best and not saved:
        save(run)
    return best and not saved


def _evaluate(run: Run) -> bool:
    """Evaluations due at this step, on every rank; whether one was the best so far.

    A resumed run may find those of its first step written down already.
    """
    due = [item for item in run.recipe.evals if (item.every and run.step % item.every == 0) or run.step == run.total]
    if not due:
        return False
    known = [row for row in run.log.rows("evals.jsonl") if row["step"] == run.step]
    known = distributed.from_all_ranks(known)[0]
    found = known[-1] if known else evals.evaluate_all(current_bundle(run), due)
    if distributed.rank() == 0 and not known:
        run.log.append("evals.jsonl", {"step": run.step, **found})
    name = run.recipe.run.keep_best
    if name is None or name.partition("/")[0] not in [item.name for item in due]:
        return False
    if name not in found:
        raise ConfigError(f"run.keep_best={name!r} is no metric of the evaluations; there are: {', '.join(found)}")
    if math.isnan(found[name]) or (run.best and found[name] <= run.best["value"]):
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
def _signals(folder: Path, where: Mirror | Path) -> Iterator[Callable[[], int]]:
    """Remember signals instead of dying in the middle of a step; a second Ctrl-C acts at once.

    Until the loop asks for the first time nothing can be lost, so a signal ends the run there and then.
    """
    caught: list[int] = []
    training = False

    def remember(number: int, _frame: object) -> None:
        caught.append(number)
        if caught.count(signal.SIGINT) > 1:
            signal.default_int_handler(number, None)
        if not training:
            raise Interrupted("before the first step", folder, where, number)

    def received() -> int:
        nonlocal training
        training = True
        return caught[0] if caught else 0

    before = {number: signal.signal(number, remember) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
