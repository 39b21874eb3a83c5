"""Decoupled contrastive learning, DCL and DCLW: positives in no denominator (Yeh et al. 2021, arXiv 2110.06848).

    L_i = -w_i S_ii + log sum over j != i of exp(S_ij)
    w_i = 2 - exp(<u_i, v_i> / sigma) / mean over k of exp(<u_k, v_k> / sigma), without gradient      (DCLW)

The gradient of InfoNCE is that of DCL times 1 - softmax(positive), which nearly vanishes in small batches; DCL has no
such factor. Between views, as in the paper, each of a sample's two views has the 2 (B - 1) views of the other samples
as negatives, under one logarithm; more than two views: the mean over all pairs of them. Between texts, as CLIP does,
negatives are those of the other modality. With decoupled=false the first is SimCLR's NT-Xent, the second plain CLIP.

The loss has no lower bound: once the positives exceed the negatives, a larger scale always lowers it. So the scale is
fixed, or learned below a bound that must be given. Neutral setting, plain CLIP bit for bit: decoupled=false,
temperature=none. Suffixes: B samples of this rank, N = 2 B views, D embedding width.
"""

from itertools import combinations
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp import distributed
from vlp.objectives import _beside as beside
from vlp.objectives._beside import Between
from vlp.objectives._kernel import Pairs, Precision, Side
from vlp.objectives.base import (
    Coupling,
    Dims,
    Encoder,
    Exchange,
    Features,
    LossOutput,
    Mask,
    contrast,
    false_negatives,
    phrase_labels,
)

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"decoupled": False, "temperature": None}
"""These options are plain CLIP."""


class Config(StrictModel):
    """Options of the loss; the defaults are the paper's, between texts instead of views."""

    between: Between = "texts"
    """texts: pictures and texts, both ways. views: augmented views of pictures, two or more by `data.views`; the text
    tower then rests."""
    decoupled: bool = True
    """Leave the positive pair out of the denominator; false is InfoNCE."""
    positive_weight: Literal["none", "vmf"] = "none"
    """vmf: DCLW, pairs that are far apart pull harder."""
    sigma: float = Field(0.5, gt=0)
    """Width of the von Mises-Fisher weights."""
    temperature: float | None = Field(0.07, gt=0)
    """Fixed temperature; none: the model's learned scale, which with decoupled=true needs `max_scale`."""
    max_scale: float | None = Field(None, gt=0)
    """Largest value of the learned scale; above, it gets no gradient."""
    projector: beside.Projector = None
    """Widths of the hidden layer and the output of an MLP that views pass before they are compared, as in the paper;
    null: the embedding itself is compared."""
    mask: Mask = "none"
    """Which pairs are not used as negatives, as for the objective clip; between texts alone."""
    exchange: Exchange = "auto"
    """How ranks share the loss, as for the objective clip."""
    precision: Precision = "fp32"
    """Of the scores of batches that are computed in tiles."""

    @model_validator(mode="after")
    def _bounded(self) -> "Config":
        if self.decoupled and self.temperature is None and self.max_scale is None:
            raise ConfigError(
                "objective.temperature=None with decoupled=true has no lower bound, the learned scale would only grow: "
                "give objective.max_scale (14.3 is CLIP's start), or a fixed objective.temperature such as 0.07"
            )
        return self

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        fields = type(self).model_fields
        idle = {
            "sigma": self.positive_weight == "none" and "without positive_weight='vmf'",
            "max_scale": self.temperature is not None and "beside a fixed objective.temperature; set it to null",
            "projector": self.between == "texts" and "between='texts'",
            "mask": self.between == "views" and "between='views'",
        }
        for name, where in idle.items():
            if where and getattr(self, name) != fields[name].default:
                raise ConfigError(f"objective.{name}={getattr(self, name)!r} has no effect {where}: leave one out")
        return self


def vmf_weights(first_BD: Tensor, second_BD: Tensor, sigma: float) -> Tensor:
    """B weights of the positive pairs, 1 on average over all ranks, below 2; smaller where a pair is close."""
    with torch.no_grad():
        close_B = ((first_BD.float() * second_BD.float()).sum(dim=1) / sigma).exp()
        return 2.0 - close_B / distributed.mean_over("local", close_B.mean())


def same_sample(rows: Side, columns: Side) -> Pairs:
    """Pairs of views of one sample, by its number."""
    return Pairs(rows[0][:, None] == columns[0])


def between_views(first_BD: Tensor, second_BD: Tensor, scale: Tensor, config: Config) -> Tensor:
    """The loss of two views of all ranks' samples, a scalar: each of the 2 B views against all of other samples.

    Rows are the views one after the other, columns the same the other way round, so that row i and column i are a
    positive pair. The matrix holds every pair of views twice, mirrored: both directions are the same number, and the
    mean of both has the same gradient by rows as by columns, so that twice the former is all of it.
    """
    first_ND, second_ND = torch.cat([first_BD, second_BD]), torch.cat([second_BD, first_BD]).detach()
    first_ND = 2.0 * first_ND - first_ND.detach()
    count = len(first_BD)
    number_N = torch.arange(count, device=first_BD.device).repeat(2) + distributed.rank() * count
    weights = None
    if config.positive_weight == "vmf":
        weight_N = vmf_weights(first_BD, second_BD, config.sigma).repeat(2)
        weights = (weight_N, weight_N)
    forward, backward = contrast(
        Features(first_ND, second_ND),
        scale,
        (number_N,),
        same_sample,
        decoupled=config.decoupled,
        weights=weights,
        exchange=config.exchange,
        precision=config.precision,
    )
    return 0.5 * (forward + backward)


def between_texts(features: Features, scale: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """(image-to-text, text-to-image) over the batch of all ranks, scalars."""
    labels = phrase_labels(features)
    weights = None
    if config.positive_weight == "vmf":
        weight_B = vmf_weights(features.image_BD, features.text_BD, config.sigma)
        weights = (weight_B, weight_B)
    return contrast(
        features,
        scale,
        labels,
        false_negatives if labels else None,
        decoupled=config.decoupled,
        weights=weights,
        exchange=config.exchange,
        precision=config.precision,
    )


class Decoupled(nn.Module):
    """Holds the options and the projector."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config = config
        self.project = beside.Project(dims.embed, config.projector)

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once, or every view through the image tower."""
        views = self.config.between == "views"
        between: Between | None = "views" if views else None
        return beside.encode(model, pixels_BCHW, batch, between, not views, self.config.mask, "decoupled")

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config, scale = self.config, logit_scale
        if config.temperature is not None:
            scale = logit_scale.new_tensor(1.0 / config.temperature)
        elif config.max_scale is not None:
            scale = logit_scale.clamp(max=config.max_scale)
        if config.between == "views":
            pairs = combinations(beside.sides(features, "views", self.project), 2)
            loss = torch.stack([between_views(*pair, scale, config) for pair in pairs]).mean()
            return LossOutput(loss, {"view_to_view": loss.detach()})
        forward, backward = between_texts(features, scale, config)
        parts = {"image_to_text": forward.detach(), "text_to_image": backward.detach()}
        return LossOutput(0.5 * forward + 0.5 * backward, parts)


def build(config: Config, dims: Dims) -> Decoupled:
    """The objective; a projector takes the embedding's width."""
    return Decoupled(config, dims)
