"""CLIP: symmetric image-text cross-entropy over the global batch (Radford et al. 2021, arXiv 2103.00020, figure 3).

With `image_weight` 0.75 and `fixed_temperature` 0.1 it is ConVIRT (Zhang et al. 2020, arXiv 2010.00747, equation 4).
Neutral setting, plain CLIP bit for bit: mask=none, image_weight=0.5, smoothing=0, no fixed temperature.
"""

from typing import Any

from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from vlp.objectives._kernel import Precision
from vlp.objectives._labels import NOTHING, Known, either
from vlp.objectives.base import (
    Coupling,
    Dims,
    Encoder,
    Exchange,
    Features,
    LossOutput,
    Mask,
    contrast,
    encode_pairs,
    false_negatives,
    phrase_labels,
)

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {}
"""These options are plain CLIP."""


class Config(StrictModel):
    """Options of the loss; the defaults are plain CLIP."""

    mask: Mask = "none"
    """Which pairs are not used as negatives. captions: equal own captions. labels: also texts made of nothing but
    labels and captions that the picture carries too. Needs the batch fields `phrase_ids` and `text_phrase_ids`."""
    image_weight: float = 0.5
    """Weight of image-to-text; text-to-image gets the rest."""
    smoothing: float = 0.0
    """Share of the target spread over the other entries of a row."""
    fixed_temperature: float | None = None
    """Use this temperature instead of the model's learned scale."""
    exchange: Exchange = "auto"
    """How ranks share the loss: gather, every rank all of it; local, its own images against all texts; ring, one rank's
    texts at a time, for batches too large to gather. All give the same."""
    precision: Precision = "fp32"
    """Of the scores of batches that are computed in tiles; bf16 is faster and exact to about 0.001."""


def clip_loss(
    features: Features, logit_scale: Tensor, config: Config, alike: Known = NOTHING
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, image-to-text part, text-to-image part), scalars, over the batch of all ranks.

    `alike`: labels of the samples, and which pairs are no negatives by them, beside those of `config.mask`.
    """
    if config.fixed_temperature is not None:
        logit_scale = logit_scale.new_tensor(1.0 / config.fixed_temperature)
    labels = phrase_labels(features)
    labels, judge = either((labels, false_negatives if labels else None), alike)
    forward, backward = contrast(
        features,
        logit_scale,
        labels,
        judge,
        smoothing=config.smoothing,
        exchange=config.exchange,
        precision=config.precision,
    )
    return config.image_weight * forward + (1.0 - config.image_weight) * backward, forward, backward


class Clip(nn.Module):
    """Holds the options; has no state of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once."""
        return encode_pairs(model, pixels_BCHW, batch, self.config.mask, "clip")

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        loss, forward, backward = clip_loss(features, logit_scale, self.config)
        return LossOutput(loss, {"image_to_text": forward.detach(), "text_to_image": backward.detach()})


def build(config: Config, dims: Dims) -> Clip:
    """The objective; CLIP needs no dimensions."""
    return Clip(config)
