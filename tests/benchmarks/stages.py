"""Benches made of many commands: each is a stage, two run side by side, and what a stage printed is kept.

What is kept lies in the repository, so a bench that takes hours goes on where it stopped, in another session or on
another machine: of a stage that is known only what later stages read is made again. A stage is known by its command and
those of all before it; code that changes is not noticed, so a change that moves figures comes with an empty record.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench_kit import RESULTS, ROOT

from data_pipelines.files import cache_dir, write_atomic

Results = Mapping[str, Mapping[str, Any]]
"""Stage -> what it printed."""
DONE = "done.json"
PLACE = re.compile(r"\{([^{} ]+)\}")


@dataclass(frozen=True, slots=True)
class Stage:
    """One command; `{name}` in it is the folder of another stage, `{out}` its own."""

    name: str
    command: str
    script: str = ""
    """Module beside this one whose `main(*words)` prints one JSON object as its last line; empty: the words are
    those of `vlp`, and so is the object."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the stages that come before it."""
        return frozenset(PLACE.findall(self.command)) - {"out"}


class Runner:
    """Runs what is not known, `workers` stages side by side, one thread each."""

    def __init__(self, suite: str, stages: Sequence[Stage], workers: int, record: Path | None = None) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.workers = workers
        self.root = cache_dir() / "bench" / suite
        self.record = record or RESULTS / "stages" / f"{suite}.json"
        self._folders: dict[str, Path] = {}

    def folder(self, name: str) -> Path:
        """Of a stage: by its command and those of all before it."""
        if name not in self._folders:
            stage = self.stages[name]
            spoken = [stage.command, *(self.folder(other).name for other in sorted(stage.needs))]
            self._folders[name] = self.root / sha256("\n".join(spoken).encode()).hexdigest()[:16]
        return self._folders[name]

    def known(self) -> dict[str, dict[str, Any]]:
        """Stage -> what it printed, of those in the record."""
        told = json.loads(self.record.read_text()) if self.record.is_file() else {}
        by_digest = {row["stage"]: row["printed"] for row in told.get("rows", ())}
        return {name: by_digest[key] for name in self.stages if (key := self.folder(name).name) in by_digest}

    def open(self) -> list[str]:
        """Stages to run, in order: those that are not known, and those whose folders they need and that are gone."""
        known = self.known()
        wanted = [name for name in self.stages if name not in known]
        found = set(wanted)
        while wanted:
            for other in self.stages[wanted.pop()].needs:
                if other not in found and not (self.folder(other) / DONE).is_file():
                    found.add(other)
                    wanted.append(other)
        return [name for name in self.stages if name in found]

    def run(self) -> Results:
        """What every stage printed. Raises RuntimeError for one that failed, after those beside it have ended."""
        left = self.open()
        running: dict[Future[None], str] = {}
        began, count = time.monotonic(), len(left)
        with ThreadPoolExecutor(self.workers) as pool:
            while left or running:
                busy = {*left, *running.values()}
                ready = [name for name in left if not self.stages[name].needs & busy]
                for name in ready[: self.workers - len(running)]:
                    left.remove(name)
                    running[pool.submit(self._do, self.stages[name])] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    future.result()
                    self._note(name)
                    done, minutes = count - len(left) - len(running), (time.monotonic() - began) / 60
                    sys.stdout.write(f"{done} of {count} stages after {minutes:.0f} min: {name}\n")
                    sys.stdout.flush()
        return self.known()

    def _note(self, name: str) -> None:
        """Add what a stage printed to the record: plain values, and those of one level below."""
        printed = json.loads((self.folder(name) / DONE).read_text())
        told = json.loads(self.record.read_text()) if self.record.is_file() else {"rows": []}
        row = {"name": name, "stage": self.folder(name).name, "printed": _short(printed)}
        told["rows"] = [*(old for old in told["rows"] if old["stage"] != row["stage"]), row]
        lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in told["rows"])
        self.record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.record, lambda stream: stream.write(f'{{"rows": [\n{lines}\n]}}\n'.encode()))

    def _do(self, stage: Stage) -> None:
        out = self.folder(stage.name)
        shutil.rmtree(out, ignore_errors=True)  # what a stopped run left
        out.mkdir(parents=True)
        places = {name: str(self.folder(name)) for name in stage.needs} | {"out": str(out)}
        words = [PLACE.sub(lambda found: places.get(found[1], found[0]), word) for word in shlex.split(stage.command)]
        code = _apart(stage.script, words, out)
        printed = out.with_suffix(".stdout").read_text().strip()
        if code != 0:
            told = out.with_suffix(".stderr").read_text().strip()[-800:]
            raise RuntimeError(f"{stage.name}: `{stage.script or 'vlp'} {shlex.join(words)}` failed: {told}")
        write_atomic(out / DONE, lambda stream: stream.write(printed.splitlines()[-1].encode()))


def asked(suite: str, about: str | None, every: Callable[[int], Sequence[Stage]]) -> tuple[int, Runner, Results]:
    """What the command line of a bench asks for: (seeds, runner, what the stages printed); `every`: seeds -> stages."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--known", action="store_true", help="write the table of what is known, run nothing")
    options = parser.parse_args()
    stages = {stage.name: stage for stage in every(options.seeds)}  # seeds share some
    runner = Runner(suite, list(stages.values()), options.workers)
    return options.seeds, runner, runner.known() if options.known else runner.run()


def _short(printed: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in printed.items() if not isinstance(value, list | dict)}
    for part in printed.values():
        if isinstance(part, dict):
            plain |= {key: value for key, value in part.items() if not isinstance(value, list | dict)}
    own = {key: value for key, value in plain.items() if not (isinstance(value, str) and "/" in value)}  # no paths
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in own.items()}


def _apart(script: str, words: Sequence[str], out: Path) -> int:
    """The exit code of a command in a process of its own, which begins with torch already imported."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("forkserver")
    context.set_forkserver_preload(["vlp.train"])
    process = context.Process(target=_main, args=(script, list(words), str(out)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _main(script: str, words: list[str], out: str) -> None:
    os.chdir(ROOT)
    for number, name in ((1, ".stdout"), (2, ".stderr")):  # beside the folder: commands want theirs empty
        os.dup2(os.open(Path(out).with_suffix(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    if script:
        importlib.import_module(script).main(*words)
        return
    from vlp.cli import main

    sys.argv = ["vlp", *words, "--json"]
    main()
