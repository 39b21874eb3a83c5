"""Hydra: positives from any two classes, in the dimensions that both share (Wu et al. 2024, arXiv 2410.18200).

Sample i of class y1 is told a second class y2, that of another sample of the batch; the gate of the pair picks
dimensions. In these, second views of class y2 are its positives and those of neither class its negatives:

    l_ij = s <z1_i * g_i * g_i, z2_j>,   g_i = gate(y1_i, y2_i)
    loss = mean over all pairs of i and a positive p of  log(exp(l_ip) + sum over negatives n of exp(l_in)) - l_ip

That is the authors' code; its gated vectors are not normalised again, while the paper says they are: `renormalise`. The
embedding is the encoder's own and is served without gates. The term is beside plain CLIP. Neutral setting, plain CLIP
bit for bit: weight=0. Suffixes: B samples of all ranks, D embedding width, P pairs of a sample and a positive.
"""

import hashlib
import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp.distributed import gather
from vlp.heads.pair_gate import Fuse, PairGate
from vlp.objectives import _beside as beside
from vlp.objectives import clip
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput, Mask, refuse_idle

NEEDS: tuple[str, ...] = ("pixels", "tokens", "views", "label_ids")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"weight": 0.0}
"""These options are plain CLIP."""

MAX_SCALE = 100.0


