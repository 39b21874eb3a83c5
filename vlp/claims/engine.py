"""Runs a claim: every arm with every seed, in processes of one torch thread side by side; what is done stays done.

A run's folder is named by all it depends on - its resolved recipe, the data, the code - so a claim that was stopped
goes on, claims with the same baseline share its runs, and changed code never meets old numbers.
"""

import ast
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import data_pipelines
import vlp
from data_pipelines.console import Advance, progress
from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.files import cache_dir, write_atomic
from vlp.claims import PLACE, Claim
from vlp.claims import data as claim_data
from vlp.objectives import base as objectives
from vlp.recipe import load_recipe, validate

DONE = "done.json"
"""What a finished run leaves: its numbers, and the seconds of one core that it took."""
LAST = 5
"""Lines of metrics.jsonl that the values of training are the mean of."""
SAVING_S = 60.0
"""What a training run may take to save when it is asked to stop."""
KEPT_DAYS = 14
"""Runs untouched for so long are removed when a claim is run."""


@dataclass(frozen=True, slots=True)
class Job:
    """One arm or step with one seed."""

    name: str
    seed: int
    folder: Path
    settings: Mapping[str, Any] | None
    """The whole recipe of an arm."""
    command: tuple[str, ...]
    """The command of a step."""
    needs: frozenset[Path]
    """Folders of the jobs that must be done before."""

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.name} with seed {self.seed}"

    @property
    def length(self) -> int:
        """For the progress bar: training steps."""
        return int(self.settings["run"].get("steps") or 1) if self.settings else 1


def plan(claim: Claim, seeds: int, places: Mapping[str, Path], on: str) -> list[Job]:
    """All jobs of a claim, each after those that it needs. `places`: data set -> its folder. Raises ConfigError."""
    return [job for seed in range(seeds) for job in _of_seed(claim, seed, places, on)]


def _of_seed(claim: Claim, seed: int, places: Mapping[str, Path], on: str) -> list[Job]:
    jobs: dict[str, Job] = {}
    open_names: list[str] = []

    def make(name: str) -> Job:
        if name in jobs:
            return jobs[name]
        if name in open_names:
            raise ConfigError(f"arms and steps need each other in a circle: {' -> '.join([*open_names, name])}")
        open_names.append(name)
        texts = [claim.steps[name]] if name in claim.steps else [*claim.common, *claim.arms[name]]
        named = {found for text in texts for found in PLACE.findall(text)} & (claim.arms.keys() | claim.steps.keys())
        others = {other: make(other).folder for other in sorted(named - {name})}
        texts = [_placed(text, others, places, on) for text in texts]
        settings = None if name in claim.steps else _settings(claim.recipe_of(name), texts, seed, places, on)
        spoken = json.dumps([settings, texts if settings is None else None, seed], sort_keys=True)
        code = code_digest(settings["objective"]["name"] if settings else None)
        digest = hashlib.sha256("\n".join((spoken, code, *map(str, places.values()))).encode()).hexdigest()
        folder = runs_folder() / digest[:16]
        command = () if settings else tuple(shlex.split(_placed(texts[0], {name: folder}, {}, on)))
        jobs[name] = Job(name, seed, folder, settings, command, frozenset(others.values()))
        open_names.pop()
        return jobs[name]

    for name in (*claim.steps, *claim.arms):
        make(name)
    return list(jobs.values())


def _settings(recipe: str, overrides: list[str], seed: int, places: Mapping[str, Path], on: str) -> dict[str, Any]:
    """The recipe of an arm as plain data: its data in the cache, one process, one thread, nothing but the last save."""
    always = [f"run.seed={seed}", "run.processes=1", "run.threads=1", "run.save_every=0", "run.loggers=[]"]
    plain = load_recipe(recipe, [*overrides, *always]).model_dump(mode="json")
    settings: dict[str, Any] = _everywhere(plain, places, on)
    return settings


