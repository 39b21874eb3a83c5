"""SoftCon: how alike two pictures should be is how alike their sets of labels are (Wang et al. 2024, arXiv 2405.20462).

Beside CLIP, a picture's view is contrasted with another view of it that a momentum copy of the tower has seen (L_con,
MoCo), and the same scores f_ij = z_i z'_j / tau have to tell the likeness T_ij of the labels, the cosine of their rows
of zeros and ones (L_soft):

    L = L_clip + contrast * L_con + soft * L_soft,   L_soft = -mean_ij [T log sigma(f + b) + (1 - T) log sigma(-f - b)]

An empty set of labels is unknown: such samples take no part in L_soft, whose mean runs over the known pairs. With
`pairs=image_text` f_ij are pictures and texts, and there is no copy. Masking the tokens of the student alone, as in the
paper's siamese masking, is `model.patch_dropout`: the copy, never in training mode, sees them all.
Suffixes: B samples, D width of the shared embedding, W width of z, K classes.
"""

import copy
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp import distributed
from vlp.objectives._labels import guided_by, known, with_partner
from vlp.objectives.base import (
    Coupling,
    Dims,
    Encoder,
    Features,
    LossOutput,
    contrast,
    encode_pairs,
    further,
    refuse_idle,
    sigmoid_contrast,
)
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.clip import clip_loss

NEEDS: tuple[str, ...] = ("pixels", "tokens", "views", "multi_labels")
COUPLING: Coupling = "stateful"
NEUTRAL: dict[str, Any] | None = {"contrast": 0, "soft": 0}
"""Without its two terms it is CLIP."""
RARE = 1e-4
"""Mean likeness below which the prior falls no further."""


class Config(StrictModel):
    """Options of the loss. What the paper's code does not show is recalled or ours, to be tuned."""

    clip: ClipConfig = ClipConfig()
    """Options of the host loss."""
    pairs: Literal["views", "image_text"] = "views"
    """views: a picture and a second view of it, seen by a momentum copy; needs `data.views` of 2 or more.
    image_text: pictures and texts, which have no L_con beside the host loss."""
    contrast: float = Field(1.0, ge=0)
    """Weight of L_con; 0 = off."""
    soft: float = Field(0.1, ge=0)
    """Weight of L_soft, the paper's lambda; 0 = off."""
    form: Literal["bce", "soft_ce"] = "bce"
    """bce: every pair a question of its own. soft_ce: cross-entropy of a row against its likenesses, which sum to 1."""
    bias: Literal["prior", "learned", "none"] = "prior"
    """b of bce. prior: the log-odds of the mean likeness in the batch. learned: from 0. none: 0, and the many middling
    likenesses of few classes prevail."""
    temperature: float = Field(0.2, gt=0)
    """tau."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """Share of the old weights that the copy keeps at a step; short runs need less."""
    projector: tuple[int, int] | None = (512, 128)
    """Widths of the hidden layer and of z; null: z is the shared embedding."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        views = ("momentum", "projector", *(("contrast",) if self.contrast else ()))
        refuse_idle(self, {
            f"pairs={self.pairs}": views if self.pairs == "image_text" else (),
            f"soft={self.soft}": () if self.soft else ("form", "bias"),
            f"form={self.form}": () if self.form == "bce" else ("bias",),
            "contrast=0, soft=0": () if self.contrast or self.soft else ("temperature", "momentum", "projector"),
        })  # fmt: skip
        return self

    @property
    def viewed(self) -> bool:
        """Whether there is a second view and a momentum copy."""
        return self.pairs == "views" and bool(self.contrast or self.soft)


def soft_bce(pairs: Features, multi_labels_BK: Tensor, scale: float, bias: Tensor | None, how: ClipConfig) -> Tensor:
    """Mean of the pairwise cross-entropy over all known pairs, of the batch of all ranks. `bias`: None, the prior."""
    labels_BK = distributed.gather(multi_labels_BK).float()
    count = labels_BK.any(dim=1).sum().clamp(min=1)
    if bias is None:
        # the mean of all cosines is the square of the mean unit row
        mean_K = F.normalize(labels_BK, dim=1).sum(dim=0) / count
        bias = mean_K.square().sum().clamp(RARE, 1 - RARE).logit()
    sides = pairs, bias.new_tensor(scale), bias, (multi_labels_BK,), guided_by("cosine")
    summed = sigmoid_contrast(*sides, exchange=how.exchange, precision=how.precision)
    return summed * (len(labels_BK) / count.square())


