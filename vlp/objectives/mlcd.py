"""MLCD: every picture belongs to several of a million clusters of pictures (An et al. 2024, arXiv 2407.17331).

A curation step has clustered the pictures once (`vlp curate cluster`); the closest centres of a picture are its
positive classes P, a share of all others, drawn per step, its negatives N:

    L = log(1 + sum_{i in P} exp(-s_i)) + log(1 + sum_{j in N} exp(s_j))

s are cosines with the classes' directions, times a scale, less a margin on P: bare cosines would leave log(1 + |N|) of
loss. `loss=mlc` is the plain multi-label loss log(1 + sum exp(-s_i) sum exp(s_j)), which sees differences alone.
CLIP's loss stands beside it. The classifier is not served. Suffixes: B samples, S positive classes of a sample.
"""

from dataclasses import replace
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp.heads.partial_fc import Margin, PartialFC, Scores, class_mean, class_parts, positive_mass, visiting
from vlp.objectives._labels import NOTHING, same
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput, encode_pairs, refuse_idle
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.clip import clip_loss

NEEDS: tuple[str, ...] = ("pixels", "tokens", "cluster_ids")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"weight": 0, "cluster_mask": False}
"""Without the cluster term and the mask it is CLIP."""


class Config(StrictModel):
    """Options of the loss; positives and negatives are the paper's, scale and margin its predecessor's (UNICOM)."""

    clip: ClipConfig = ClipConfig()
    """Options of the host loss."""
    contrast: float = Field(1.0, ge=0)
    """Weight of the host loss; the paper trains the picture tower without, and a text tower afterwards."""
    cluster_mask: bool = True
    """Pictures of one closest cluster and their texts are no negatives of each other in the host loss."""
    weight: float = Field(1.0, ge=0)
    """Weight of the cluster term; 0 = off."""
    loss: Literal["mlcd", "mlc"] = "mlcd"
    """mlcd: positives and negatives apart. mlc: by their differences."""
    positives: int | None = Field(None, ge=1)
    """l: closest clusters of a picture that are its classes, 8 in the paper; default all that `data.clusters` holds."""
    negative_share: float = Field(0.1, gt=0, le=1)
    """r: share of all clusters drawn as negatives at a step; all of them are worse, not just slower."""
    scale: float = Field(32.0, gt=0)
    margin: float = Field(0.3, ge=0)
    margin_kind: Margin = "arc"

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        classifier = ("loss", "positives", "negative_share", "scale", "margin", "margin_kind")
        refuse_idle(self, {
            "weight=0": () if self.weight else classifier,
            "margin=0": () if self.margin else ("margin_kind",),
            "contrast=0": () if self.contrast else ("cluster_mask",),  # `clip.exchange` moves features to classes, too
        })  # fmt: skip
        if not self.weight and not self.contrast:
            raise ConfigError("objective.weight=0, objective.contrast=0: nothing is left to train")
        return self


def mlcd_loss(positive_B: Tensor, negative_B: Tensor) -> Tensor:
    """B: log(1 + A) + log(1 + N), from the logarithms of A = sum exp(-s_i) and N = sum exp(s_j)."""
    return F.softplus(positive_B) + F.softplus(negative_B)


def mlc_loss(positive_B: Tensor, negative_B: Tensor) -> Tensor:
    """B: log(1 + A N)."""
    return F.softplus(positive_B + negative_B)


class Mlcd(nn.Module):
    """Holds the classifier, if the cluster term is on."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config = config
        if config.weight:
            self.classifier = PartialFC(dims.clusters, dims.embed, config.scale, config.margin, config.margin_kind)
            self.drawn = max(1, round(config.negative_share * dims.clusters))

    def attach(self, model: nn.Module) -> None:
        """Shares the classes out over the ranks."""
        if self.config.weight:
            self.classifier.share_out()

    def after_step(self, model: nn.Module) -> None:
        """The next step draws other negatives."""
        if self.config.weight:
            self.classifier.advance()

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once, or that of pictures alone, and the clusters. Raises ConfigError for clusters too few."""
        config = self.config
        if config.contrast:
            features = encode_pairs(model, pixels_BCHW, batch, config.clip.mask, "mlcd")
        else:  # the text tower rests
            image_BD = model.encode_image(pixels_BCHW, normalize=True)
            features = Features(image_BD, image_BD.detach())
        if not config.weight and not config.cluster_mask:
            return features
        ids_BS = batch.require("cluster_ids", "mlcd")
        if config.positives and ids_BS.shape[1] < config.positives:
            raise ConfigError(
                f"objective.positives={config.positives}, but data.clusters holds {ids_BS.shape[1]} a picture: "
                f"run vlp curate cluster with --closest {config.positives}, or set objective.positives lower"
            )
        return replace(features, extra={"clusters": ids_BS})

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config, ids_BS = self.config, features.extra.get("clusters")
        loss, parts = logit_scale.new_zeros(()), {}
        if config.contrast:
            alike = ((ids_BS[:, 0],), same) if ids_BS is not None and config.cluster_mask else NOTHING
            host, forward, backward = clip_loss(features, logit_scale, config.clip, alike)
            loss, parts = config.contrast * host, {"image_to_text": forward, "text_to_image": backward}
        if ids_BS is not None and config.weight:
            scores = self.scores(features.image_BD, ids_BS[:, : config.positives])
            of = mlcd_loss if config.loss == "mlcd" else mlc_loss
            parts["cluster"] = class_mean(of(positive_mass(scores), scores.negative_B), scores.real_BS)
            loss = loss + config.weight * parts["cluster"]
            parts |= class_parts(scores)
        return LossOutput(loss, {name: value.detach() for name, value in parts.items()})

    def scores(self, image_BD: Tensor, ids_BS: Tensor) -> Scores:
        """Of all positive classes and of this step's negatives."""
        drawn_N = self.classifier.drawn(self.drawn)
        scores: Scores = self.classifier(image_BD, ids_BS, drawn_N, visiting(self.config.clip.exchange))
        return scores


def build(config: Config, dims: Dims) -> Mlcd:
    """The objective. Raises ConfigError where the data has no clusters."""
    if not dims.clusters and (config.weight or config.cluster_mask):
        raise ConfigError("objective.name='mlcd' needs clusters: set data.clusters to what `vlp curate cluster` wrote")
    return Mlcd(config, dims)
