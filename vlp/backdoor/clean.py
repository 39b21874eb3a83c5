"""Cleaning a model that may hold a backdoor: tuned on trusted pairs, with a method that does not know the trigger.

No method removes every backdoor, and none of them can tell whether it did: `vlp eval --task backdoor` measures the
triggers one has, no other. Length, rate and augmentation are to be chosen by the accuracy on clean pictures alone;
whoever chooses them by the attack's success has chosen them for one trigger.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines.errors import ConfigError, MissingField
from data_pipelines.files import write_atomic
from data_pipelines.keep import load_keys
from vlp.backdoor import scan as scanning
from vlp.backdoor.trusted import doubtful
from vlp.bundle import Bundle, find_bundle
from vlp.evals import evaluate
from vlp.recipe import Recipe, apply_override, merge, validate

Settings = dict[str, Any]

VIEWS: Settings = {
    "flip": 0.5, "rotate": 20, "scale": 0.3, "shift": 0.1, "brightness": 0.3, "contrast": 0.3, "blur": 0.3, "erase": 0.5
}  # fmt: skip
"""Augmentation of the copies: strong, for weak copies leave the trigger as it is."""
PAINTED: Settings = {"overlay": 0.5, "patch": 0.2, "warp": 0.08}
"""Of the pictures that a model is to take for what it took them for without."""
TAUGHT = 20.0
"""Weight of the teacher beside plain CLIP."""
METHODS: dict[str, Settings] = {
    "finetune": {},
    "cleanclip": {
        "objective": {"name": "inmodal"},
        "data": {"views": 2, "texts": 2, "strong": VIEWS, "captions": {"eda": {}}},
    },
    "augmented": {"data": {"augment": {**VIEWS, "crop": 0.5}}},
    "distill": {
        "model": {"lock_text": True},
        "objective": {"name": "distill", "weight": TAUGHT, "student_sees": "second"},
        "data": {"views": 2, "strong": PAINTED},
    },
    "unlearn": {
        "model": {"lock_text": True},
        "objective": {"name": "unlearn", "taught": TAUGHT, "student_sees": "second", "changes": ["patch"]},
        "data": {"views": 2, "strong": PAINTED},
    },
    "supervised": {
        "model": {"lock_text": True},
        "data": {"captions": {"labels": 1.0, "alternative": 0.0, "with_labels": 0.0}},
    },
}
"""finetune: plain CLIP, the control that a method has to beat. cleanclip: Bansal et al. 2023, arXiv 2303.03323.
augmented: plain CLIP on strongly changed pictures. supervised: pictures to the names of their labels, text tower still.
distill: pictures under random textures, patches and warps are to be taken for what the model, as it was, takes them for
without (a teacher on trusted pictures, after Yoshida and Fujinoki 2020, AISec): what is painted on a picture, a trigger
too, no longer matters. unlearn: that, and the same under the patches that mislead the model most, sought as it learns.
"""
LENGTH: dict[str, tuple[int, float]] = {"distill": (600, 5e-4), "unlearn": (600, 6e-4)}
"""Method -> steps and rate where they are not given; others 300 and 1e-3. Chosen by clean accuracy alone."""
MOST_FLAGGED = 0.01
"""Share of the cleaning pairs that may look planted; more of them are no trusted pairs."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to clean."""

    method: str = "cleanclip"
    steps: int | None = None
    """None: the method's own."""
    lr: float | None = None
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        """Raise ConfigError for what cannot be meant."""
        if self.method not in METHODS:
            raise ConfigError(f"--method {self.method!r} is unknown; known: {', '.join(METHODS)}")

    def length(self) -> tuple[int, float]:
        """Steps and rate."""
        steps, lr = LENGTH.get(self.method, (300, 1e-3))
        return self.steps or steps, self.lr or lr

    def told(self) -> dict[str, Any]:
        """For the account, nothing left open."""
        steps, lr = self.length()
        return asdict(replace(self, steps=steps, lr=lr))


def recipe_of(
    bundle: Bundle, path: Path, data: Path, keep: Path | None, options: Options, overrides: Sequence[str] = ()
) -> Recipe:
    """The training that cleans: the bundle's own model, pictures and captions, the method's loss and views.

    Raises ConfigError for overrides that cannot be meant and for a bundle that does not say what it was trained with.
    """
    options.check()
    own: Mapping[str, Any] = bundle.provenance.recipe
    if not own:
        raise ConfigError(
            f"{path}: the bundle names no recipe that made it: `vlp train` one of your own with model.weights={path}"
        )
    ground = bundle.image.ground
    start = str(find_bundle(path))
    steps, lr = options.length()
    settings: Settings = {
        "description": f"{options.method} on {data}",
        "data": {
            "train": str(data), "image": own["data"]["image"], "captions": own["data"].get("captions", {}),
            "batch_size": options.batch_size, "threads": 1, **({"keep": str(keep)} if keep else {}),
        },
        "tokenizer": {"kind": "weights", "context_length": bundle.tokenizer.config.context_length},
        "model": {key: value for key, value in own["model"].items() if key in ("name", "config", "text_tower")}
        | {"weights": start},
        "objective": {"name": "clip"},
        "optim": {"lr": lr, "warmup": min(30, steps // 10)},
        "run": {"steps": steps, "seed": options.seed, "device": options.device, "save_every": 0, "loggers": []},
    }  # fmt: skip
    settings = merge(settings, METHODS[options.method])
    for name in ("augment", "strong"):
        if name in settings["data"]:
            settings["data"][name] = {**settings["data"][name], "ground": ground}
    for override in overrides:
        apply_override(settings, override)
    return validate(settings)


def trusted(data: Path, path: Path, bundle: Bundle, out: Path) -> tuple[Path, dict[str, Any]]:
    """(keep-list without the pairs that a scan flags and the most doubtful others, what the scan found).

    Raises ConfigError where the scan flags more than MOST_FLAGGED of them.
    """
    model = scanning.Model(path, bundle)
    found = scanning.scan(data, out, model, None, scanning.Options(), lambda count: None)
    if found["share"] > MOST_FLAGGED:
        raise ConfigError(
            f"--data {data}: {found['flagged']} of {found['pictures']} pairs look planted (see {out}): clean with "
            "others, or use them as they are with --as-is"
        )
    kept = load_keys(out / scanning.KEEP) - doubtful(bundle, data).keys()
    write_atomic(out / scanning.KEEP, lambda stream: stream.write("".join(f"{key}\n" for key in sorted(kept)).encode()))
    return out / scanning.KEEP, {**found, "left_out": found["pictures"] - len(kept)}


def accuracy(bundle: Bundle, data: Path) -> float:
    """Zero-shot accuracy over the labels of some shards, 0 to 1. Raises MissingField where they carry none."""
    found = evaluate(bundle, "zero-shot", data)
    if "top1" not in found:
        raise MissingField(f"--val {data}: zero-shot accuracy needs samples with labels")
    return float(found["top1"])
