"""Class numbers of samples from their labels: the fields `label_ids` and `multi_labels` of a batch."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ConfigDict
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from data_pipelines.stream import Decoded


class LabelConfig(StrictModel):
    """Where labels come from and how they are numbered."""

    model_config = ConfigDict(ignored_types=(cached_property,))

    names: tuple[str, ...] | Path
    """Classes in the order of their numbers, or a file: one name per line, or a json list or {name: number}."""
    column: str = "labels"
    """`labels`, `cls`, or a column of the json member that holds a name, a number, or a list of them."""
    multi: bool = False
    """Also give all labels of a sample as a row of zeros and ones."""

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Name -> class number. Raises ConfigError."""
        names = _read(self.names) if isinstance(self.names, Path) else self.names
        numbers = dict(names) if isinstance(names, dict) else {name: number for number, name in enumerate(names)}
        if not numbers or (isinstance(names, Sequence) and len(numbers) < len(names)):
            raise ConfigError(f"data.labels.names: {str(self.names)[:80]} is empty or names a class twice")
        return numbers


def _read(path: Path) -> list[str] | dict[str, int]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line]
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.labels.names: {path} cannot be read ({error})") from error
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict) and all(type(number) is int and number >= 0 for number in content.values()):
        return content
    raise ConfigError(f"data.labels.names: {path} holds neither a list of names nor {{name: number}}")


def class_numbers(sample: Decoded, config: LabelConfig) -> list[int]:
    """Numbers of the classes of a sample that are known, in its order."""
    value = sample.labels if config.column == "labels" else sample.columns.get(config.column)
    values = value if isinstance(value, list | tuple) else [value]
    numbers = config.numbers
    known = set(numbers.values())
    found = [item if isinstance(item, int) and item in known else numbers.get(str(item), -1) for item in values]
    return [number for number in found if number >= 0]


def label_fields(samples: Sequence[Decoded], config: LabelConfig) -> dict[str, Tensor]:
    """`label_ids` B (the first known label, else -1) and, if asked for, `multi_labels` BK of zeros and ones."""
    rows = [class_numbers(sample, config) for sample in samples]
    fields = {"label_ids": torch.tensor([row[0] if row else -1 for row in rows], dtype=torch.int64)}
    if config.multi:
        fields["multi_labels"] = torch.zeros(len(rows), max(config.numbers.values()) + 1, dtype=torch.uint8)
        for target, row in zip(fields["multi_labels"], rows, strict=True):
            target[row] = 1
    return fields
