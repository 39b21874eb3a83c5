"""Improved baselines for vision-language pretraining (Fini et al. 2023, arXiv 2305.08675, "CLIP rocket").

A weakly augmented pair is contrasted by the model's own projections, as in CLIP. Beside it every strongly augmented
picture is contrasted with every strongly augmented text, by MLP projectors, a temperature and label smoothing of their
own. On top, on request, one of the self-supervised terms that the paper finds to add little then: SimSiam and BYOL
across modalities (SiamLIP, BYOLIP), Barlow Twins (BarLIP), SwAV (SwALIP), and SLIP's SimCLR between two pictures (Mu et
al. 2021, arXiv 2112.12750). Losses and sizes are those of the paper's code, facebookresearch/clip-rocket; its drop-out
in the text tower is not here, because open_clip's towers have none.

The projectors run on the batch of all ranks in the loss: their batch norms then see it whole, however ranks and
gradient accumulation cut it. Only the model's own projections are served. Suffixes: B samples, D width of the shared
embedding, F width of a tower before its projection, P width of a projector.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp.distributed import gather
from vlp.heads.projector import BatchNorm, Tower, follow, mlp
from vlp.models.lean import LeanModel
from vlp.objectives._kernel import Job, Side
from vlp.objectives.base import (
    Coupling,
    Dims,
    Encoder,
    Features,
    LossOutput,
    contrast_by,
    encode_pairs,
    false_negatives,
    further,
    with_phrases,
)
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.clip import clip_loss

NEEDS: tuple[str, ...] = ("pixels", "tokens", "views", "extra_tokens")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"views": 0}
"""Without strong views nothing is left but CLIP."""

Ssl = Literal["none", "simclr", "siamlip", "byolip", "barlip", "swalip"]
SIDES = ("image", "text")
MAX_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class Term:
    """The paper's settings of a self-supervised term."""

    weight: float
    hidden: int = 0
    dim: int = 0


TERMS: dict[str, Term] = {
    "simclr": Term(1.0, 4096, 256),
    "siamlip": Term(1.0, 2048, 128),
    "byolip": Term(1.0, 2048, 128),
    "barlip": Term(0.025, 3000, 8192),
    "swalip": Term(0.2),
}
REDUNDANCY = 5e-3
"""BarLIP: weight of the entries beside the diagonal."""
SINKHORN_STEPS, SINKHORN_EPSILON = 3, 0.05
SIMCLR_TEMPERATURE = 0.1


