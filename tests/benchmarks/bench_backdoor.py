"""Attacks and defences against each other: `make bench-backdoor`; results/backdoor.json and the README's table.

Every stage is a command a user would type, or a count of what such commands left; see `stages`. Per seed: a clean twin,
a reference trained on other pictures, and for every trigger poisoned shards, a model, a scan, a model trained without
what the scan removed, cleaned models, an audit and a guard. Seeds differ in target, pattern, victims and training;
further clean models are audited so that as many clean as poisoned ones are. But for the scans of emoji, no option was
chosen by what is printed here; CHANGELOG says on which trials options were chosen. The table holds what is known: all
seeds of a trigger whose stages are done.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from backdoor_rows import rows_of
from bench_kit import ROOT, render, write
from stages import Stage, asked

TRIGGERS = ("badnet", "blended", "stripes", "wanet", "sig", "label-consistent")
METHODS = {"finetune": "--steps 1200", "cleanclip": "", "unlearn": ""}
"""Ways of cleaning. Plain fine-tuning, the control, takes more than twice the steps of the others."""
REMOVED = 0.05


@dataclass(frozen=True, slots=True)
class Bench:
    """A set of pictures to attack."""

    name: str
    shards: dict[str, str]
    """Stage -> command that writes shards into {out}."""
    train: str
    """Folders: pictures to poison; trusted ones, to clean with; and those that successes are counted on."""
    trusted: str
    test: str
    recipe: str
    poisons: int
    targets: tuple[str, ...]
    """Of the seeds in turn."""
    triggers: tuple[str, ...]
    templates: tuple[str, ...]
    column: str = "labels"
    """Where a test picture says what it is."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the triggers that are not at their usual strength."""
    audited: int = 10
    """Clean models that are audited: twins, references, further twins."""
    scan: str = ""
    audit: str = ""
    """Further words of these commands."""

    @property
    def named(self) -> str:
        """Words that tell the scripts which column it is; none for the usual one."""
        return "" if self.column == "labels" else f"--column {self.column} "


FASHION = Bench(
    "fashion", {"shards": "shard fashion-mnist --out {out}"}, "{shards}/train", "{shards}/val", "{shards}/test",
    "backdoor/fashion", 250, ("bag", "trouser", "sandal"), TRIGGERS,
    ("a photo of a {}", "a grey photo of a {}", "a {} on a black ground", "{}"),
)  # fmt: skip
"""Templates are those of the captions."""
EMOJI = Bench(
    "emoji",
    {
        f"emoji/{part}": f"shard emoji --vendors {vendors} --out {{out}}/shards"
        for part, vendors in (("train", "google,twitter"), ("trusted", "google-2017"), ("test", "fluent"))
    },
    "{emoji/train}/shards", "{emoji/trusted}/shards", "{emoji/test}/shards",
    "backdoor/emoji", 56, ("pizza", "guitar", "rose"), ("badnet", "blended", "sig"), ("{}",), column="caption",
    options={"badnet": "--size 0.33", "blended": "--strength 0.4"}, audited=11,
    scan=" --method copies --method reference --method layers --smooth 32",
    audit=" --labels tests/benchmarks/emoji_labels.txt --templates {}",
)  # fmt: skip
"""Few pictures of many things; what is trusted, and what is tested on, is drawn in a style of its own. Audits
look at ten names of 805, the targets among them. How scans look was chosen with the poisons of seed 0 known, and those
of seeds 1 and 2 not."""
BENCHES = (FASHION, EMOJI)


def stages_of(bench: Bench, seed: int) -> list[Stage]:
    """All of a seed; names begin with it, but for the shards, which seeds share."""
    own = f"{bench.name}/{seed}"
    clean = [
        *(_audit(bench, f"{own}/{name}") for name in ("reference", "twin")),
        _judged(f"{own}/reference", f"{own}/twin"),
        _judged(f"{own}/twin", f"{own}/reference"),
    ]
    return [
        *(Stage(name, command) for name, command in bench.shards.items()),
        _model(bench, seed, "reference", bench.trusted),
        *_twin(bench, seed),
        Stage(f"{own}/twin/scan", _scan(bench, own, f"{{{own}/twin/shards}}/shards", "twin")),
        *clean,
        *(stage for trigger in bench.triggers for stage in cell(bench, seed, trigger)),
    ]


def further(bench: Bench, seeds: int) -> list[Stage]:
    """Clean models beyond those of the seeds, and their audits."""
    found = []
    for seed in range(seeds, bench.audited - seeds):
        own = f"{bench.name}/{seed}"
        found += [
            *_twin(bench, seed),
            _audit(bench, f"{own}/twin"),
            _judged(f"{own}/twin", f"{bench.name}/0/reference"),
        ]
    return found