def _everywhere(value: Any, places: Mapping[str, Path], on: str) -> Any:
    if isinstance(value, str):
        return _placed(value, {}, places, on)
    if isinstance(value, dict):
        return {_placed(key, {}, places, on): _everywhere(item, places, on) for key, item in value.items()}
    return [_everywhere(item, places, on) for item in value] if isinstance(value, list | tuple) else value


def _placed(text: str, folders: Mapping[str, Path], places: Mapping[str, Path], on: str) -> str:
    """A text with `{name}` and `shards/NAME` replaced by folders, and the test split by the one that is asked for."""
    text = PLACE.sub(lambda found: str(folders.get(found[1], found[0])), text)
    for name, folder in places.items():
        text = text.replace(f"shards/{name}/test", f"shards/{name}/{on}").replace(f"shards/{name}", str(folder))
    return text


def runs_folder() -> Path:
    """Where the runs of all claims lie."""
    return cache_dir() / "claims" / "runs"


@cache
def code_digest(objective: str | None = None) -> str:
    """sha256 over all modules and model configs that training, evaluation, curation and data consist of.

    `objective`: only this one is trained with, so that others count only where something of theirs is imported.
    """
    sources = _sources()
    idle = idle_objectives(objective, sources) if objective is not None else set()
    digest = hashlib.sha256()
    for name, content in sources.items():
        if name not in idle:
            digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def _sources() -> dict[str, bytes]:
    """Content of the files that count, by package and path."""
    found = {}
    for package in (data_pipelines, vlp):
        root = Path(package.__file__ or "").parent
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.json"))):
            name = path.relative_to(root).as_posix()
            if name.startswith(("commands/", "claims/")) and name != "commands/curate.py":  # which is a step of claims
                continue
            found[f"{root.name}/{name}"] = path.read_bytes()
    return found


def idle_objectives(used: str, sources: Mapping[str, bytes]) -> set[str]:
    """Files of objectives that neither `used` nor anything but objectives imports, directly or by way of others."""
    of = {f"vlp/objectives/{name}.py" for name in objectives.names()}
    reached = {f"vlp/objectives/{used}.py"}
    open_files = [name for name in sources if name.endswith(".py") and name not in of - reached]
    while open_files:
        new = _imports(sources[open_files.pop()]) & of - reached
        reached |= new
        open_files += new
    return of - reached


