"""MOFI: pictures are classified by the entities that their texts name, and contrasted with the texts (Wu et al. 2023,
arXiv 2306.07952).

    L = alpha * L_cls + (1 - alpha) * L_con,   L_cls = CE(scale * (cos(w_c, u) - margin * [c = y]))

A curation step has found the entities (`vlp curate entity`). The softmax of L_cls runs over the entity, all entities of
the batch and others drawn per step; with several entities a picture takes the mean over them, and none of its own is a
negative. Pictures without an entity go to L_con alone, in which those that share one are no negatives of each other.
The paper alternates name, name with description and the original text: `data.captions.columns`. The classifier is not
served. Suffixes: B samples, S entities of a sample.
"""

from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp import distributed
from vlp.heads.partial_fc import Margin, PartialFC, Scores, class_mean, class_parts, softmax_loss, visiting
from vlp.objectives._labels import NOTHING, same
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput, encode_pairs, refuse_idle
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.clip import clip_loss

NEEDS: tuple[str, ...] = ("pixels", "tokens", "cluster_ids")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"alpha": 0, "entity_mask": False}
"""Without classification and the mask it is CLIP."""


class Config(StrictModel):
    """Options of the loss. alpha and samples are recalled from the paper, scale and margin ours: to be tuned."""

    clip: ClipConfig = ClipConfig()
    """Options of L_con."""
    alpha: float = Field(0.5, ge=0, lt=1)
    """Weight of L_cls; L_con gets the rest."""
    entity_mask: bool = True
    """Pictures that share an entity and their texts are no negatives of each other in L_con."""
    samples: int = Field(512_000, ge=1)
    """Entities in the softmax of a step: all of the batch, and others drawn until there are so many."""
    scale: float = Field(32.0, gt=0)
    margin: float = Field(0.1, ge=0)
    margin_kind: Margin = "cosine"

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        refuse_idle(self, {
            "alpha=0": () if self.alpha else ("samples", "scale", "margin", "margin_kind"),
            "margin=0": () if self.margin else ("margin_kind",),
        })  # fmt: skip
        return self


class Entity(nn.Module):
    """Holds the classifier, if there is classification."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config = config
        if config.alpha:
            self.classifier = PartialFC(dims.clusters, dims.embed, config.scale, config.margin, config.margin_kind)

    def attach(self, model: nn.Module) -> None:
        """Shares the entities out over the ranks."""
        if self.config.alpha:
            self.classifier.share_out()

    def after_step(self, model: nn.Module) -> None:
        """The next step draws others."""
        if self.config.alpha:
            self.classifier.advance()

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once, and the entities."""
        features = encode_pairs(model, pixels_BCHW, batch, self.config.clip.mask, "entity")
        if not self.config.alpha and not self.config.entity_mask:
            return features
        return replace(features, extra={"entities": batch.require("cluster_ids", "entity")})

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config, ids_BS = self.config, features.extra.get("entities")
        alike = ((ids_BS,), same) if ids_BS is not None and config.entity_mask else NOTHING
        host, forward, backward = clip_loss(features, logit_scale, config.clip, alike)
        loss, parts = (1.0 - config.alpha) * host, {"image_to_text": forward, "text_to_image": backward}
        if ids_BS is not None and config.alpha:
            scores = self.scores(features.image_BD, ids_BS)
            parts["entity"] = class_mean(softmax_loss(scores), scores.real_BS)
            loss = loss + config.alpha * parts["entity"]
            parts |= class_parts(scores)
        return LossOutput(loss, {name: value.detach() for name, value in parts.items()})

    def scores(self, image_BD: Tensor, ids_BS: Tensor) -> Scores:
        """Of all entities of a sample and of this step's negatives."""
        drawn_N = self.classifier.drawn(self.config.samples, distributed.gather(ids_BS))
        scores: Scores = self.classifier(image_BD, ids_BS, drawn_N, visiting(self.config.clip.exchange))
        return scores


def build(config: Config, dims: Dims) -> Entity:
    """The objective. Raises ConfigError where the data has no entities."""
    if not dims.clusters and (config.alpha or config.entity_mask):
        raise ConfigError("objective.name='entity' needs entities: set data.clusters to what vlp curate entity wrote")
    return Entity(config, dims)