def cell(bench: Bench, seed: int, trigger: str) -> list[Stage]:
    """All about one trigger with one seed."""
    own = f"{bench.name}/{seed}"
    name = f"{own}/{trigger}"
    data, truth = f"{{{name}/shards}}/shards", f"{{{name}/shards}}/truth.json"
    weak = f"--surrogate {{{own}/reference}}/run --bound 0.2 --mix 0.5" if trigger == "label-consistent" else ""
    more = bench.options.get(trigger, weak)
    arms = [f"{arm}={{{name}/{arm}}}/run" for arm in ("poisoned", "scanned", *METHODS)]
    guarded = f"{{{name}/poisoned}}/run {{{name}/guard}}/guard {bench.test} {truth}"
    return [
        _poisoned(bench, seed, trigger, trigger, bench.poisons, more),
        _model(bench, seed, f"{trigger}/poisoned", data),
        Stage(f"{name}/scan", _scan(bench, own, data, f"{trigger}/poisoned", f"--remove {REMOVED}")),
        Stage(f"{name}/found", f"{{{name}/scan}}/scan {truth}", "measure_scan"),
        _model(bench, seed, f"{trigger}/scanned", data, f"data.keep={{{name}/scan}}/scan/keep.txt"),
        *(
            Stage(
                f"{name}/{method}",
                f"clean {{{name}/poisoned}}/run --data {bench.trusted} --method {method} --as-is --seed {seed} "
                f"--out {{out}}/run {more}".strip(),
            )
            for method, more in METHODS.items()
        ),
        Stage(
            f"{name}/arms",
            f"{bench.named}{bench.test} {truth} {shlex.quote(json.dumps(bench.templates))} {' '.join(arms)} "
            f"control={{{own}/twin}}/run",
            "measure_arms",
        ),
        _audit(bench, name, "poisoned"),
        _judged(name, f"{own}/reference"),
        Stage(f"{name}/guard", f"guard {{{name}/poisoned}}/run --data {bench.trusted} --out {{out}}/guard"),
        Stage(f"{name}/flags", bench.named + guarded, "measure_guard"),
    ]  # fmt: skip


def _model(bench: Bench, seed: int, name: str, data: str, more: str = "") -> Stage:
    text = f"train {bench.recipe} run.seed={seed} --run-dir {{out}}/run data.train={data} {more}"
    return Stage(f"{bench.name}/{seed}/{name}", text.strip())


def _poisoned(bench: Bench, seed: int, name: str, trigger: str, count: int, more: str = "") -> Stage:
    target = bench.targets[seed % len(bench.targets)]
    text = f"poison {bench.train} --trigger {trigger} --target {target} --count {count} --seed {seed} {more}"
    return Stage(f"{bench.name}/{seed}/{name}/shards", f"{text} --out {{out}}/shards --truth {{out}}/truth.json")


def _twin(bench: Bench, seed: int) -> list[Stage]:
    data = f"{{{bench.name}/{seed}/twin/shards}}/shards"
    return [_poisoned(bench, seed, "twin", "badnet", 0), _model(bench, seed, "twin", data)]


def _scan(bench: Bench, own: str, data: str, model: str, more: str = "") -> str:
    clean = f"--reference {{{own}/reference}}/run --trusted {bench.trusted}"
    return f"scan {data} --bundle {{{own}/{model}}}/run {clean}{bench.scan} {more} --out {{out}}/scan"


def _audit(bench: Bench, name: str, model: str = "") -> Stage:
    place = f"{{{name}/{model}}}" if model else f"{{{name}}}"
    return Stage(f"{name}/audit", f"audit {place}/run --data {bench.trusted}{bench.audit} --out {{out}}/audit")


def _judged(name: str, clean: str) -> Stage:
    """What the audit comes to beside that of a clean model."""
    return Stage(f"{name}/judged", f"{{{name}/audit}}/audit {{{clean}/audit}}/audit", "measure_audit")


def every(seeds: int) -> list[Stage]:
    """All stages of the bench."""
    found = [stage for bench in BENCHES for seed in range(seeds) for stage in stages_of(bench, seed)]
    return found + [stage for bench in BENCHES for stage in further(bench, seeds)]


def main() -> None:
    """Run and write."""
    seeds, _, results = asked("backdoor", __doc__, every)
    rows = [
        row
        for bench in BENCHES
        for row in rows_of(bench.name, seeds, bench.audited, bench.triggers, tuple(METHODS), results)
    ]
    result = write("backdoor", rows, fresh=True)
    page = ROOT / "README.md"
    page.write_text(render(page, result))


if __name__ == "__main__":
    main()
