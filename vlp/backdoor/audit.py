"""Is a model backdoored, for which label, with which trigger? Trigger inversion for every label, then who stands out.

The smallest change of each kind is sought for every label (`vlp.backdoor.inversion`). Sizes are compared as
logarithms, for what counts is how many times smaller one is: the score of a label is its distance below the median
in robust standard deviations (1.4826 x the median absolute deviation), one kind at a time. A score above the kind's
threshold and clearly ahead of the next makes the model suspicious. Some labels are easier to reach than others in any
model; where the audit of a clean model of the same task is given, sizes are also told by those found there, so that a
label counts that is easier than it should be. What does not stand out is not proven harmless: a trigger of another
kind, or one label among few, may go unseen, and the account says what was tried.
Suffixes: N pictures, C channels, H, W rows and columns, L labels, D embedding width.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import BadSample, ConfigError, PipelineError
from data_pipelines.images import MAX_PIXELS
from data_pipelines.ledger import Ledger
from data_pipelines.shard_set import ShardSet, Train
from data_pipelines.stream import decode, stored
from vlp.backdoor.chain import read_json
from vlp.backdoor.inversion import GOAL, KINDS, STEPS, Found, Victim, invert, make_victim
from vlp.bundle import Bundle
from vlp.evals._encode import Encoder
from vlp.evals._labels import LabelSet, Templates, label_set
from vlp.infer import TEMPLATES, make_prompts

FORMAT = 1
AUDIT = "audit.json"
"""The account, in its folder."""
PICTURES = 512
"""Pictures that searches use, spread over the shards."""
LEAD = 0.75
"""By which it must be ahead of the next label. Some labels are easily reached in any model, and such have company; so
several targets that one trigger kind leads to equally easily do not stand out from each other."""
NARROWEST = 0.2
"""Least spread of the logarithms that scores are counted in: where most labels could not be reached at all their
sizes are equal, and a label a few per cent below is no outlier."""
FEWEST_LABELS = 5
"""With fewer, no label can stand out from the others."""
CONSISTENCY = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""


Sizes = Mapping[str, Sequence[float]]
"""Kind -> smallest change found for each label."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The label that stands out most, in one kind of change."""

    suspicious: bool
    score: float
    kind: str
    label: int
    beside: bool
    """Whether the sizes were told by those of a clean model."""


@dataclass(frozen=True, slots=True)
class Account:
    """What an audit found. `found` goes kind by kind, then label by label."""

    labels: tuple[str, ...]
    pictures: int
    found: dict[str, list[Found]]
    seconds: float
    victim: Victim
    reference: Sizes = field(default_factory=dict)
    """Sizes found in a clean model, if one was audited."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What the audit was made of, for the account: model, shards, options."""

    @property
    def sizes(self) -> Sizes:
        """Of what was found."""
        return {kind: [item.size for item in row] for kind, row in self.found.items()}

    @property
    def scores(self) -> dict[str, list[float]]:
        """Of the labels, beside a clean model where there is one."""
        return {kind: outliers(row, self.reference.get(kind)) for kind, row in self.sizes.items()}

    @property
    def top(self) -> Finding:
        """What stands out, else the highest score."""
        return judge(self.sizes, self.reference)

    def verdict(self) -> str:
        """In words."""
        count, kinds, top = len(self.labels), ", ".join(self.found), self.top
        if not top.suspicious:
            return f"no target stands out; tested {count} labels with these kinds of change: {kinds}"
        found = self.found[top.kind][top.label]
        return (
            f"suspicious: {self.labels[top.label]!r} stands out (score {top.score:.1f}"
            f"{' beside a clean model' if top.beside else ''}): "
            f"{describe(found)} makes {found.success:.0%} of other pictures look like it; "
            f"tested {count} labels with these kinds of change: {kinds}"
        )

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        top, beside = self.top, self.scores
        alone = {kind: outliers(row) for kind, row in self.sizes.items()}
        rows = [
            {
                "label": name, "kind": kind, "score": round(alone[kind][number], 3),
                **({"beside": round(beside[kind][number], 3)} if self.reference else {}),
                "size": found[number].size, "reached": found[number].reached, "success": found[number].success,
            }
            for kind, found in self.found.items() for number, name in enumerate(self.labels)
        ]  # fmt: skip
        return {
            "format": FORMAT, "suspicious": top.suspicious, "verdict": self.verdict(),
            "target": self.labels[top.label] if top.suspicious else None, "kind": top.kind if top.suspicious else None,
            "score": round(top.score, 3), "beside": top.beside,
            "threshold": {kind: KINDS[kind].threshold for kind in self.found}, "lead": LEAD, "goal": GOAL,
            "labels": len(self.labels), "kinds": list(self.found), "pictures": self.pictures,
            "seconds": round(self.seconds, 1), "rows": rows, **self.origin,
        }  # fmt: skip


def describe(found: Found) -> str:
    """The change in words."""
    if found.kind == "patch":
        return f"a patch of {found.size:.1%} of the area, anywhere,"
    if found.kind == "warp":
        return f"a warp of {found.size:.1%} of the side in the mean"
    what = "lines" if found.kind == "lines" else "an overlay"
    return f"{what} of {255 * found.size:.1f} of 255 grey levels in the mean square"


