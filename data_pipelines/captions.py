"""Which words stand beside a picture in a training step: its own caption, an alternative, or some of its labels.

Every draw is arithmetic on random numbers handed in, so that it does not depend on ranks or threads.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError

DRAWS = 3
"""Random numbers in [0, 1) that one choice takes."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\s*\n\s*")

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a about all also am an and any are as at be because been but by can could did do does for from had has have "
        "he her here him his how i if in into is it its just me more most my nor of or our she should so some such "
        "than that the their them then there these they this those to too us very was we were what when where which "
        "while who whom why will with would you your",
    )
)
"""English words that say little of a picture; `no`, `up` or `under` say something."""


class EdaConfig(StrictModel):
    """Easy data augmentation of texts (Wei and Zou 2019, arXiv 1901.11196), without the synonyms: no word list.

    As there, a text undergoes one kind of change, drawn from those below that are not 0.
    """

    first: float = Field(0.0, ge=0, le=1)
    """Probability that the text itself is changed."""
    extra: float = Field(1.0, ge=0, le=1)
    """Probability that a further text of `data.texts` is changed."""
    swap: float = Field(0.1, ge=0, le=1)
    """Swaps of two words, as a share of the words."""
    delete: float = Field(0.1, ge=0, le=1)
    """Probability that a word goes; one always stays."""
    insert: float = Field(0.1, ge=0, le=1)
    """Words of the text put in again at another place, as a share of the words."""


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
    columns: dict[str, float] = {}
    """Column of the json member -> weight: the own caption is one of those the sample has; `caption` is its first."""
    sentence: float = Field(0.0, ge=0, le=1)
    """Probability that one sentence of the own caption stands for the whole."""
    stop_words: float = Field(0.0, ge=0, le=1)
    """Probability that words such as `the` and `of` are left out of a text (arXiv 2305.08675: 0.8)."""
    eda: EdaConfig | None = None

    @model_validator(mode="after")
    def _shares(self) -> "CaptionConfig":
        if not 0 <= self.alternative + self.labels + self.with_labels <= 1:
            raise ConfigError("data.captions: alternative + labels + with_labels must lie between 0 and 1")
        if any(weight <= 0 for weight in self.columns.values()):
            raise ConfigError(f"data.captions.columns: the weights {self.columns} must be positive")
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


def own_caption(captions: tuple[str, ...], columns: Mapping[str, Any], config: CaptionConfig, draw: float) -> str:
    """The caption of a sample by the weights of `config.columns`. `draw`: a number in [0, 1)."""
    first = {"caption": captions[0]} if captions else {}
    texts = {name: value for name, value in (first | dict(columns)).items() if isinstance(value, str) and value}
    found = [(texts[name], weight) for name, weight in config.columns.items() if name in texts]
    if not found:
        return captions[0] if captions else next(iter(texts.values()))
    bounds = np.cumsum([weight for _, weight in found])
    return found[int(np.searchsorted(bounds, draw * bounds[-1], "right"))][0]


def one_sentence(text: str, share: float, draws: NDArray[np.float64]) -> str:
    """One sentence or line of a text with probability `share`, else all of it. `draws`: two numbers in [0, 1).

    What holds no letter, as the number of a list's item, is no sentence.
    """
    sentences = [part for part in SENTENCE_END.split(text.strip()) if any(map(str.isalpha, part))]
    return sentences[int(draws[1] * len(sentences))] if draws[0] < share and sentences else text


def without_stop_words(text: str) -> str:
    """A text less its STOP_WORDS; all of it when nothing else is there."""
    return " ".join(word for word in text.split() if word.lower().strip(".,;:!?") not in STOP_WORDS) or text


def eda(text: str, config: EdaConfig, generator: np.random.Generator) -> str:
    """A text with words swapped, or deleted, or repeated elsewhere."""
    words = text.split()
    kinds = [kind for kind in ("swap", "insert", "delete") if getattr(config, kind)]
    if len(words) < 2 or not kinds:
        return text
    kind = kinds[int(generator.integers(len(kinds)))]
    if kind == "swap":
        for _ in range(_count(config.swap, len(words))):
            a, b = generator.choice(len(words), 2, replace=False)
            words[a], words[b] = words[b], words[a]
    elif kind == "insert":
        for word in generator.choice(words, _count(config.insert, len(words))).tolist():
            words.insert(int(generator.integers(len(words) + 1)), word)
    else:
        stay = generator.random(len(words)) >= config.delete
        stay[generator.integers(len(words))] = True
        words = [word for word, there in zip(words, stay, strict=True) if there]
    return " ".join(words)


def _count(share: float, words: int) -> int:
    """Words that a share of them makes: at least one, as in the paper."""
    return max(1, round(share * words))


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
