"""Class and cluster numbers of samples: the fields `label_ids`, `multi_labels` and `cluster_ids` of a batch."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from data_pipelines.sampler import Numbers
from data_pipelines.shard_set import ShardSet
from data_pipelines.sidecar import Sidecar, load_sidecar
from data_pipelines.stream import Decoded


class LabelConfig(StrictModel):
    """Where labels come from and how they are numbered."""

    model_config = ConfigDict(ignored_types=(cached_property,))

    names: tuple[str, ...] | Path | None = None
    """Classes in the order of their numbers, or a file: one name per line, or a json list or {name: number}. With
    `sidecar` they may be left out: its distinct labels, sorted."""
    column: str = "labels"
    """`labels`, `cls`, or a column of the json member that holds a name, a number, or a list of them."""
    sidecar: Path | None = None
    """Parquet with the columns `key` and `column`: labels that stand for those of the shards, in texts as well."""
    multi: bool = False
    """Also give all labels of a sample as a row of zeros and ones."""

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Name -> class number. Raises ConfigError."""
        names = read_names(self.names, "data.labels.names") if isinstance(self.names, Path) else self.names
        if names is None:
            names = () if self.table is None else self.table.texts
        numbers = dict(names) if isinstance(names, dict) else {name: number for number, name in enumerate(names)}
        if not numbers or (isinstance(names, Sequence) and len(numbers) < len(names)):
            raise ConfigError(f"data.labels.names: {str(self.names)[:80]} is empty or names a class twice")
        return numbers

    @cached_property
    def known(self) -> frozenset[int]:
        """All class numbers."""
        return frozenset(self.numbers.values())

    @cached_property
    def table(self) -> Sidecar | None:
        """Labels by key. Raises ConfigError."""
        return load_sidecar(self.sidecar, self.column) if self.sidecar else None

    @property
    def classes(self) -> int:
        """Width of `multi_labels`: one more than the highest number."""
        return max(self.numbers.values()) + 1


def read_names(path: Path, setting: str) -> list[str] | dict[str, int]:
    """Names of classes from a file: one per line, or a json list or {name: number}. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error})") from error
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict) and all(type(number) is int and number >= 0 for number in content.values()):
        return content
    raise ConfigError(f"{setting}: {path} holds neither a list of names nor {{name: number}}")


def class_numbers(sample: Decoded, config: LabelConfig) -> list[int]:
    """Numbers of the classes of a sample that are known, in its order."""
    stored = config.column == "labels" or config.sidecar is not None
    return known_numbers(sample.labels if stored else sample.columns.get(config.column), config)


def known_numbers(value: Any, config: LabelConfig) -> list[int]:
    """Class numbers of a name, a number or a list of them, as far as they are known."""
    values = value if isinstance(value, list | tuple) else [value]
    numbers = config.numbers
    found = [item if isinstance(item, int) and item in config.known else numbers.get(str(item), -1) for item in values]
    return [number for number in found if number >= 0]


def label_fields(samples: Sequence[Decoded], config: LabelConfig) -> dict[str, Tensor]:
    """`label_ids` B (the first known label, else -1) and, if asked for, `multi_labels` BK of zeros and ones."""
    rows = [class_numbers(sample, config) for sample in samples]
    fields = {"label_ids": torch.tensor([row[0] if row else -1 for row in rows], dtype=torch.int64)}
    if config.multi:
        fields["multi_labels"] = torch.zeros(len(rows), config.classes, dtype=torch.uint8)
        for target, row in zip(fields["multi_labels"], rows, strict=True):
            target[row] = 1
    return fields


def cluster_fields(samples: Sequence[Decoded], table: Sidecar) -> dict[str, Tensor]:
    """`cluster_ids` BS, S the longest list of the file, padded with -1."""
    ids = torch.full((len(samples), table.width), -1, dtype=torch.int64)
    for target, found in zip(ids, table.find([sample.key for sample in samples]), strict=True):
        target[: len(found)] = torch.from_numpy(found)
    return {"cluster_ids": ids}


def numbers_of_shard(shards: ShardSet, shard: int, labels: LabelConfig | None, clusters: Sidecar | None) -> Numbers:
    """What a sampler arranges the samples of a shard by: `clusters` if given, else the classes that a batch shows."""
    if clusters is not None:
        return Numbers.of(clusters.find(_keys(shards, shard)))
    assert labels is not None
    if labels.table is not None:
        values: list[Any] = [labels.table.find_texts(key) for key in _keys(shards, shard)]
    else:
        values = shards.column(shard, labels.column)
    rows = [known_numbers(value, labels) for value in values]
    return Numbers.of(rows if labels.multi else [row[:1] for row in rows])


def check_sidecar(table: Sidecar, shards: ShardSet, setting: str) -> None:
    """Raise ConfigError where a sidecar has not one key of the data; remote data is taken on trust."""
    if not any(shard.fetch for shard in shards.shards):
        table.check_known((_keys(shards, shard) for shard in range(len(shards.shards))), setting)


def _keys(shards: ShardSet, shard: int) -> list[str]:
    return [key or "" for key in shards.column(shard, "key")]
