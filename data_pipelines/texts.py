"""The training texts of one step, from random numbers drawn for the global batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.captions import (
    DRAWS,
    CaptionConfig,
    choose_phrases,
    compose,
    eda,
    one_sentence,
    own_caption,
    without_stop_words,
)
from data_pipelines.stream import Decoded

CAPTIONS, OWN, EDA, STOP = 11, 16, 17, 18
"""Purposes of the random numbers (see loader)."""


@dataclass(frozen=True, slots=True)
class Texts:
    """One text per sample, with the phrases it is made of and all that its picture is known by."""

    texts: list[str]
    phrases: list[tuple[str, ...]]
    known: list[tuple[str, ...]]


def draw_texts(
    samples: Sequence[Decoded],
    rows: Sequence[int],
    total: int,
    config: CaptionConfig,
    generator: Callable[[int], np.random.Generator],
    further: bool = False,
) -> Texts:
    """`rows`: positions of the samples among the `total` of the global batch. `generator(purpose)`: random numbers.

    `further`: the texts are not the first of their pictures, which matters to `captions.eda`.
    """
    captions = [sample.captions for sample in samples]
    if config.columns or config.sentence:
        draws = generator(OWN).random((total, 3))[rows]
        captions = [_with_own(sample, config, row) for sample, row in zip(samples, draws, strict=True)]
    draws = generator(CAPTIONS).random((total, DRAWS))[rows]
    phrases = [
        choose_phrases(texts, sample.labels, config, row)
        for texts, sample, row in zip(captions, samples, draws, strict=True)
    ]
    texts = [compose(chosen, config) for chosen in phrases]
    if config.stop_words:
        bare = generator(STOP).random(total)[rows] < config.stop_words
        texts = [without_stop_words(text) if cut else text for text, cut in zip(texts, bare, strict=True)]
    if config.eda:
        share = config.eda.extra if further else config.eda.first
        draws = generator(EDA).random((total, 2))[rows]
        texts = [
            eda(text, config.eda, np.random.default_rng(int(seed * 2**53))) if draw < share else text
            for text, (draw, seed) in zip(texts, draws, strict=True)
        ]
    known = [(*own, *sample.labels) for own, sample in zip(captions, samples, strict=True)]
    return Texts(texts, phrases, known)


def _with_own(
    sample: Decoded, config: CaptionConfig, draws: "np.ndarray[tuple[int], np.dtype[np.float64]]"
) -> tuple[str, ...]:
    """The captions of a sample, led by the one that this step takes for its own."""
    own = own_caption(sample.captions, sample.columns, config, float(draws[0]))
    return (one_sentence(own, config.sentence, draws[1:]), own, *(text for text in sample.captions if text != own))