@cache
def _imports(source: bytes) -> frozenset[str]:
    """Everything imported that may be a module, as the path of its file; kept, for every objective asks for it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            package = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
            found |= {package.rstrip("."), *(package + alias.name for alias in node.names)}
    return frozenset(f"{name.replace('.', '/')}.py" for name in found)


def places_of(claim: Claim, show: bool) -> dict[str, Path]:
    """Data set -> folder, for those that the claim and its recipe name; written if need be."""
    texts = [*claim.common, *(text for arm in claim.arms.values() for text in arm), *claim.steps.values()]
    recipes = {claim.recipe_of(arm) for arm in claim.arms}
    spoken = "\n".join((*texts, *(json.dumps(load_recipe(recipe).model_dump(mode="json")) for recipe in recipes)))
    return {name: claim_data.prepared(name, show) for name in claim_data.data_sets() if f"shards/{name}" in spoken}


def run_jobs(jobs: list[Job], workers: int, show: bool, title: str) -> dict[tuple[str, int], dict[str, Any]]:
    """(arm or step, seed) -> what its DONE says; all that is not done is done, those without open needs first.

    Raises PipelineError with the arm, the seed and the reason when one fails, KeyboardInterrupt when asked to stop.
    """
    _forget_old()
    every = {job.folder: job for job in jobs}
    waiting = {folder: job for folder, job in every.items() if not (folder / DONE).is_file()}
    steps = {folder: job.length for folder, job in every.items()}
    if waiting:
        with _pool(min(workers, len(waiting))) as pool, progress(title, sum(steps.values()), show, "steps") as bar:
            bar(sum(steps[folder] for folder in every if folder not in waiting))
            _work_off(waiting, pool, bar)
    found = {(job.name, job.seed): json.loads((job.folder / DONE).read_text(encoding="utf-8")) for job in jobs}
    for job in jobs:
        os.utime(job.folder)
    return found


def _work_off(waiting: dict[Path, Job], pool: ProcessPoolExecutor, bar: Advance) -> None:
    running: dict[Future[None], Job] = {}
    shown: dict[Path, int] = dict.fromkeys(waiting, 0)
    while waiting or running:
        open_folders = waiting.keys() | {job.folder for job in running.values()}
        for job in [job for job in waiting.values() if not job.needs & open_folders]:
            work = (str(job.folder), job.settings, job.command)
            running[pool.submit(do, *work)] = waiting.pop(job.folder)
        finished = wait(running, timeout=1, return_when=FIRST_COMPLETED).done
        for future in finished:
            job = running.pop(future)
            try:
                future.result()
            except BrokenProcessPool as error:
                raise PipelineError(
                    f"{job.title}: its process died, perhaps for want of memory; try --workers 1"
                ) from error
            except PipelineError as error:
                raise PipelineError(f"{job.title}: {error} (run {job.folder})") from error
            bar(job.length - shown[job.folder])
        for job in running.values():
            step = _steps_done(job)
            bar(step - shown[job.folder])
            shown[job.folder] = step


def _steps_done(job: Job) -> int:
    path = job.folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    whole = [line for line in lines if line.endswith("}")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def do(folder: str, settings: Mapping[str, Any] | None, command: tuple[str, ...]) -> None:
    """One job, in a process of the pool: trains an arm, or runs the command of a step; writes DONE last.

    Another claim that is being run may be at the same job: then this one waits and takes its result.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path / DONE).is_file():
            return
        began = sum(os.times()[:4])
        found = _train(path, settings) if settings is not None else _step(path, command)
        content = {"numbers": found, "seconds": round(sum(os.times()[:4]) - began, 1)}
        write_atomic(path / DONE, lambda stream: stream.write(json.dumps(content, indent=2).encode()))


def _train(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    from vlp.runlog import RunLog
    from vlp.train import train

    resume = (folder / "checkpoints").exists()
    summary = train(validate(settings), folder, resume=resume, show=False)
    shutil.rmtree(folder / "checkpoints")  # the bundle holds the weights
    last = RunLog(folder).rows("metrics.jsonl")[-LAST:]
    numbers = {f"train/{key}": statistics.fmean(float(row[key]) for row in last if key in row) for key in last[-1]}
    return numbers | {key: float(value) for key, value in summary["metrics"].items()}


def _step(folder: Path, command: tuple[str, ...]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "vlp", *command, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise PipelineError(f"`vlp {shlex.join(command)}` failed: {done.stderr.strip()[-500:]}")
    return dict(_numbers(json.loads(done.stdout.strip().splitlines()[-1])))


def _numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a JSON object, nested keys joined by slashes."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _numbers(item, f"{prefix}{key}/")
        elif isinstance(item, int | float):
            yield f"{prefix}{key}", float(item)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that import torch once and then do one job after the other; when this one stops, runs save and stop."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("forkserver")
    context.set_forkserver_preload(["vlp.train"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker)
    try:
        yield pool
    except BaseException:
        _stop(active_children())
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


def _stop(children: Sequence[BaseProcess]) -> None:
    """A training run saves first; what does not end is killed: one that died with the pool's lock blocks it."""
    for child in children:
        child.terminate()
    until = time.monotonic() + SAVING_S
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
        child.kill()


def begin_worker() -> None:
    """A process of the pool leaves Ctrl-C to its run, and does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _forget_old() -> None:
    root = runs_folder()
    limit = time.time() - KEPT_DAYS * 86400
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.stat().st_mtime < limit:
            shutil.rmtree(folder)
