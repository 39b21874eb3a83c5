"""CLIP: symmetric image-text cross-entropy over the global batch (Radford et al. 2021, arXiv 2103.00020, figure 3).

With `image_weight` 0.75 and `fixed_temperature` 0.1 it is ConVIRT (Zhang et al. 2020, arXiv 2010.00747, equation 4).
Neutral setting, plain CLIP bit for bit: mask=none, image_weight=0.5, smoothing=0, no fixed temperature.
"""

from typing import Literal

from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from vlp.objectives.base import (
    Coupling,
    Dims,
    Encoder,
    Features,
    LossOutput,
    equal_captions,
    gathered_logits,
    info_nce,
    mask_pairs,
    true_texts,
)

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "global"


class Config(StrictModel):
    """Options of the loss; the defaults are plain CLIP."""

    mask: Literal["none", "captions", "labels"] = "none"
    """Which pairs are not used as negatives. captions: equal own captions. labels: also texts made of nothing but
    labels and captions that the picture carries too. Needs the batch fields `phrase_ids` and `text_phrase_ids`."""
    image_weight: float = 0.5
    """Weight of image-to-text; text-to-image gets the rest."""
    smoothing: float = 0.0
    """Share of the target spread over the other entries of a row."""
    fixed_temperature: float | None = None
    """Use this temperature instead of the model's learned scale."""


def clip_loss(features: Features, logit_scale: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, image-to-text part, text-to-image part), scalars."""
    if config.fixed_temperature is not None:
        logit_scale = logit_scale.new_tensor(1.0 / config.fixed_temperature)
    logits_BB = gathered_logits(features, logit_scale)
    if features.phrase_ids_BP is not None:
        pairs = equal_captions(features.phrase_ids_BP)
        if features.text_phrase_ids_BQ is not None:
            pairs = pairs | true_texts(features.phrase_ids_BP, features.text_phrase_ids_BQ)
        logits_BB = mask_pairs(logits_BB, pairs)
    return info_nce(logits_BB, config.image_weight, config.smoothing)


class Clip(nn.Module):
    """Holds the options; has no state of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once."""
        mask, by = self.config.mask, f"clip with mask={self.config.mask}"
        return Features(
            image_BD=model.encode_image(pixels_BCHW, normalize=True),
            text_BD=model.encode_text(batch.text_input, normalize=True),
            phrase_ids_BP=None if mask == "none" else batch.require("phrase_ids", by),
            text_phrase_ids_BQ=batch.require("text_phrase_ids", by) if mask == "labels" else None,
        )

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the gathered features."""
        loss, forward, backward = clip_loss(features, logit_scale, self.config)
        return LossOutput(loss, {"image_to_text": forward.detach(), "text_to_image": backward.detach()})


def build(config: Config, dims: Dims) -> Clip:
    """The objective; CLIP needs no dimensions."""
    return Clip(config)
