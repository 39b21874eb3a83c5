"""Attacks and defences against each other: `make bench-backdoor`; results/backdoor.json and the README's table.

Every stage is a command a user would type, on one core, two side by side; what a stage printed is kept in its folder,
so that a run that was stopped goes on where it was. Per seed: a clean twin, a reference trained on other pictures, and
for every trigger poisoned shards, a model, a scan, a model trained without what the scan removed, cleaned models, an
audit and a guard. Seeds differ in target, pattern, victims and training. No option was chosen by what is printed here;
CHANGELOG says on which trials options were chosen.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from backdoor_rows import Results, rows_of
from bench_kit import ROOT, render, write

from data_pipelines.files import cache_dir, write_atomic

TRIGGERS = ("badnet", "blended", "stripes", "wanet", "sig", "label-consistent")
TARGETS = ("bag", "trouser", "sandal")
"""Of the seeds in turn."""
METHODS = ("finetune", "cleanclip", "unlearn")
REMOVED = 0.05
DONE = "done.json"
PLACE = re.compile(r"\{([^{}]+)\}")
PROMPTS = """'templates=["a photo of a {}", "a grey photo of a {}", "a {} on a black ground", "{}"]'"""
"""Those of the captions."""


@dataclass(frozen=True, slots=True)
class Bench:
    """A set of pictures to attack."""

    name: str
    shards: str
    """Command that writes train, val, test into {out}."""
    recipe: str
    poisons: int
    targets: tuple[str, ...]


FASHION = Bench("fashion", "shard fashion-mnist --out {out}", "backdoor/fashion", 250, TARGETS)


@dataclass(frozen=True, slots=True)
class Stage:
    """One command; `{name}` in it is the folder of another stage, `{out}` its own."""

    name: str
    command: str
    vlp: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """Names of the stages that come before it."""
        return frozenset(PLACE.findall(self.command)) - {"out", ""}


def stages_of(bench: Bench, seed: int) -> list[Stage]:
    """All of a seed; names begin with it, but for the shards, which seeds share."""
    target = bench.targets[seed % len(bench.targets)]
    train = f"train {bench.recipe} run.seed={seed} --run-dir {{out}}/run"
    own = f"{bench.name}/{seed}"

    def model(name: str, data: str, more: str = "") -> Stage:
        return Stage(f"{own}/{name}", f"{train} data.train={data} {more}".strip())

    def poisoned(name: str, trigger: str, count: int, more: str = "") -> Stage:
        text = f"poison {{shards}}/train --trigger {trigger} --target {target} --count {count} --seed {seed} {more}"
        return Stage(f"{own}/{name}", f"{text} --out {{out}}/shards --truth {{out}}/truth.json")

    found = [
        Stage("shards", bench.shards),
        model("reference", "{shards}/val"),
        poisoned("twin/shards", "badnet", 0),
        model("twin", f"{{{own}/twin/shards}}/shards"),
        Stage(f"{own}/twin/scan", _scan(own, f"{{{own}/twin/shards}}/shards", "twin")),
        Stage(f"{own}/twin/audit", f"audit {{{own}/twin}}/run --data {{shards}}/val --out {{out}}/audit"),
    ]
    for trigger in TRIGGERS:
        weak = f"--surrogate {{{own}/reference}}/run --bound 0.2" if trigger == "label-consistent" else ""
        name = f"{own}/{trigger}"
        data = f"{{{name}/shards}}/shards"
        found += [
            poisoned(f"{trigger}/shards", trigger, bench.poisons, weak),
            model(f"{trigger}/poisoned", data),
            Stage(f"{name}/scan", _scan(own, data, f"{trigger}/poisoned", f"--remove {REMOVED}")),
            model(f"{trigger}/scanned", data, f"data.keep={{{name}/scan}}/scan/keep.txt"),
            *(
                Stage(
                    f"{name}/{method}",
                    f"clean {{{name}/poisoned}}/run --data {{shards}}/val --method {method} --as-is --seed {seed} "
                    "--out {out}/run",
                )
                for method in METHODS
            ),
            Stage(f"{name}/audit", f"audit {{{name}/poisoned}}/run --data {{shards}}/val --out {{out}}/audit"),
            Stage(f"{name}/guard", f"guard {{{name}/poisoned}}/run --data {{shards}}/val --out {{out}}/guard"),
            *(
                Stage(f"{name}/eval/{arm}", _eval(own, name, arm)) for arm in ("poisoned", "scanned", *METHODS)
            ),
            Stage(
                f"{name}/eval/guard",
                f"{{{name}/poisoned}}/run {{{name}/guard}}/guard {{shards}}/test {{{name}/shards}}/truth.json",
                vlp=False,
            ),
        ]  # fmt: skip
    return found


def _scan(own: str, data: str, model: str, more: str = "") -> str:
    return f"scan {data} --bundle {{{own}/{model}}}/run --reference {{{own}/reference}}/run {more} --out {{out}}/scan"


def _eval(own: str, name: str, arm: str) -> str:
    return (
        f"eval {{{name}/{arm}}}/run --data {{shards}}/test --task backdoor --set control={{{own}/twin}}/run "
        f"--set attacks=[{{{name}/shards}}/truth.json] --set {PROMPTS}"
    )


class Runner:
    """Runs what is not done, two stages side by side."""

    def __init__(self, stages: list[Stage], workers: int) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.workers = workers
        self.root = cache_dir() / "bench" / "backdoor"
        self._folders: dict[str, Path] = {}

    def folder(self, name: str) -> Path:
        """Of a stage: by its command and those of all before it."""
        if name not in self._folders:
            stage = self.stages[name]
            spoken = [stage.command, *(self.folder(other).name for other in sorted(stage.needs))]
            self._folders[name] = self.root / hashlib.sha256("\n".join(spoken).encode()).hexdigest()[:16]
        return self._folders[name]

    def run(self) -> Results:
        """What every stage printed. Raises RuntimeError for one that failed, after those beside it have ended."""
        left = {name for name in self.stages if not (self.folder(name) / DONE).is_file()}
        running: dict[Future[None], str] = {}
        began, count = time.monotonic(), len(left)
        with ThreadPoolExecutor(self.workers) as pool:
            while left or running:
                busy = left | set(running.values())
                ready = [name for name in self.stages if name in left and not self.stages[name].needs & busy]
                for name in ready[: self.workers - len(running)]:
                    left.discard(name)
                    running[pool.submit(self._do, self.stages[name])] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    future.result()
                    done, minutes = count - len(left) - len(running), (time.monotonic() - began) / 60
                    sys.stdout.write(f"{done} of {count} stages after {minutes:.0f} min: {name}\n")
                    sys.stdout.flush()
        return {name: json.loads((self.folder(name) / DONE).read_text()) for name in self.stages}

    def _do(self, stage: Stage) -> None:
        out = self.folder(stage.name)
        shutil.rmtree(out, ignore_errors=True)  # what a stopped run left
        out.mkdir(parents=True)
        places = {name: str(self.folder(name)) for name in stage.needs} | {"out": str(out)}
        words = [PLACE.sub(lambda found: places.get(found[1], found[0]), word) for word in shlex.split(stage.command)]
        start = [sys.executable, *(["-m", "vlp"] if stage.vlp else [str(Path(__file__).with_name("measure_guard.py"))])]
        done = subprocess.run(
            [*start, *words, *(["--json"] if stage.vlp else [])],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        (out / "stderr.txt").write_text(done.stderr)
        if done.returncode != 0:
            raise RuntimeError(f"{stage.name}: `vlp {shlex.join(words)}` failed: {done.stderr.strip()[-800:]}")
        found = done.stdout.strip().splitlines()[-1]
        write_atomic(out / DONE, lambda stream: stream.write(found.encode()))


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))))
    options = parser.parse_args()
    stages = {stage.name: stage for seed in range(options.seeds) for stage in stages_of(FASHION, seed)}
    runner = Runner(list(stages.values()), options.workers)
    results = runner.run()
    result = write("backdoor", rows_of(FASHION.name, options.seeds, TRIGGERS, METHODS, results, runner.folder))
    page = ROOT / "README.md"
    page.write_text(render(page, result))


if __name__ == "__main__":
    main()
