"""Label-guided supervised contrast: CLIP, and pictures and texts of one label pulled together, within and across
modalities (Liu et al. 2024, arXiv 2412.03957; the loss is SupCon's, Khosla et al. 2020, arXiv 2004.11362, equation 2).

    -1/B sum_i 1/|P(i)| sum_{p in P(i)} log( exp(s x_i y_p) / sum_a exp(s x_i y_a) )

with P(i) the samples of i's label. Between pictures and between texts i is neither in P(i) nor in the sum over a;
across modalities its own pair is in both. The paper's two branches that get equal labels are two samples of the batch:
a label-paired sampler sees to it that there are some, and `positives` in the log says for which share of the anchors.
Suffixes: B samples, D width.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp import distributed
from vlp.objectives._labels import NOTHING, Known, guided_by, same, sets_touch, with_partner
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput, contrast, encode_pairs
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.clip import clip_loss

NEEDS: tuple[str, ...] = ("pixels", "tokens", "label_ids")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"intra_image": 0, "intra_text": 0, "inter": 0, "label_mask": False}
"""Without the three terms and the mask it is CLIP."""

Kind = Literal["label", "intersect", "jaccard"]


class Config(StrictModel):
    """Options of the loss. Weights and temperature are not in the paper: they are ours, to be tuned."""

    clip: ClipConfig = ClipConfig()
    """Options of the host loss."""
    label_mask: bool = True
    """Texts and pictures that share a label are no negatives of each other in the host loss."""
    positives: Kind = "label"
    """label: equal `label_ids`. intersect: sets of `multi_labels` that share one. jaccard: the same, weighted by the
    labels they share among all of both; the two need `data.labels.multi`."""
    intra_image: float = Field(0.5, ge=0)
    """Weight of pictures among pictures; 0 = off."""
    intra_text: float = Field(0.1, ge=0)
    """Weight of texts among texts; low, for it would make equally built captions one."""
    inter: float = Field(0.2, ge=0)
    """Weight of pictures among texts and of texts among pictures, each."""
    temperature: float | None = Field(0.1, gt=0)
    """Of the three terms; None: the model's learned scale."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        if not self.guided and self.temperature != 0.1:
            raise ConfigError(
                f"objective.temperature={self.temperature} has no effect with intra_image, intra_text and inter 0"
            )
        if not self.guided and not self.label_mask and self.positives != "label":
            raise ConfigError(
                f"objective.positives={self.positives} has no effect with label_mask=false and all three weights 0"
            )
        return self

    @property
    def guided(self) -> bool:
        """Whether one of the terms is on."""
        return bool(self.intra_image or self.intra_text or self.inter)

    @property
    def field(self) -> Literal["label_ids", "multi_labels"]:
        """Where the labels come from."""
        return "label_ids" if self.positives == "label" else "multi_labels"


def supcon_terms(features: Features, labels: Tensor, logit_scale: Tensor, config: Config) -> dict[str, Tensor]:
    """The terms that have a weight, unweighted, over the batch of all ranks; of `inter` the mean of both directions."""
    count = len(features.image_BD)
    number_B = torch.arange(count, device=labels.device) + count * distributed.rank()
    scale = logit_scale if config.temperature is None else logit_scale.new_tensor(1.0 / config.temperature)
    image_BD, text_BD = features.image_BD, features.text_BD
    sides = {
        "intra_image": (config.intra_image, image_BD, image_BD, (labels, number_B)),
        "intra_text": (config.intra_text, text_BD, text_BD, (labels, number_B)),
        "inter": (config.inter, image_BD, text_BD, (labels,)),
    }
    terms = {}
    for name, (weight, rows_BD, columns_BD, known) in sides.items():
        if weight:
            pairs = replace(features, image_BD=rows_BD, text_BD=columns_BD)
            how: dict[str, Any] = {"exchange": config.clip.exchange, "precision": config.clip.precision}
            forward, backward = contrast(pairs, scale, known, guided_by(config.positives), **how)
            terms[name] = forward if rows_BD is columns_BD else 0.5 * (forward + backward)
    return terms


class SupCon(nn.Module):
    """Holds the options; has no state of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once, and the labels."""
        config = self.config
        features = encode_pairs(model, pixels_BCHW, batch, config.clip.mask, "supcon")
        if not config.guided and not config.label_mask:
            return features
        several = "" if config.positives == "label" else " (data.labels.multi: true)"
        labels = batch.require(config.field, f"supcon with positives={config.positives}{several}")
        return replace(features, extra={"labels": labels})

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config = self.config
        labels = features.extra.get("labels")
        alike: Known = NOTHING
        if labels is not None and config.label_mask:
            alike = (labels,), same if config.positives == "label" else sets_touch
        loss, forward, backward = clip_loss(features, logit_scale, config.clip, alike)
        parts = {"image_to_text": forward, "text_to_image": backward}
        if labels is not None and config.guided:
            terms = supcon_terms(features, labels, logit_scale, config)
            weights = {"intra_image": config.intra_image, "intra_text": config.intra_text, "inter": 2 * config.inter}
            loss = loss + sum(weights[name] * term for name, term in terms.items())
            parts |= terms
        if labels is not None:
            parts["positives"] = with_partner(distributed.gather(labels)).float().mean()
        return LossOutput(loss, {name: value.detach() for name, value in parts.items()})


def build(config: Config, dims: Dims) -> SupCon:
    """The objective. Raises ConfigError where the data has no labels."""
    if not dims.classes and (config.guided or config.label_mask):
        raise ConfigError("objective.name='supcon' needs labels: set data.labels.names to the classes")
    return SupCon(config)