class Config(StrictModel):
    """Options of the loss; the defaults are the authors', beside CLIP."""

    weight: float = Field(1.0, ge=0)
    """Of the gated contrast; 0 leaves plain CLIP, and no further view is encoded."""
    clip_weight: float = Field(1.0, ge=0)
    """Of plain CLIP; 0 leaves the text tower untrained."""
    source: Literal["labels", "clusters"] = "labels"
    """Classes: `label_ids` by `data.labels`, or the first of `cluster_ids` by `data.clusters`. A batch should hold two
    samples of most: `data.sampler`."""
    width: int = Field(512, ge=1)
    """Of the vector of a class."""
    hidden: int = Field(1024, ge=1)
    """Width of the gate's hidden layer."""
    fuse: Fuse = "mean"
    """mean: one gate for the mean of both classes' vectors. product: the gates of both classes, multiplied."""
    renormalise: bool = False
    """Give gated vectors unit length again: l is then a cosine."""
    init_scale: float = Field(10.0, ge=1, le=MAX_SCALE)
    """First value of the learned scale s, at most 100."""
    projector: beside.Projector = None
    """Widths of the hidden layer and the output of an MLP that views pass before they are compared, as in the paper;
    null: the embedding itself is compared."""
    mask: Mask = "none"
    """Which pairs are not used as negatives by CLIP, as for the objective clip."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        beside.check(self.weight, self.clip_weight, self.mask, project=self.projector)
        own = ("source", "width", "hidden", "fuse", "renormalise", "init_scale")
        refuse_idle(self, {"weight=0": () if self.weight else own})
        return self


def draws(keys: tuple[str, ...], step: int) -> Tensor:
    """B int64 random numbers of samples, by their keys and the step alone: the same on whatever rank they are."""
    salt = step.to_bytes(8, "little")
    found = (hashlib.blake2b(key.encode(), digest_size=7, salt=salt).digest() for key in keys)
    return torch.tensor([int.from_bytes(digest, "little") for digest in found], dtype=torch.int64)


def partner_labels(labels_B: Tensor, draw_B: Tensor) -> Tensor:
    """B: the label of the sample that follows in the order of the draws; all labels are known."""
    order_B = draw_B.argsort(stable=True)
    partner_B = torch.empty_like(labels_B)
    partner_B[order_B] = labels_B[order_B].roll(-1)
    return partner_B


def gated_contrast(
    first_BD: Tensor, second_BD: Tensor, gate_BD: Tensor, labels: tuple[Tensor, Tensor], scale: Tensor, unit: bool
) -> tuple[Tensor, Tensor]:
    """(loss, share of samples with a positive), scalars. Views are unit vectors; `labels`: y1 and y2, each B.

    `unit`: give gated vectors unit length. A sample without negatives has loss 0, without positives none.
    """
    label_B, partner_B = labels
    square_BD = gate_BD * gate_BD
    logit_BB = (first_BD * square_BD) @ second_BD.T
    if unit:
        length_BB = (square_BD @ (second_BD * second_BD).T).clamp(min=1e-12).sqrt()
        logit_BB = logit_BB / (length_BB * (first_BD * gate_BD).norm(dim=1, keepdim=True).clamp(min=1e-6))
    logit_BB = scale * logit_BB
    positive_BB = partner_B[:, None] == label_B
    other_BB = ~positive_BB & (label_B[:, None] != label_B)
    has_B = other_BB.any(dim=1)
    negative_B = logit_BB.masked_fill(~other_BB & has_B[:, None], -math.inf).logsumexp(dim=1)
    row_P, column_P = positive_BB.nonzero(as_tuple=True)
    loss_P = F.softplus(negative_B[row_P] - logit_BB[row_P, column_P]).where(has_B[row_P], 0.0)
    return loss_P.sum() / max(1, len(loss_P)), positive_BB.any(dim=1).float().mean()


class Hydra(nn.Module):
    """Holds the projector, the gate, the learned scale, and the number of updates, which the partners are drawn by."""

    updates: Tensor

    def __init__(self, config: Config, dims: Dims) -> None:
        """Raises ConfigError where the data numbers no classes."""
        super().__init__()
        self.config = config
        self.clip = clip.Config(mask=config.mask)
        if not config.weight:
            return
        classes = dims.classes if config.source == "labels" else dims.clusters
        if not classes:
            raise ConfigError(
                f"objective.source={config.source!r} needs data.{config.source}, which this recipe does not have: "
                "set it, or objective.source to the other one of labels, clusters"
            )
        self.project = beside.Project(dims.embed, config.projector)
        self.gate = PairGate(classes, self.project.width, config.width, config.hidden, config.fuse)
        self.gate_scale = nn.Parameter(torch.tensor(math.log(config.init_scale)))
        self.register_buffer("updates", torch.tensor(0))

    def after_step(self, model: nn.Module) -> None:
        """Count the update and keep the scale within its bounds."""
        if self.config.weight:
            self.updates += 1
            self.gate_scale.data.clamp_(0.0, math.log(MAX_SCALE))

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Two views through the image tower; under `extra` besides the samples' classes and draws, each B."""
        config, by = self.config, "pair_gate"
        between: beside.Between | None = "views" if config.weight else None
        features = beside.encode(model, pixels_BCHW, batch, between, config.clip_weight > 0, config.mask, by, views=1)
        if not config.weight:
            return features
        by = f"{by} with source={config.source}"
        labels = batch.require("label_ids", by) if config.source == "labels" else batch.require("cluster_ids", by)[:, 0]
        draw_B = draws(batch.keys, int(self.updates)).to(labels.device)
        return replace(features, extra={**features.extra, "label": labels, "draw": draw_B})

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config = self.config
        term = self._term(features) if config.weight else None
        return beside.together(features, logit_scale, self.clip, config.clip_weight, config.weight, term)

    def _term(self, features: Features) -> beside.Term:
        views = map(gather, beside.sides(features, "views", self.project))
        label_B, draw_B = gather(features.extra["label"]), gather(features.extra["draw"])
        known_B = label_B >= 0
        first_BD, second_BD = (view_BD[known_B] for view_BD in views)
        label_B, known = label_B[known_B], known_B.float().mean()
        scale = self.gate_scale.exp()
        if len(label_B) < 2:  # nothing to contrast, and batch norms would have no variance
            loss, share = 0.0 * first_BD.sum(), known.new_zeros(())
        else:
            partner_B = partner_labels(label_B, draw_B[known_B])
            gate_BD = self.gate(label_B, partner_B)
            labels = (label_B, partner_B)
            loss, share = gated_contrast(first_BD, second_BD, gate_BD, labels, scale, self.config.renormalise)
        return loss, {"gated": loss, "positives": share * known, "gate_scale": scale}


def build(config: Config, dims: Dims) -> Hydra:
    """The objective; the gate takes the embedding's width and the number of classes."""
    return Hydra(config, dims)
