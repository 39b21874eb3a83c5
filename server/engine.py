"""What the server asks of a model, and the engine that answers with a bundle through `vlp.infer`.

Preparing (decode, tokenize) and running are separate, so that one overlaps the other.
Suffixes: N items, D embedding width, L labels (in tokens_NL: text length), P prompts, C channels, H height, W width.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.errors import BadSample
from data_pipelines.images import open_header
from data_pipelines.preprocess import load_image
from data_pipelines.tokens import Tokenizer
from server.backends import Towers, lengths_of, plain_towers
from server.settings import Limits
from vlp import infer
from vlp.bundle import Bundle

Vectors = NDArray[np.float32]
"""ND, L2-normalised."""


class Engine(Protocol):
    """A loaded model. `prepare_*` may run in several threads at once, the other methods in one thread at a time."""

    @property
    def name(self) -> str:
        """What clients call the model."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""

    @property
    def created(self) -> int:
        """Seconds since the epoch."""

    @property
    def context(self) -> int:
        """Tokens of a text that the model reads, the marks at its ends included."""

    @property
    def backend(self) -> str:
        """What runs it."""

    def prepare_texts(self, texts: Sequence[str]) -> Tensor:
        """tokens_NL, cut to the model's context."""

    def overlong(self, texts: Sequence[str]) -> list[bool]:
        """Which texts the model's context cuts."""

    def prepare_image(self, data: bytes) -> Tensor:
        """pixels_CHW of the model's size. Raises BadSample."""

    def encode_texts(self, tokens_NL: Tensor) -> Vectors:
        """Embeddings of texts."""

    def encode_images(self, pixels_NCHW: Tensor) -> Vectors:
        """Embeddings of pictures."""

    def count_tokens(self, tokens_NL: Tensor) -> NDArray[np.int64]:
        """N: tokens of each text without padding."""

    def classify(self, images_ND: Vectors, prompts_PD: Vectors, labels: int) -> tuple[Vectors, Vectors]:
        """(probabilities_NL, cosines_NL) over labels whose prompts are averaged."""


class BundleEngine:
    """A bundle run by torch. Stateless between calls."""

    def __init__(self, bundle: Bundle, limits: Limits, name: str = "", towers: Towers | None = None) -> None:
        """`limits`: largest picture that is decoded. `name`: what clients call it, if not what the bundle says.

        `towers`: what runs it in place of `vlp.infer`.
        """
        self._towers = towers or plain_towers(bundle)
        self.backend = self._towers.name
        self.bundle = bundle
        self._limits = limits
        self.name = name or bundle.name
        self.dim = bundle.dim
        self.context = bundle.tokenizer.config.context_length
        self._patient: Tokenizer | None = None
        self.created = int(time.time())

    def prepare_texts(self, texts: Sequence[str]) -> Tensor:
        """tokens_NL."""
        return self.bundle.tokenizer(texts)

    def overlong(self, texts: Sequence[str]) -> list[bool]:
        """With a tokenizer that leaves room for one token more, made when it is first needed."""
        if self._patient is None:
            known = self.bundle.tokenizer
            config = known.config.model_copy(update={"context_length": self.context + 1})
            self._patient = Tokenizer(known.vocabulary, config)
        return [bool(count > self.context) for count in self.count_tokens(self._patient(texts))] if texts else []

    def prepare_image(self, data: bytes) -> Tensor:
        """pixels_CHW uint8."""
        check_picture(data, self._limits)
        return load_image(data, self.bundle.image, self._limits.pixels)

    def encode_texts(self, tokens_NL: Tensor) -> Vectors:
        """ND."""
        return self._towers.text(tokens_NL).numpy()

    def encode_images(self, pixels_NCHW: Tensor) -> Vectors:
        """ND."""
        return self._towers.image(pixels_NCHW).numpy()

    def count_tokens(self, tokens_NL: Tensor) -> NDArray[np.int64]:
        """Everything up to the last token that is not padding; the padding id may also occur as a word."""
        return lengths_of(self.bundle, tokens_NL).numpy()

    def classify(self, images_ND: Vectors, prompts_PD: Vectors, labels: int) -> tuple[Vectors, Vectors]:
        """Softmax with the model's own logit scale."""
        head_LD = infer.pool_prompts(torch.from_numpy(prompts_PD), labels)
        probabilities_NL, cosines_NL = infer.classify(self.bundle, torch.from_numpy(images_ND), head_LD)
        return probabilities_NL.numpy(), cosines_NL.numpy()


def check_picture(data: bytes, limits: Limits) -> None:
    """Look at a picture's header before anything is decoded. Raises BadSample."""
    width, height = open_header(data, limits.pixels).size
    if max(width, height) > limits.side:
        raise BadSample("too_many_pixels", f"{width} x {height}, longest side allowed {limits.side}")
