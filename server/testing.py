"""For tests: an engine that answers at once, or fails as a test wants it to."""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.errors import BadSample
from server.engine import Vectors


class FakeEngine:
    """Answers at once, or does what a test needs: wait, fail, end its thread, answer NaN."""

    name, dim, created, context, backend = "fake", 4, 1_700_000_000, 8, "none"

    def __init__(self) -> None:
        self.mood = "well"
        self.gate = threading.Event()
        self.gate.set()

    def prepare_texts(self, texts: Sequence[str]) -> Tensor:
        """Lengths of the texts."""
        return torch.tensor([[len(text), 0] for text in texts])

    def overlong(self, texts: Sequence[str]) -> list[bool]:
        """None is."""
        return [False] * len(texts)

    def prepare_image(self, data: bytes) -> Tensor:
        """A small picture; bytes that begin with `bad` are none."""
        if data.startswith(b"bad"):
            raise BadSample("not_an_image", "/a/path/that/must/not/leak")
        return torch.full((3, 2, 2), len(data), dtype=torch.uint8)

    def encode_texts(self, tokens_NL: Tensor) -> Vectors:
        """Halves."""
        return self._answer(len(tokens_NL))

    def encode_images(self, pixels_NCHW: Tensor) -> Vectors:
        """Halves."""
        return self._answer(len(pixels_NCHW))

    def _answer(self, count: int) -> Vectors:
        assert self.gate.wait(20)
        if self.mood == "fails":
            raise RuntimeError("secret words from /a/path")
        if self.mood == "ends":
            raise SystemExit
        return np.full((count, 4), np.nan if self.mood == "nan" else 0.5, np.float32)

    def count_tokens(self, tokens_NL: Tensor) -> NDArray[np.int64]:
        """One each."""
        return np.ones(len(tokens_NL), np.int64)

    def classify(self, images_ND: Vectors, prompts_PD: Vectors, labels: int) -> tuple[Vectors, Vectors]:
        """Infinity, which no JSON can hold."""
        found = np.full((len(images_ND), labels), np.inf, np.float32)
        return found, found
