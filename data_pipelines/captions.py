"""Which words stand beside a picture in a training step: its own caption, an alternative, or some of its labels.

The draw is arithmetic on random numbers handed in, so that it does not depend on ranks or threads.
"""

import hashlib

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


def choose_caption(
    captions: tuple[str, ...], labels: tuple[str, ...], config: CaptionConfig, draws: NDArray[np.float64]
) -> str:
    """One text for a training step. `draws`: DRAWS numbers in [0, 1)."""
    text = captions[0]
    kind = draws[0]
    if kind < config.alternative:
        text = captions[int(draws[1] * len(captions))]
    elif labels and kind < config.alternative + config.labels + config.with_labels:
        count = 1 + int(draws[1] * min(config.max_labels, len(labels)))
        order = np.random.default_rng(int(draws[2] * 2**53)).permutation(len(labels))[:count]
        words = ", ".join(labels[i] for i in order)
        text = words if kind < config.alternative + config.labels else f"{text}, {words}"
    return config.prompt.format(text)


def caption_id(captions: tuple[str, ...]) -> int:
    """Number of a sample's own caption, equal for equal texts: such samples are no negatives of each other."""
    digest = hashlib.blake2b(captions[0].strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