def audit(
    bundle: Bundle, data: Train | Path, labels: LabelSet | None = None, templates: Templates = TEMPLATES,
    steps: int = STEPS, seed: int = 0, begin: Callable[[int], Callable[[int], None]] = lambda total: lambda step: None,
    reference: Path | None = None,
) -> Account:  # fmt: skip
    """Search for every label, default those that the pictures carry. `begin` is told of the number of steps.

    `reference`: folder of the account of a clean model. Raises ConfigError for too few labels or pictures, and for a
    reference of others; PipelineError for shards that cannot be read.
    """
    if steps < 1:
        raise ConfigError(f"--steps {steps}: at least 1 is needed; default {STEPS}")
    pixels_NCHW, carried = pictures(bundle, data)
    labels = labels or label_set(dict.fromkeys(carried, ()))
    if len(labels.names) < FEWEST_LABELS:
        raise ConfigError(
            f"--labels: {len(labels.names)} labels ({', '.join(labels.names) or 'the shards carry none'}); at least "
            f"{FEWEST_LABELS} are needed for one to stand out: give a file with one per line"
        )
    known = read_sizes(reference, labels.names) if reference else {}
    started = time.monotonic()
    head_LD = Encoder(bundle).prompts([make_prompts(texts, templates) for texts in labels.texts])
    victim = make_victim(bundle, pixels_NCHW, head_LD)
    advance = begin(len(KINDS) * len(head_LD) * steps)
    found = {
        kind: [invert(victim, target, kind, steps, seed, advance) for target in range(len(head_LD))] for kind in KINDS
    }
    return Account(labels.names, len(pixels_NCHW), found, time.monotonic() - started, victim, known)


def read_sizes(folder: Path, labels: Sequence[str]) -> Sizes:
    """Sizes of an account that was written, in the order of `labels`. Raises ConfigError for one of other labels."""
    rows = read_json(folder / AUDIT, "--reference", ("rows", "made_of"))["rows"]
    found = {kind: {row["label"]: float(row["size"]) for row in rows if row["kind"] == kind} for kind in KINDS}
    for kind, sizes in found.items():
        if sizes.keys() != set(labels):
            raise ConfigError(
                f"--reference {folder}: {kind} was sought for {', '.join(sizes) or 'no label'}; needed are "
                f"{', '.join(labels)}: audit the clean model with the same labels"
            )
    return {kind: [sizes[label] for label in labels] for kind, sizes in found.items()}


def judge(sizes: Sizes, reference: Sizes) -> Finding:
    """The label that stands out most, from the others or from what a clean model's sizes (empty: none) let expect.

    That a label is the easiest means nothing where it is so in the clean model, too: then only the latter counts.
    """
    looks = []
    for kind, row in sizes.items():
        known = reference.get(kind)
        if known is None or row.index(min(row)) != known.index(min(known)):
            looks.append((kind, outliers(row), KINDS[kind].threshold, False))
        if known is not None:
            looks.append((kind, outliers(row, known), KINDS[kind].beside, True))
    found = [
        Finding(stands_out(scores, threshold), max(scores), kind, scores.index(max(scores)), beside)
        for kind, scores, threshold, beside in looks
    ]
    return max(found, key=lambda item: (item.suspicious, item.score))


def outliers(sizes: Sequence[float], reference: Sequence[float] | None = None) -> list[float]:
    """How far each size lies below the median, in robust deviations of the logarithms; `reference`: by how many times
    each is smaller than there."""
    told = [a / b for a, b in zip(sizes, reference, strict=True)] if reference else sizes
    logs = torch.tensor([math.log(size) for size in told], dtype=torch.float64)
    middle = logs.quantile(0.5)
    spread = max(NARROWEST, CONSISTENCY * float((logs - middle).abs().quantile(0.5)))
    scores: list[float] = ((middle - logs) / spread).tolist()
    return scores


def stands_out(scores: Sequence[float], threshold: float) -> bool:
    """Whether the highest score is above the threshold and ahead of the next by LEAD."""
    second, first = sorted(scores)[-2:]
    return first > threshold and first - second >= LEAD


def pictures(bundle: Bundle, data: Train | Path) -> tuple[Tensor, list[str]]:
    """(PICTURES of the shards at equal distances, NCHW of the model's size; labels that they carry first, sorted)."""
    shards, ledger = ShardSet(data), Ledger()
    numbers = range(0, len(shards), max(1, len(shards) // PICTURES))[:PICTURES]
    found = []
    for place, sample in stored(shards, ledger, numbers):
        try:
            found.append(decode(sample, bundle.image, MAX_PIXELS, captions=False))
        except BadSample as error:
            ledger.bad(error, place)
        else:
            ledger.good(place.shard)
    if not found:
        raise PipelineError(f"{data}: not one picture can be used ({dict(ledger.quarantined)})")
    return torch.stack([item.pixels for item in found]), sorted({str(item.labels[0]) for item in found if item.labels})
