"""GroCo: learning by sorting, group ordering constraints (Shvetsova et al. 2023, arXiv 2301.02009).

An anchor's cosines to its k hardest negatives and to its positives are sorted, ascending, by a differentiable odd-even
network. The loss asks that every positive lands in the group of positives and every negative in that of the negatives,
in whatever order inside (binary cross-entropy of the probability of landing there). Two neighbours a, b of the network
stay in place with probability arctan(beta (b - a)) / pi + 1/2 (Petersen et al. 2022, arXiv 2203.09630, Cauchy); as two
cosines differ by 2 at most, the loss of a perfect order is not 0.

Candidates are detached, positives too: only the anchor moves. As in the authors' code (ninatu/learning_by_sorting)
every view is the anchor once, and negatives are the same view of other samples. No temperature enters.

The term is beside plain CLIP. Neutral setting, plain CLIP bit for bit: weight=0.

Suffixes: B samples of this rank, C those of all ranks, D embedding width, K negatives, P positives, N = K + P places.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from vlp import distributed
from vlp.objectives import _beside as beside
from vlp.objectives import clip
from vlp.objectives._beside import Between
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput, Mask, refuse_idle

NEEDS: tuple[str, ...] = ("pixels", "tokens", "views")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"weight": 0.0}
"""These options are plain CLIP."""


class Config(StrictModel):
    """Options of the loss; the defaults are the paper's, beside CLIP."""

    weight: float = Field(1.0, ge=0)
    """Of the sorting; 0 leaves plain CLIP, and no further view is encoded."""
    clip_weight: float = Field(1.0, ge=0)
    """Of plain CLIP; 0 between views leaves the text tower untrained."""
    between: Between = "views"
    """views: augmented views of a picture, two or more by `data.views`. texts: a picture and its texts by `data.texts`,
    sorted among other samples' texts, and every text's picture among other pictures."""
    k: int = Field(10, ge=1)
    """Negatives that are sorted, the nearest; a batch of no more samples sorts all it has. At most an eighth of it is
    advisable."""
    beta: float = Field(1.0, gt=0)
    """Steepness of a swap."""
    projector: beside.Projector = None
    """Widths of the hidden layer and the output of an MLP that views pass before they are compared, as in the paper;
    null: the embedding itself is compared."""
    mask: Mask = "none"
    """Which pairs are not used as negatives, as for the objective clip; by CLIP, and here between texts."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        beside.check(self.weight, self.clip_weight, self.mask, self.between, self.projector)
        refuse_idle(self, {"weight=0": () if self.weight else ("k", "beta", "between")})
        return self


def landing(values_BN: Tensor, first: int, beta: float) -> Tensor:
    """BN: probability of each value to be among the `first` places once odd-even transposition has sorted them.

    The sum over those columns of the network's soft permutation, without the permutation: the values go forward through
    the layers, then the membership of places goes backward through the same swaps.
    """
    count = values_BN.shape[1]
    stays = []
    for layer in range(count):
        low_BM, high_BM, edges = _neighbours(values_BN, layer % 2)
        stay_BM = torch.atan(beta * (high_BM - low_BM)) / math.pi + 0.5
        stays.append(stay_BM)
        mixed_BM = stay_BM * low_BM + (1.0 - stay_BM) * high_BM
        values_BN = _interleave(mixed_BM, low_BM + high_BM - mixed_BM, edges)
    member_BN = (torch.arange(count, device=values_BN.device) < first).to(values_BN.dtype).expand_as(values_BN)
    for layer in reversed(range(count)):
        left_BM, right_BM, edges = _neighbours(member_BN, layer % 2)
        mixed_BM = stays[layer] * left_BM + (1.0 - stays[layer]) * right_BM
        member_BN = _interleave(mixed_BM, left_BM + right_BM - mixed_BM, edges)
    return member_BN


def _neighbours(values_BN: Tensor, start: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(left, right) of all pairs of neighbours from `start` on, and what has no partner before and behind."""
    end = start + (values_BN.shape[1] - start) // 2 * 2
    return values_BN[:, start:end:2], values_BN[:, start + 1 : end : 2], (values_BN[:, :start], values_BN[:, end:])


