"""Class names, prompts and templates of the tasks that know labels."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from data_pipelines.errors import MissingField, PipelineError
from data_pipelines.ledger import Ledger
from data_pipelines.shard_set import ShardSet, Train
from data_pipelines.stream import stored
from vlp.evals._encode import Encoded
from vlp.torchvision_guard import ensure_torchvision

IMAGENET = "imagenet"


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Classes in the order of their numbers."""

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    """What stands for each class in a prompt: its name, or its synonyms."""
    numbers: dict[str | int, int]
    """Label of a sample, or class number of its `cls` member -> place in `names`."""

    def known(self, labels: Iterable[str | int]) -> list[int]:
        """Classes of a sample, in its order, each once; labels that the set lacks are left out."""
        return list(dict.fromkeys(self.numbers[label] for label in labels if label in self.numbers))


def label_set(named: dict[str, Sequence[str]]) -> LabelSet:
    """Class -> synonyms; a class without any stands for itself. Samples may carry either."""
    numbers: dict[str | int, int] = {}
    for number, (name, synonyms) in enumerate(named.items()):
        numbers |= {text: number for text in synonyms if text not in numbers and text not in named}
        numbers |= {name: number, number: number}
    return LabelSet(tuple(named), tuple(tuple(texts) or (name,) for name, texts in named.items()), numbers)


def _imagenet_labels() -> LabelSet:
    ensure_torchvision()
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES as NAMES

    # two names occur twice there: such a label means the first, a `cls` number is always clear
    numbers: dict[str | int, int] = {name: number for number, name in reversed([*enumerate(NAMES)])}
    return LabelSet(tuple(NAMES), tuple((name,) for name in NAMES), numbers | {n: n for n in range(len(NAMES))})


def read_labels(value: Any) -> Any:
    """A LabelSet from a list, {label: [synonyms]}, `imagenet`, or a file that holds one of the first two."""
    if value == IMAGENET:
        return _imagenet_labels()
    if isinstance(value, str | Path):
        path = Path(value)
        try:
            text = path.read_text(encoding="utf-8")
            value = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); give a file of labels, a list, or {IMAGENET}"
            ) from error
    if isinstance(value, list | tuple):
        if len(set(map(str, value))) < len(value):
            raise ValueError("a label occurs twice")
        value = dict.fromkeys(value, ())
    if not isinstance(value, dict) or not value:
        raise ValueError("holds no labels: one per line, a json list, or json {label: [synonyms]}")
    for name, texts in value.items():
        if not isinstance(name, str) or isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"label {name!r}: expected a text and a list of synonyms")
    return label_set(value)


Labels = Annotated[LabelSet, BeforeValidator(read_labels)]


def read_templates(value: Any) -> Any:
    """Templates from a list, a name (plain, imagenet, imagenet-simple), one template, or a file with one per line."""
    if isinstance(value, str | Path):
        value = _named_templates(str(value))
    if isinstance(value, list | tuple) and not all("{}" in str(template) for template in value):
        raise ValueError("every template needs {} in the place of the label")
    if not value:
        raise ValueError("at least one template is needed")
    return value


def _named_templates(name: str) -> list[str]:
    if name == "plain":
        return ["{}"]
    if name in (IMAGENET, f"{IMAGENET}-simple"):
        ensure_torchvision()
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        return [make("{}") for make in (OPENAI_IMAGENET_TEMPLATES if name == IMAGENET else SIMPLE_IMAGENET_TEMPLATES)]
    if "{}" in name:
        return [name]
    try:
        return [line for line in Path(name).read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"neither plain, {IMAGENET}, {IMAGENET}-simple, nor a template with {{}}, nor a file ({error})"
        ) from error


Templates = Annotated[tuple[str, ...], BeforeValidator(read_templates)]


def labels_of(encoded: Encoded, first: bool = False) -> LabelSet:
    """The labels that the samples carry, sorted; with `first`, only those that come first in a sample."""
    found = {label for labels in encoded.labels for label in (labels[:1] if first else labels)}
    names = sorted(found, key=lambda label: (isinstance(label, str), label))
    texts = tuple(map(str, names))
    return LabelSet(texts, tuple((text,) for text in texts), {label: number for number, label in enumerate(names)})


def label_sets(chosen: LabelSet | None, encoded: Encoded) -> tuple[LabelSet, LabelSet]:
    """(classes for one answer per picture, classes for all its labels): as chosen, else first labels and all labels."""
    return (chosen, chosen) if chosen else (labels_of(encoded, first=True), labels_of(encoded))


def labelled(encoded: Encoded, labels: LabelSet, data: Train | Path, column: str) -> tuple[list[int], list[list[int]]]:
    """(rows, their classes) of the pictures with a known label. Raises MissingField where no picture has a label."""
    if not any(encoded.labels):
        raise MissingField(f"{data}: no sample carries a label in {column!r}, which this task needs")
    known = [labels.known(found) for found in encoded.labels]
    rows = [row for row, numbers in enumerate(known) if numbers]
    if not rows:
        carried = ", ".join(labels_of(encoded).names[:5])
        wanted = ", ".join(labels.names[:5])
        raise PipelineError(f"{data}: no sample carries one of the labels {wanted} ...; they carry {carried} ...")
    return rows, [known[row] for row in rows]


def sole_labels(data: Path) -> list[str]:
    """Sorted labels of shards where every picture carries exactly one; none where they do not, or carry one alone."""
    found = {sample.labels for _, sample in stored(ShardSet(data), Ledger())}
    names = sorted(labels[0] for labels in found if len(labels) == 1)
    return names if 1 < len(names) == len(found) else []


def firsts(classes: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The first class of every picture alone."""
    return [numbers[:1] for numbers in classes]


def several(multi: bool | None, classes: Sequence[Sequence[int]]) -> bool:
    """Whether pictures count with all their labels: as asked, else where one carries more than one."""
    return any(len(numbers) > 1 for numbers in classes) if multi is None else multi
