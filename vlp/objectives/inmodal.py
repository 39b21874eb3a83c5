"""CleanCLIP: CLIP, and each modality with its own augmented copies (Bansal et al. 2023, arXiv 2303.03323).

    L = contrast * L_clip(I, T) + intra * 1/2 [ CE(s u u+^T) + CE(s v v+^T) ]

u and v are pictures and texts, u+ and v+ further views and texts of the same samples (`data.views`, `data.texts`,
`data.strong`, `data.captions.eda`); s is the model's scale. As in the authors' code the terms within a modality go one
way, from the original to the copy. On clean pairs this breaks up what a poisoned model has learned of a trigger; how
much of it, and that it does not always, is in README, section Trust. Suffixes: B samples, D width.
"""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput, contrast, encode_pairs, further
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.clip import clip_loss

NEEDS: tuple[str, ...] = ("pixels", "tokens", "views", "extra_tokens")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"intra": 0}
"""Without the terms within a modality it is CLIP."""


class Config(StrictModel):
    """Options of the loss; the defaults are the authors'."""

    clip: ClipConfig = ClipConfig()
    """Options of the contrast across modalities."""
    contrast: float = Field(1.0, ge=0)
    """Weight of the contrast across modalities; 0 = off, for trials: alone, the other terms forget what texts mean."""
    intra: float = Field(1.0, ge=0)
    """Weight of the terms within a modality; 0 = off."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> "Config":
        if self.contrast == self.intra == 0:
            raise ConfigError("objective.contrast=0, objective.intra=0: nothing is left to train")
        return self


class InModal(nn.Module):
    """Holds the options; has no state of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers on the pair and, with the terms within a modality, on one further view and text."""
        features = encode_pairs(model, pixels_BCHW, batch, self.config.clip.mask, "inmodal")
        if not self.config.intra:
            return features
        (view_BCHW,), (tokens_BL,) = further(batch, "views", 1, "inmodal"), further(batch, "extra_tokens", 1, "inmodal")
        copies = {"image": model.encode_image(view_BCHW, normalize=True), "text": model.encode_text(tokens_BL)}
        return replace(features, extra={name: F.normalize(value, dim=-1) for name, value in copies.items()})

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config, how = self.config, self.config.clip
        losses: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        if config.contrast:
            loss, parts["image_to_text"], parts["text_to_image"] = clip_loss(features, logit_scale, how)
            losses.append(config.contrast * loss)
        if config.intra:
            for name, own_BD in (("image", features.image_BD), ("text", features.text_BD)):
                pairs = replace(features, image_BD=own_BD, text_BD=features.extra[name])
                term, _ = contrast(pairs, logit_scale, exchange=how.exchange, precision=how.precision)
                losses.append(0.5 * config.intra * term)
                parts[f"intra_{name}"] = term
        return LossOutput(sum(losses[1:], losses[0]), {name: value.detach() for name, value in parts.items()})


def build(config: Config, dims: Dims) -> InModal:
    """The objective; it needs no dimensions."""
    return InModal(config)
