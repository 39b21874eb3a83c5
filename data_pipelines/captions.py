"""Which words stand beside a picture in a training step: its own caption, an alternative, or some of its labels.

The draw is arithmetic on random numbers handed in, so that it does not depend on ranks or threads.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError

DRAWS = 3
"""Random numbers in [0, 1) that one choice takes."""


class CaptionConfig(StrictModel):
    """Shares of the kinds of text; what they leave of 1 goes to the sample's own (first) caption."""

    alternative: float = 0.0
    """One of all captions of the sample, uniformly."""
    labels: float = 0.0
    """A random subset of the labels, joined by commas."""
    with_labels: float = 0.0
    """The own caption followed by a random subset of the labels."""
    max_labels: int = 3
    prompt: str = "{}"
    """Template around the text."""

    @model_validator(mode="after")
    def _shares(self) -> "CaptionConfig":
        if not 0 <= self.alternative + self.labels + self.with_labels <= 1:
            raise ConfigError("data.captions: alternative + labels + with_labels must lie between 0 and 1")
        return self


def choose_phrases(
    captions: tuple[str, ...], labels: tuple[str, ...], config: CaptionConfig, draws: NDArray[np.float64]
) -> tuple[str, ...]:
    """The phrases that make up one training text. `draws`: DRAWS numbers in [0, 1)."""
    kind = draws[0]
    if kind < config.alternative:
        return (captions[int(draws[1] * len(captions))],)
    if not labels or kind >= config.alternative + config.labels + config.with_labels:
        return captions[:1]
    count = 1 + int(draws[1] * min(config.max_labels, len(labels)))
    order = np.random.default_rng(int(draws[2] * 2**53)).permutation(len(labels))[:count]
    chosen = tuple(labels[i] for i in order)
    return chosen if kind < config.alternative + config.labels else (captions[0], *chosen)


def compose(phrases: tuple[str, ...], config: CaptionConfig) -> str:
    """The training text of some phrases."""
    return config.prompt.replace("{}", ", ".join(phrases))


@lru_cache(maxsize=1 << 16)
def phrase_id(phrase: str) -> int:
    """Positive number of a phrase, equal for equal texts whatever their case and margins."""
    digest = hashlib.blake2b(phrase.strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def pad_ids(rows: Sequence[Sequence[str]], width: int) -> NDArray[np.int64]:
    """Phrase numbers, one row each, cut or padded with -1 to `width`."""
    table = np.full((len(rows), width), -1, dtype=np.int64)
    for row, phrases in zip(table, rows, strict=True):
        numbers = [phrase_id(phrase) for phrase in phrases[:width]]
        row[: len(numbers)] = numbers
    return table
