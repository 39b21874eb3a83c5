"""The contract between trainer and objectives, and the machinery they share.

Suffixes: B samples (of all ranks, once gathered), D embedding width.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

import vlp.objectives
from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import ConfigError

Coupling = Literal["global", "local", "stateful"]
"""global: needs the features of all ranks. local: a mean over samples. stateful: carries queues or averages."""


@dataclass(frozen=True, slots=True)
class Dims:
    """What an objective may need to know to build its own parameters."""

    embed: int
    """D, width of the shared embedding."""
    init_logit_scale: float
    """Logarithm of the scale the model starts with."""


@dataclass(frozen=True, slots=True)
class Features:
    """What an objective's encode step returns. The trainer gathers every tensor over the ranks along the first axis."""

    image_BD: Tensor
    text_BD: Tensor
    phrase_ids_BP: Tensor | None = None
    """Numbers of all captions and labels of a sample, its own caption first, padded with -1."""
    text_phrase_ids_BQ: Tensor | None = None
    """Numbers of the phrases in its text, padded with -1."""

    def map(self, move: Any) -> "Features":
        """The same features with `move` applied to every tensor."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: move(value) for name, value in values.items() if value is not None})

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return [value for item in fields(self) if (value := getattr(self, item.name)) is not None]

    @staticmethod
    def cat(parts: "Sequence[Features]") -> "Features":
        """Features of several parts of a batch, one after the other."""
        columns = iter(zip(*(part.tensors() for part in parts), strict=True))
        return parts[0].map(lambda _: torch.cat(next(columns)))


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The scalar to minimise and its named parts, for the log."""

    loss: Tensor
    parts: Mapping[str, Tensor]


class Encoder(Protocol):
    """What an objective asks of a model; every open_clip model answers it."""

    logit_scale: nn.Parameter

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """BCHW float to BD."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """BL int64 to BD."""


class Objective(Protocol):
    """What `build` returns: an nn.Module with two steps."""

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Forward both towers for what the loss needs. Pixels are normalised already."""

    def __call__(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the features of all ranks; `logit_scale` is the model's, as a factor."""


def names() -> list[str]:
    """All objectives: the modules of this folder that are neither private nor this one."""
    found = (module.name for module in pkgutil.iter_modules(vlp.objectives.__path__))
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def load(settings: Mapping[str, Any]) -> tuple[Any, StrictModel]:
    """(module, its validated Config) of `{"name": ..., **options}`. Raises ConfigError."""
    options = dict(settings)
    name = options.pop("name", None)
    if name not in names():
        raise ConfigError(f"objective.name: {name!r} is unknown; known: {', '.join(names())}")
    module = importlib.import_module(f"vlp.objectives.{name}")
    try:
        return module, module.Config.model_validate(options)
    except ValidationError as error:
        known = {"": sorted(module.Config.model_fields)}
        raise ConfigError("\n".join(f"objective.{line}" for line in explain(error, known).splitlines())) from error


def gathered_logits(features: Features, logit_scale: Tensor) -> Tensor:
    """BB scaled cosines, rows images, columns texts, in float32 whatever the towers computed in."""
    return logit_scale.float() * (features.image_BD.float() @ features.text_BD.float().T)


def equal_captions(phrase_ids_BP: Tensor) -> Tensor:
    """BB bool: pairs of samples with equal own captions."""
    own_B = phrase_ids_BP[:, 0]
    return own_B[:, None] == own_B[None, :]


def true_texts(phrase_ids_BP: Tensor, text_phrase_ids_BQ: Tensor) -> Tensor:
    """BB bool: text j says nothing but captions and labels of picture i, so it is true of that picture as well."""
    distinct_U, where_BQ = text_phrase_ids_BQ.unique(return_inverse=True)
    place_BP = torch.searchsorted(distinct_U, phrase_ids_BP).clamp_(max=len(distinct_U) - 1)
    row, column = (distinct_U[place_BP] == phrase_ids_BP).nonzero(as_tuple=True)
    known_BU = (distinct_U < 0).repeat(len(phrase_ids_BP), 1)
    known_BU[row, place_BP[row, column]] = True
    true_BB: Tensor = known_BU[:, where_BQ].all(dim=2)
    return true_BB


def mask_pairs(logits_BB: Tensor, pairs_BB: Tensor) -> Tensor:
    """-inf at the given pairs, which are then no negatives of each other; the diagonal stays."""
    others = ~torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    return logits_BB.masked_fill(pairs_BB & others, float("-inf"))


def info_nce(logits_BB: Tensor, image_weight: float = 0.5, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, image-to-text part, text-to-image part) of the two-way cross-entropy with the diagonal as target.

    `smoothing` spreads that share of the target evenly over the unmasked entries of a row.
    """
    forward, backward = _row_loss(logits_BB, smoothing), _row_loss(logits_BB.T, smoothing)
    return image_weight * forward + (1.0 - image_weight) * backward, forward, backward


def _row_loss(logits_BB: Tensor, smoothing: float) -> Tensor:
    targets = torch.arange(len(logits_BB), device=logits_BB.device)
    loss = F.cross_entropy(logits_BB, targets)
    if smoothing == 0.0:
        return loss
    logs = logits_BB.log_softmax(dim=1)
    masked = torch.isinf(logits_BB)
    even = -(logs.masked_fill(masked, 0.0).sum(dim=1) / (~masked).sum(dim=1)).mean()
    return (1.0 - smoothing) * loss + smoothing * even
