"""A term of another paper beside plain CLIP: which towers run, and what the term compares, views or texts.

Suffixes: B samples of this rank, D embedding width.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError
from vlp import distributed
from vlp.objectives import clip
from vlp.objectives.base import (
    Encoder,
    Features,
    LossOutput,
    Mask,
    encode_pairs,
    false_negatives,
    further,
    phrase_labels,
)

Between = Literal["texts", "views"]
"""What a term compares. texts: a picture with its texts. views: a picture's augmented views with each other."""
Projector = tuple[int, int] | None
"""Widths of the hidden layer and the output of an MLP between the embedding and a term; none: the embedding itself."""
Term = tuple[Tensor, Mapping[str, Tensor]]
"""A loss and what to log of it."""


def check(weight: float, clip_weight: float, mask: Mask, between: Between = "views", project: Projector = None) -> None:
    """Raise ConfigError where nothing would be trained, or where the mask or the projector has no effect."""
    if project is not None and (not weight or between == "texts"):
        why = "objective.between=texts" if weight else "objective.weight=0"
        raise ConfigError(f"objective.projector={list(project)} has no effect with {why}: leave it out")
    if weight == clip_weight == 0:
        raise ConfigError(
            "objective.weight=0 and objective.clip_weight=0 leave nothing to train: give one of them a positive weight"
        )
    if mask != "none" and clip_weight == 0 and between == "views":
        raise ConfigError(
            f"objective.mask={mask!r} has no effect between views without CLIP (objective.clip_weight=0): leave it out"
        )


def encode(
    model: Encoder,
    pixels_BCHW: Tensor,
    batch: Batch,
    between: Between | None,
    with_clip: bool,
    mask: Mask,
    by: str,
    views: int | None = None,
) -> Features:
    """CLIP's pair; under `extra` the further views ("view 1", ...) or texts ("text 1", ...) of the batch, each BD.

    `between`: what the term compares; None without a term. `views`: how many further ones; default all. Where neither
    term nor CLIP takes texts, that tower rests and `text_BD` is the pictures again. Raises MissingField for a batch of
    single views; single texts are allowed.
    """
    if with_clip or between == "texts":
        features = encode_pairs(model, pixels_BCHW, batch, mask, by)
    else:
        image_BD = model.encode_image(pixels_BCHW, normalize=True)
        features = Features(image_BD, image_BD)
    if between == "views":
        pictures = further(batch, "views", views or max(1, len(batch.views or ())), by)
        found = model.encode_image(torch.cat(pictures), normalize=True).chunk(len(pictures))
        return replace(features, extra={f"view {number}": view_BD for number, view_BD in enumerate(found, start=1)})
    if between == "texts" and batch.extra_tokens:
        found = model.encode_text(torch.cat(batch.extra_tokens), normalize=True).chunk(len(batch.extra_tokens))
        return replace(features, extra={f"text {number}": text_BD for number, text_BD in enumerate(found, start=1)})
    return features


class Project(nn.Module):
    """What views pass on their way to a term; the embedding before it is what is kept and served."""

    def __init__(self, embed: int, sizes: Projector) -> None:
        """`embed`: D."""
        super().__init__()
        self.width = embed
        if sizes is not None:
            self.mlp = nn.Sequential(nn.Linear(embed, sizes[0]), nn.ReLU(), nn.Linear(*sizes))
            self.width = sizes[1]
        self.scale = math.sqrt(embed)
        """Gives entries of a unit vector, at whose size biases would drown them, a variance of 1."""

    def forward(self, view_BD: Tensor) -> Tensor:
        """Unit vectors to unit vectors, BD to B x width."""
        return F.normalize(self.mlp(self.scale * view_BD), dim=1) if hasattr(self, "mlp") else view_BD


def sides(features: Features, between: Between, project: Project | None = None) -> tuple[Tensor, ...]:
    """All views of the pictures, projected, or all their texts, in float32; each BD."""
    first_BD = features.image_BD if between == "views" else features.text_BD
    kind = "view " if between == "views" else "text "
    found = first_BD.float(), *(value.float() for name, value in features.extra.items() if name.startswith(kind))
    return tuple(map(project, found)) if project is not None and between == "views" else found


def no_negatives(features: Features) -> Tensor:
    """Bool, pictures x texts of all ranks: own pairs, and those that the mask excludes."""
    labels = tuple(map(distributed.gather, phrase_labels(features)))
    count = len(features.image_BD) * distributed.world_size()
    own_BB = torch.eye(count, dtype=torch.bool, device=features.image_BD.device)
    if labels:
        excluded_BB = false_negatives(labels, labels).excluded_RC
        assert excluded_BB is not None
        own_BB |= excluded_BB
    return own_BB


def together(
    features: Features, logit_scale: Tensor, options: clip.Config, clip_weight: float, weight: float, term: Term | None
) -> LossOutput:
    """`clip_weight` x CLIP + `weight` x the term; what has no weight is not computed."""
    losses, parts = [], {}
    if clip_weight:
        loss, forward, backward = clip.clip_loss(features, logit_scale, options)
        losses.append(clip_weight * loss)
        parts = {"image_to_text": forward.detach(), "text_to_image": backward.detach()}
    if term is not None:
        losses.append(weight * term[0])
        parts |= {name: value.detach() for name, value in term[1].items()}
    return LossOutput(losses[0] if len(losses) == 1 else losses[0] + losses[1], parts)


def mean_over_ranks(values_R: Tensor, counted_R: Tensor) -> Tensor:
    """Mean of the counted entries of all ranks, 0 without any; every rank gets the gradient of its own entries.

    Averaged over the ranks these gradients are those of the mean.
    """
    count = distributed.mean_over("local", counted_R.sum().float()).clamp(min=torch.finfo(torch.float32).tiny)
    own = values_R.masked_fill(~counted_R, 0.0).sum() / count
    return own + (distributed.mean_over("local", own.detach().clone()) - own.detach())