class Config(StrictModel):
    """Options of the loss; the defaults are the paper's."""

    clip: ClipConfig = ClipConfig()
    """Options of the weak pair's loss, those of the objective clip. With a mask, strong pairs of samples with equal own
    captions are no negatives either."""
    views: int = Field(2, ge=0)
    """n: strongly augmented pictures, and as many texts; all n x n pairs of them are contrasted. Needs `data.views` and
    `data.texts` of n + 1 or more, and `data.strong`; `data.captions.eda` augments the texts."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target spread over a row, between strong views alone."""
    hidden: int = Field(4096, ge=1)
    """Width of the hidden layers of the strong views' projectors."""
    dim: int = Field(256, ge=1)
    """P, of the strong views' projectors."""
    init_scale: float = Field(10.0, gt=0, le=MAX_SCALE)
    """The strong views' own scale at the start; it is learned, up to 100."""
    ssl: Ssl = "none"
    """A self-supervised term on top."""
    ssl_weight: float | None = Field(None, gt=0)
    """Its weight; default as in the paper: 1, of barlip 0.025, of swalip 0.2."""
    ssl_hidden: int | None = Field(None, ge=1)
    """Width of the hidden layers of its projectors; default as in the paper."""
    ssl_dim: int | None = Field(None, ge=1)
    """Width of its projections; default as in the paper."""
    momentum: float = Field(0.99, ge=0, lt=1)
    """byolip: share of the old weights that the momentum copy keeps at a step."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        idle = {
            "without strong views (objective.views=0)": ("smoothing", "hidden", "dim", "init_scale"),
            "without a self-supervised term (objective.ssl)": ("ssl_weight", "ssl_hidden", "ssl_dim"),
            "with objective.ssl=swalip, which takes the strong views' projections": ("ssl_hidden", "ssl_dim"),
            "without objective.ssl=byolip": ("momentum",),
        }
        holds = (self.views == 0, self.ssl == "none", self.ssl == "swalip", self.ssl != "byolip")
        for (where, names), true in zip(idle.items(), holds, strict=True):
            given = [name for name in names if true and getattr(self, name) != Config.model_fields[name].default]
            if given:
                raise ConfigError(f"objective.{given[0]}={getattr(self, given[0])} has no effect {where}: leave it out")
        if self.ssl == "swalip" and (self.views != 2 or self.smoothing):
            raise ConfigError(
                f"objective.ssl='swalip' takes its targets from the other one of two pairs, unsmoothed: set "
                f"objective.views=2, objective.smoothing=0, not {self.views} and {self.smoothing}"
            )
        return self

    @property
    def term(self) -> Term:
        """Settings of the self-supervised term."""
        paper = TERMS[self.ssl]
        return Term(self.ssl_weight or paper.weight, self.ssl_hidden or paper.hidden, self.ssl_dim or paper.dim)


def local_loss(
    images_NBP: Sequence[Tensor], texts_NBP: Sequence[Tensor], scale: Tensor, smoothing: float, labels: Side = ()
) -> tuple[Tensor, Tensor]:
    """(image-to-text, text-to-image) cross-entropy, means over all pairs of a picture view and a text view.

    Unit vectors of the batch of all ranks; `labels`: its phrase numbers, where equal captions are no negatives.
    """
    job = Job(smoothing=smoothing, judge=false_negatives if labels else None)
    losses = [contrast_by(job, image_BP, text_BP, scale, labels) for image_BP in images_NBP for text_BP in texts_NBP]
    forward, backward = (torch.stack(side).mean() for side in zip(*losses, strict=True))
    return forward, backward


def cosine_loss(predicted_BP: Tensor, target_BP: Tensor) -> Tensor:
    """SimSiam's and BYOL's `2 - 2 cos`, mean over the batch; the target gets no gradient."""
    return 2.0 - 2.0 * F.cosine_similarity(predicted_BP, target_BP.detach(), dim=1).mean()


def barlow_loss(first_BP: Tensor, second_BP: Tensor) -> Tensor:
    """Squared distance of the cross-correlation from the identity; what lies beside the diagonal counts REDUNDANCY."""
    correlation_PP = first_BP.T @ second_BP / len(first_BP)
    diagonal_P = correlation_PP.diagonal()
    beside = correlation_PP.square().sum() - diagonal_P.square().sum()
    return (diagonal_P - 1.0).square().sum() + REDUNDANCY * beside


def simclr_loss(first_BP: Tensor, second_BP: Tensor, temperature: float = SIMCLR_TEMPERATURE) -> Tensor:
    """NT-Xent of two views of a batch: each of the 2B against its partner and all 2B - 2 others."""
    both_NP = F.normalize(torch.cat([first_BP, second_BP]), dim=1)
    logits_NN = (both_NP @ both_NP.T / temperature).fill_diagonal_(-math.inf)
    partner_N = torch.arange(len(both_NP), device=both_NP.device).roll(len(first_BP))
    return F.cross_entropy(logits_NN, partner_N)


@torch.no_grad()
def sinkhorn(cosines_BB: Tensor) -> Tensor:
    """Rows that sum to 1, columns as equal as SINKHORN_STEPS make them: samples shared out over their partners."""
    shares_BB = (cosines_BB / SINKHORN_EPSILON).exp()
    for _ in range(SINKHORN_STEPS):
        shares_BB = F.normalize(F.normalize(shares_BB, p=1, dim=0), p=1, dim=1)
    return shares_BB


def swav_loss(images_2BP: Sequence[Tensor], texts_2BP: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Each pair of views predicts how the other views' cosines share samples out over partners; mean over pairs."""
    cosines = [[image_BP @ text_BP.T for text_BP in texts_2BP] for image_BP in images_2BP]
    losses = []
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own_BB, other_BB = cosines[row][column], cosines[1 - row][1 - column].detach()
        for logits_BB, target_BB in ((own_BB, sinkhorn(other_BB)), (own_BB.T, sinkhorn(other_BB.T))):
            losses.append(-(target_BB * (scale * logits_BB).log_softmax(dim=1)).sum(dim=1).mean())
    return torch.stack(losses).mean()


