"""Detection-oriented pretraining and what is made of it: `make bench-detection`; results/detection.json, the README's.

Every stage is a command a user would type. Per seed: an image-level model of captions; from it, at equal steps, one
that goes on as before and one whose regions learn from the captions; both fine-tuned on boxes of the base categories;
and the same from a ViT with windows, with and without the shift. All are read on the test split of the composed set,
whose cut-outs and backgrounds no training has seen. No option was chosen by what is printed here.
"""

from dataclasses import dataclass
from pathlib import Path

from bench_kit import ROOT, render, write
from detection_rows import rows_of
from measure_detect import ratio_of
from stages import Stage, asked

SUITE = "detection"


@dataclass(frozen=True, slots=True)
class Bench:
    """What the stages are made of; the quick suite has one of micro sizes."""

    name: str
    shards: str
    """Command that writes pretrain, train, val, test into {out}."""
    image: str = "detection/image"
    """Recipes: of the image-level model, and those that follow."""
    pretrain: str = "detection/pretrain"
    finetune: str = "detection/finetune"
    vit: str = "detection/vit"
    """A ViT with windows that learns from captions by regions, from scratch."""
    vit_finetune: str = "detection/vit_finetune"
    more: str = ""
    """Overrides of every training."""
    steps: str = ""
    """Length of both continuations, where it is not the recipe's."""


FULL = Bench("composed", "shard detection-starter --out {out}")


def stages_of(bench: Bench, seed: int) -> list[Stage]:
    """All of a seed; names begin with it, but for the shards, which seeds share."""
    own = f"{bench.name}/{seed}"

    def train(name: str, recipe: str, split: str, more: str = "", start: str = "") -> Stage:
        words = f"train {recipe} run.seed={seed} --run-dir {{out}}/run data.train={{shards}}/{split} evals=[]"
        weights = f"model.weights={{{own}/{start}}}/run" if start else ""
        return Stage(f"{own}/{name}", " ".join(f"{words} {weights} {bench.more} {more}".split()))

    def read(name: str) -> Stage:
        return Stage(f"{own}/{name}/read", f"eval {{{own}/{name}}}/run --data {{shards}}/test --task detection")

    equal = f"run.steps={bench.steps}" if bench.steps else ""
    found = [
        Stage("shards", bench.shards),
        train("image", bench.image, "pretrain"),
        train("longer", bench.pretrain, "pretrain", f"{equal} objective.name=clip objective.mask=labels", "image"),
        train("regions", bench.pretrain, "pretrain", equal, "image"),
        read("longer"),
        read("regions"),
    ]
    for name in ("longer", "regions"):
        found += [train(f"{name}/tuned", bench.finetune, "train", start=name), read(f"{name}/tuned")]
    for name, shift in (("fixed", "false"), ("shifted", "true")):
        found += [
            train(name, bench.vit, "pretrain", f"objective.parts.window.shift={shift}"),
            train(f"{name}/tuned", bench.vit_finetune, "train", start=name),
            read(f"{name}/tuned"),
        ]
    return found


def every(seeds: int) -> list[Stage]:
    """All stages of the bench."""
    return [stage for seed in range(seeds) for stage in stages_of(FULL, seed)]


def main() -> None:
    """Run and write."""
    seeds, runner, results = asked(SUITE, __doc__, every)
    rows = rows_of(FULL.name, seeds, results)
    detector = runner.folder(f"{FULL.name}/0/regions/tuned") / "run"
    if detector.is_dir():  # by itself, when nothing else runs; elsewhere the row of the machine that had it stays
        rows.append(ratio_of(detector))
    result = write(SUITE, rows)
    page = Path(ROOT) / "README.md"
    page.write_text(render(page, result))


if __name__ == "__main__":
    main()
