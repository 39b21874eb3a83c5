"""Attacks and defences against each other: `make bench-backdoor`; results/backdoor.json and the README's table.

Every stage is a command a user would type, or a count of what such commands left; see `stages`. Per seed: a clean twin,
a reference trained on other pictures, and for every trigger poisoned shards, a model, a scan, a model trained without
what the scan removed, cleaned models, an audit and a guard. Seeds differ in target, pattern, victims and training;
further clean models are audited so that as many clean as poisoned ones are. No option was chosen by what is printed
here; CHANGELOG says on which trials options were chosen. The table holds what is known: all seeds of a trigger whose
stages are done.
"""

import json
import shlex
from dataclasses import dataclass

from backdoor_rows import rows_of
from bench_kit import ROOT, render, write
from stages import Stage, asked

TRIGGERS = ("badnet", "blended", "stripes", "wanet", "sig", "label-consistent")
TARGETS = ("bag", "trouser", "sandal")
"""Of the seeds in turn."""
METHODS = {"finetune": "--steps 1200", "cleanclip": "", "unlearn": ""}
"""Ways of cleaning. Plain fine-tuning, the control, takes more than twice the steps of the others."""
REMOVED = 0.05
AUDITED = 10
"""Clean models that are audited: twins, references, further twins."""
TEMPLATES = ("a photo of a {}", "a grey photo of a {}", "a {} on a black ground", "{}")
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


def stages_of(bench: Bench, seed: int) -> list[Stage]:
    """All of a seed; names begin with it, but for the shards, which seeds share."""
    own = f"{bench.name}/{seed}"
    return [
        Stage("shards", bench.shards),
        _model(bench, seed, "reference", "{shards}/val"),
        *_twin(bench, seed),
        Stage(f"{own}/twin/scan", _scan(own, f"{{{own}/twin/shards}}/shards", "twin")),
        *(_audit(f"{own}/{name}") for name in ("reference", "twin")),
        _judged(f"{own}/reference", f"{own}/twin"),
        _judged(f"{own}/twin", f"{own}/reference"),
        *(stage for trigger in TRIGGERS for stage in cell(bench, seed, trigger)),
    ]


def further(bench: Bench, seeds: int) -> list[Stage]:
    """Clean models beyond those of the seeds, and their audits."""
    found = []
    for seed in range(seeds, AUDITED - seeds):
        own = f"{bench.name}/{seed}"
        found += [*_twin(bench, seed), _audit(f"{own}/twin"), _judged(f"{own}/twin", f"{bench.name}/0/reference")]
    return found


def cell(bench: Bench, seed: int, trigger: str) -> list[Stage]:
    """All about one trigger with one seed."""
    own = f"{bench.name}/{seed}"
    name = f"{own}/{trigger}"
    data, truth = f"{{{name}/shards}}/shards", f"{{{name}/shards}}/truth.json"
    weak = f"--surrogate {{{own}/reference}}/run --bound 0.2 --mix 0.5" if trigger == "label-consistent" else ""
    arms = [f"{arm}={{{name}/{arm}}}/run" for arm in ("poisoned", "scanned", *METHODS)]
    return [
        _poisoned(bench, seed, trigger, trigger, bench.poisons, weak),
        _model(bench, seed, f"{trigger}/poisoned", data),
        Stage(f"{name}/scan", _scan(own, data, f"{trigger}/poisoned", f"--remove {REMOVED}")),
        Stage(f"{name}/found", f"{{{name}/scan}}/scan {truth}", "measure_scan"),
        _model(bench, seed, f"{trigger}/scanned", data, f"data.keep={{{name}/scan}}/scan/keep.txt"),
        *(
            Stage(
                f"{name}/{method}",
                f"clean {{{name}/poisoned}}/run --data {{shards}}/val --method {method} --as-is --seed {seed} "
                f"--out {{out}}/run {more}".strip(),
            )
            for method, more in METHODS.items()
        ),
        Stage(
            f"{name}/arms",
            f"{{shards}}/test {truth} {shlex.quote(json.dumps(TEMPLATES))} {' '.join(arms)} "
            f"control={{{own}/twin}}/run",
            "measure_arms",
        ),
        _audit(name, "poisoned"),
        _judged(name, f"{own}/reference"),
        Stage(f"{name}/guard", f"guard {{{name}/poisoned}}/run --data {{shards}}/val --out {{out}}/guard"),
        Stage(f"{name}/flags", f"{{{name}/poisoned}}/run {{{name}/guard}}/guard {{shards}}/test {truth}",
              "measure_guard"),
    ]  # fmt: skip


def _model(bench: Bench, seed: int, name: str, data: str, more: str = "") -> Stage:
    text = f"train {bench.recipe} run.seed={seed} --run-dir {{out}}/run data.train={data} {more}"
    return Stage(f"{bench.name}/{seed}/{name}", text.strip())


def _poisoned(bench: Bench, seed: int, name: str, trigger: str, count: int, more: str = "") -> Stage:
    target = bench.targets[seed % len(bench.targets)]
    text = f"poison {{shards}}/train --trigger {trigger} --target {target} --count {count} --seed {seed} {more}"
    return Stage(f"{bench.name}/{seed}/{name}/shards", f"{text} --out {{out}}/shards --truth {{out}}/truth.json")


def _twin(bench: Bench, seed: int) -> list[Stage]:
    data = f"{{{bench.name}/{seed}/twin/shards}}/shards"
    return [_poisoned(bench, seed, "twin", "badnet", 0), _model(bench, seed, "twin", data)]


def _scan(own: str, data: str, model: str, more: str = "") -> str:
    clean = f"--reference {{{own}/reference}}/run --trusted {{shards}}/val"
    return f"scan {data} --bundle {{{own}/{model}}}/run {clean} {more} --out {{out}}/scan"


def _audit(name: str, model: str = "") -> Stage:
    place = f"{{{name}/{model}}}" if model else f"{{{name}}}"
    return Stage(f"{name}/audit", f"audit {place}/run --data {{shards}}/val --out {{out}}/audit")


def _judged(name: str, clean: str) -> Stage:
    """What the audit comes to beside that of a clean model."""
    return Stage(f"{name}/judged", f"{{{name}/audit}}/audit {{{clean}/audit}}/audit", "measure_audit")


def every(seeds: int) -> list[Stage]:
    """All stages of the bench."""
    return [stage for seed in range(seeds) for stage in stages_of(FASHION, seed)] + further(FASHION, seeds)


def main() -> None:
    """Run and write."""
    seeds, _, results = asked("backdoor", __doc__, every)
    rows = rows_of(FASHION.name, seeds, AUDITED, TRIGGERS, tuple(METHODS), results)
    result = write("backdoor", rows, fresh=True)
    page = ROOT / "README.md"
    page.write_text(render(page, result))


if __name__ == "__main__":
    main()
