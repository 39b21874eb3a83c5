"""CLIP: symmetric image-text cross-entropy over the global batch (Radford et al. 2021, arXiv 2103.00020, figure 3).

With `image_weight` 0.75 and `fixed_temperature` 0.1 it is ConVIRT (Zhang et al. 2020, arXiv 2010.00747, equation 4).
Neutral setting, plain CLIP bit for bit: mask_equal_captions=false, image_weight=0.5, smoothing=0, no fixed temperature.
"""

from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from vlp.objectives.base import (
    Coupling,
    Dims,
    Encoder,
    Features,
    LossOutput,
    gathered_logits,
    info_nce,
    mask_equal,
)

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "global"


class Config(StrictModel):
    """Options of the loss; the defaults are plain CLIP."""

    mask_equal_captions: bool = False
    """Samples with equal own captions are not negatives of each other; needs the batch field `caption_ids`."""
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
    if features.caption_ids_B is not None:
        logits_BB = mask_equal(logits_BB, features.caption_ids_B)
    return info_nce(logits_BB, config.image_weight, config.smoothing)


class Clip(nn.Module):
    """Holds the options; has no state of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once."""
        ids = batch.require("caption_ids", by="clip.mask_equal_captions") if self.config.mask_equal_captions else None
        return Features(
            image_BD=model.encode_image(pixels_BCHW, normalize=True),
            text_BD=model.encode_text(batch.text_input, normalize=True),
            caption_ids_B=ids,
        )

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the gathered features."""
        loss, forward, backward = clip_loss(features, logit_scale, self.config)
        return LossOutput(loss, {"image_to_text": forward.detach(), "text_to_image": backward.detach()})


def build(config: Config, dims: Dims) -> Clip:
    """The objective; CLIP needs no dimensions."""
    return Clip(config)