def _interleave(left_BM: Tensor, right_BM: Tensor, edges: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([edges[0], torch.stack([left_BM, right_BM], dim=2).flatten(1), edges[1]], dim=1)


def sorting_loss(negative_BK: Tensor, positive_BP: Tensor, beta: float) -> Tensor:
    """B: mean over all values of the cross-entropy of landing in the own group; both groups in any order."""
    values_BN = torch.cat([negative_BK.sort(dim=1).values, positive_BP.sort(dim=1).values], dim=1)
    first = negative_BK.shape[1]
    chance_BN = landing(values_BN, first, beta).clamp(0.0, 1.0)
    target_BN = (torch.arange(values_BN.shape[1], device=values_BN.device) < first).float().expand_as(chance_BN)
    # the chances of the positives' places are one less these, so the mean of both cross-entropies is this one
    return F.binary_cross_entropy(chance_BN, target_BN, reduction="none").mean(dim=1)


def hardest(anchor_BD: Tensor, candidates_CD: Tensor, excluded_BC: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """(BK numbers of the k candidates nearest to each anchor, B bool: it has so many). Anchor i is candidate
    rank x B + i, and never its own negative."""
    with torch.no_grad():
        cosine_BC = anchor_BD @ candidates_CD.T
        cosine_BC.diagonal(distributed.rank() * len(anchor_BD)).fill_(-math.inf)
        if excluded_BC is not None:
            cosine_BC.masked_fill_(excluded_BC, -math.inf)
        nearest = cosine_BC.topk(min(k, len(candidates_CD) - 1), dim=1)
        return nearest.indices, (nearest.values > -math.inf).all(dim=1)


def order(
    anchor_BD: Tensor,
    positives: Sequence[Tensor],
    candidates_CD: Tensor,
    config: Config,
    excluded_BC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss over the anchors of all ranks, share of anchors whose positives are all nearer than every negative).

    `positives`: own ones of each anchor, each BD; `candidates_CD`: where negatives come from, of all ranks. Only the
    anchors get a gradient. An anchor with fewer negatives than the others is left out; without any the loss is 0.
    """
    place_BK, counts_B = hardest(anchor_BD, candidates_CD, excluded_BC, config.k)
    if not place_BK.shape[1]:
        return 0.0 * anchor_BD.sum(), anchor_BD.new_zeros(())
    negative_BK = torch.einsum("bd,bkd->bk", anchor_BD, candidates_CD.detach()[place_BK])
    positive_BP = torch.einsum("bd,bpd->bp", anchor_BD, torch.stack(list(positives), dim=1).detach())
    ordered_B = (positive_BP.amin(dim=1) > negative_BK.amax(dim=1)).float()
    loss = beside.mean_over_ranks(sorting_loss(negative_BK, positive_BP, config.beta), counts_B)
    return loss, beside.mean_over_ranks(ordered_B.detach(), counts_B)


class GroCo(nn.Module):
    """Holds the options and the projector."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config = config
        self.project = beside.Project(dims.embed, config.projector)
        self.clip = clip.Config(mask=config.mask)

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Every view or every text once."""
        config = self.config
        between = config.between if config.weight else None
        return beside.encode(model, pixels_BCHW, batch, between, config.clip_weight > 0, config.mask, "groco")

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config = self.config
        term = self._term(features) if config.weight else None
        return beside.together(features, logit_scale, self.clip, config.clip_weight, config.weight, term)

    def _term(self, features: Features) -> beside.Term:
        views = beside.sides(features, self.config.between, self.project)
        found = self._of_views(views) if self.config.between == "views" else self._of_texts(features, views)
        loss, ordered = (torch.stack(column).mean() for column in zip(*found, strict=True))
        return loss, {"sorting": loss, "ordered": ordered}

    def _of_views(self, views: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Every view as the anchor."""
        return [
            order(anchor_BD, [*views[:at], *views[at + 1 :]], distributed.gather(anchor_BD.detach()), self.config)
            for at, anchor_BD in enumerate(views)
        ]

    def _of_texts(self, features: Features, texts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The pictures as anchors among first texts, and as often as there are texts, these among pictures."""
        image_BD, config = features.image_BD.float(), self.config
        excluded_BC = excluded_CB = None
        if config.mask != "none":
            excluded_CC = beside.no_negatives(features)
            own = slice(distributed.rank() * len(image_BD), (distributed.rank() + 1) * len(image_BD))
            excluded_BC, excluded_CB = excluded_CC[own], excluded_CC.T[own]
        image_CD, text_CD = distributed.gather(image_BD.detach()), distributed.gather(texts[0].detach())
        from_images = order(image_BD, texts, text_CD, config, excluded_BC)
        from_texts = [order(text_BD, [image_BD], image_CD, config, excluded_CB) for text_BD in texts]
        return [from_images] * len(texts) + from_texts


def build(config: Config, dims: Dims) -> GroCo:
    """The objective; a projector takes the embedding's width."""
    return GroCo(config, dims)