class StrongBaseline(nn.Module):
    """Holds the strong views' projectors and scale, and those of a self-supervised term; made by `attach`."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config, self.dims = config, dims
        self.plain = config.views == 0 and config.ssl == "none"
        self.local_logit_scale: nn.Parameter | None = None
        self.local, self.projectors, self.predictors = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.copy, self.copied = nn.ModuleDict(), nn.ModuleDict()
        self._towers: dict[str, Tower] = {}
        self._copied_towers: dict[str, Tower] = {}
        self._copied_encoder: tuple[LeanModel, ...] = ()
        """In a tuple, so that the copy's weights are saved once."""

    def attach(self, model: nn.Module) -> None:
        """Make the projectors, which need the widths of the towers, and the momentum copy."""
        if self.plain:
            return
        config, device = self.config, next(model.parameters()).device
        self._towers = {side: Tower(model, side) for side in SIDES}
        widths = {side: tower.width or self.dims.embed for side, tower in self._towers.items()}
        if config.views:
            self.local.update(
                {side: mlp([width, config.hidden, config.hidden, config.dim]) for side, width in widths.items()}
            )
            self.local_logit_scale = nn.Parameter(torch.tensor(math.log(config.init_scale)))
        if config.ssl not in ("none", "swalip"):
            self._make_ssl(widths)
        self.to(device)
        if config.ssl == "byolip":
            self.copy["model"] = copy.deepcopy(model).float().train().requires_grad_(False)
            self.copied.update({side: copy.deepcopy(self.projectors[side]).requires_grad_(False) for side in SIDES})
            self._copied_towers = {side: Tower(self.copy["model"], side) for side in SIDES}
            self._copied_encoder = (LeanModel(self.copy["model"]),)

    def _make_ssl(self, widths: dict[str, int]) -> None:
        ssl, hidden, dim = self.config.ssl, self.config.term.hidden, self.config.term.dim
        if ssl == "simclr":
            self.projectors["image"] = mlp([widths["image"], hidden, hidden, dim])
        for side, width in widths.items() if ssl != "simclr" else ():
            if ssl == "barlip":
                self.projectors[side] = mlp([width, hidden, hidden, dim], last=BatchNorm(dim))
            else:
                self.projectors[side] = mlp([width, hidden, dim], bias=False, last=BatchNorm(dim, affine=False))
                self.predictors[side] = mlp([dim, hidden, dim], bias=False)

    def after_step(self, model: nn.Module) -> None:
        """Keep the scale within its bounds, move the momentum copy."""
        if self.local_logit_scale is not None:
            self.local_logit_scale.data.clamp_(0.0, math.log(MAX_SCALE))
        if self.copy:
            follow(self.copy["model"], model, self.config.momentum)
            follow(self.copied, self.projectors, self.config.momentum)

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once for the weak pair and once for each strong view and text, one after the other.

        `extra`: "image 0", "text 0" and so on are BF of the strong views, "image" and "text" of the weak pair where a
        self-supervised term takes them; "copied ..." the same of the momentum copy.
        """
        if self.plain:
            return encode_pairs(model, pixels_BCHW, batch, self.config.clip.mask, "strong_baseline")
        config, by = self.config, "strong_baseline"
        pictures = further(batch, "views", max(config.views, 2 * (config.ssl == "simclr")), by)
        texts = further(batch, "extra_tokens", config.views, by)
        image, text = self._towers["image"], self._towers["text"]
        found = _encode(self._towers, model, (pixels_BCHW, *pictures), (batch.text_input, *texts))
        if config.ssl == "byolip":
            with torch.no_grad():
                (copied,) = self._copied_encoder
                seen = tuple(picture_BCHW.float() for picture_BCHW in (pixels_BCHW, *pictures))
                targets = _encode(self._copied_towers, copied, seen, (batch.text_input, *texts))
            found |= {f"copied {name}": value for name, value in targets.items()}
        image_BD, text_BD = image.project(found["image"]), text.project(found["text"])
        if config.ssl not in ("siamlip", "byolip", "barlip"):
            del found["image"], found["text"]
        features = Features(F.normalize(image_BD, dim=-1), F.normalize(text_BD, dim=-1), extra=found)
        return with_phrases(features, batch, config.clip.mask, by)

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks: `(global + n local) / (1 + n)` and the self-supervised term."""
        config = self.config
        loss, forward, backward = clip_loss(features, logit_scale, config.clip)
        parts = {"image_to_text": forward, "text_to_image": backward}
        # every rank holds the whole batch from here on, in float32
        views = {name: gather(value).float() for name, value in features.extra.items()}
        local: list[list[Tensor]] = []
        scale = logit_scale
        if self.local_logit_scale is not None:
            scale = self.local_logit_scale.exp()
            local = [self._local_views(side, views) for side in SIDES]
            labels = () if features.phrase_ids_BP is None else (gather(features.phrase_ids_BP),)
            forward, backward = local_loss(local[0], local[1], scale, config.smoothing, labels)
            parts |= {"local_image_to_text": forward, "local_text_to_image": backward, "local_scale": scale}
            loss = (loss + config.views * (0.5 * forward + 0.5 * backward)) / (1 + config.views)
        if config.ssl != "none":
            parts[config.ssl] = swav_loss(local[0], local[1], scale) if config.ssl == "swalip" else self._ssl(views)
            loss = loss + config.term.weight * parts[config.ssl]
        return LossOutput(loss, {name: value.detach() for name, value in parts.items()})

    def _local_views(self, side: str, views: dict[str, Tensor]) -> list[Tensor]:
        return [F.normalize(self.local[side](views[f"{side} {k}"]), dim=1) for k in range(self.config.views)]

    def _ssl(self, views: dict[str, Tensor]) -> Tensor:
        """The self-supervised term: a mean over the weak pair and all pairs of strong views."""
        if self.config.ssl == "simclr":
            first_BP, second_BP = (self.projectors["image"](views[f"image {k}"]) for k in range(2))
            return simclr_loss(first_BP, second_BP)
        made = {name: self.projectors[side](views[name]) for side in SIDES for name in self._names(side)}
        strong = range(self.config.views)
        pairs = [("image", "text"), *((f"image {i}", f"text {j}") for i in strong for j in strong)]
        if self.config.ssl == "barlip":
            return torch.stack([barlow_loss(made[image], made[text]) for image, text in pairs]).mean()
        targets = made
        if self.config.ssl == "byolip":
            targets = {n: self.copied[side](views[f"copied {n}"]) for side in SIDES for n in self._names(side)}
        predicted = {name: self.predictors[side](made[name]) for side in SIDES for name in self._names(side)}
        losses = [
            cosine_loss(predicted[own], targets[other])
            for image, text in pairs
            for own, other in ((image, text), (text, image))
        ]
        return torch.stack(losses).mean()

    def _names(self, side: str) -> list[str]:
        return [side, *(f"{side} {k}" for k in range(self.config.views))]


def _encode(
    towers: dict[str, Tower], model: Encoder | LeanModel, pictures: Sequence[Tensor], texts: Sequence[Tensor]
) -> dict[str, Tensor]:
    """BF of every picture and text, the first of each under the name of its side alone.

    One forward pass for each, as in the paper's code: the batch norms of a tower see weak and strong views apart.
    """
    found = {}
    for side, encode, inputs in (("image", model.encode_image, pictures), ("text", model.encode_text, texts)):
        for number, value in enumerate(inputs):
            found[f"{side} {number - 1}" if number else side] = towers[side].features(encode, value)
    return found


def build(config: Config, dims: Dims) -> StrongBaseline:
    """The objective; its projectors are made when it meets the model."""
    return StrongBaseline(config, dims)