def soft_cross_entropy(pairs: Features, multi_labels_BK: Tensor, scale: Tensor, how: ClipConfig) -> Tensor:
    """Cross-entropy of rows against likenesses, mean over the known samples of all ranks."""
    share = distributed.gather(known(multi_labels_BK).float()).mean()
    sides = pairs, scale, (multi_labels_BK,), guided_by("cosine")
    forward, _ = contrast(*sides, exchange=how.exchange, precision=how.precision)
    return forward / share.clamp(min=1e-9)


class SoftMultilabel(nn.Module):
    """Holds the projector, and the momentum copies of the image tower and of the projector."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config = config
        if config.viewed and config.projector is not None:
            hidden, width = config.projector
            self.project = nn.Sequential(nn.Linear(dims.embed, hidden), nn.ReLU(), nn.Linear(hidden, width))
        if config.bias == "learned":
            self.bias = nn.Parameter(torch.zeros(()))

    def attach(self, model: nn.Module) -> None:
        """Copies the image tower, in float32: in bfloat16 the steps of the average would round away."""
        if not self.config.viewed:
            return
        students = self._students(model)
        if distributed.any_sharded(students.parameters()):
            raise ConfigError("run.strategy='fsdp': a sharded tower cannot be copied; soft_multilabel needs 'ddp'")
        self.copies = copy.deepcopy(students).float().requires_grad_(False).eval()

    def _students(self, model: nn.Module) -> nn.ModuleList:
        towers: list[nn.Module] = [model.get_submodule("visual")]
        return nn.ModuleList([*towers, self.project] if hasattr(self, "project") else towers)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """The copies follow: weights and running statistics."""
        if not self.config.viewed:
            return
        theirs = self._students(model).state_dict()
        pairs = [(own, theirs[name]) for name, own in self.copies.state_dict().items()]
        averaged = [own for own, _ in pairs if own.is_floating_point()]
        current = [value.float() for own, value in pairs if own.is_floating_point()]
        torch._foreach_lerp_(averaged, current, 1.0 - self.config.momentum)
        for own, value in pairs:
            if not own.is_floating_point():
                own.copy_(value)

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once, the copy on the second view, and the labels."""
        config = self.config
        features = encode_pairs(model, pixels_BCHW, batch, config.clip.mask, "soft_multilabel")
        extra = {}
        if config.viewed:
            (view_BCHW,) = further(batch, "views", 1, "soft_multilabel")
            query_BD = features.image_BD
            projected = hasattr(self, "project")
            extra["query"] = F.normalize(self.project(query_BD.float()), dim=1) if projected else query_BD
            extra["key"] = self._key(view_BCHW)
        if config.soft:
            extra["labels"] = batch.require("multi_labels", "soft_multilabel (data.labels.multi: true)")
        return replace(features, extra=extra)

    @torch.no_grad()
    def _key(self, view_BCHW: Tensor) -> Tensor:
        tower, *project = self.copies
        output = tower(view_BCHW.float())
        key_BD = F.normalize(output[0] if isinstance(output, tuple) else output, dim=1)
        return F.normalize(project[0](key_BD), dim=1) if project else key_BD

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config, extra = self.config, features.extra
        how = config.clip
        loss, forward, backward = clip_loss(features, logit_scale, how)
        parts = {"image_to_text": forward, "text_to_image": backward}
        pairs = replace(features, image_BD=extra["query"], text_BD=extra["key"]) if config.viewed else features
        scale = logit_scale.new_tensor(1.0 / config.temperature)
        if config.viewed and config.contrast:
            parts["contrast"], _ = contrast(pairs, scale, exchange=how.exchange, precision=how.precision)
            loss = loss + config.contrast * parts["contrast"]
        if config.soft:
            if config.form == "bce":
                bias = {"prior": None, "learned": getattr(self, "bias", None), "none": scale.new_zeros(())}[config.bias]
                parts["soft"] = soft_bce(pairs, extra["labels"], 1.0 / config.temperature, bias, how)
            else:
                parts["soft"] = soft_cross_entropy(pairs, extra["labels"], scale, how)
            loss = loss + config.soft * parts["soft"]
            parts["positives"] = with_partner(distributed.gather(extra["labels"])).float().mean()
        return LossOutput(loss, {name: value.detach() for name, value in parts.items()})


def build(config: Config, dims: Dims) -> SoftMultilabel:
    """The objective. Raises ConfigError where the data has no labels."""
    if config.soft and not dims.classes:
        raise ConfigError("objective.soft needs labels: set data.labels.names to the classes, data.labels.multi=true")
    return SoftMultilabel(config, dims)
