"""CACR: contrastive attraction and contrastive repulsion (Zheng et al. 2021, arXiv 2105.03746).

With d the squared distance of unit vectors, a query x is pulled to its K positives, the farther the harder, and pushed
from the negatives, the nearer the harder:

    attraction   alpha * mean over x of  sum_p w+_p d(x, p),    w+ = softmax over p of  t_pos d(x, p)
    repulsion    -beta * mean over x of  sum_n w-_n d(x, n),    w- = softmax over n of -t_neg d(x, n)

As in the authors' code (JegZheng/CACR-SSL, small_scale_experiments) every one of K + 1 views is the query once, and
the negatives of a pair of views are the other samples' second view; gradients pass through the weights unless `detach`.
Weights are uniform with `t_pos` or `t_neg` 0. The distances need no temperature, so there is none to run away.

The term is beside plain CLIP. Neutral setting, plain CLIP bit for bit: weight=0.

Suffixes: B samples of all ranks, D embedding width, P positives, R rows and C columns of pairs.
"""

from itertools import combinations
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp.distributed import gather
from vlp.objectives import _beside as beside
from vlp.objectives import clip
from vlp.objectives._beside import Between
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput, Mask, refuse_idle

NEEDS: tuple[str, ...] = ("pixels", "tokens", "views")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"weight": 0.0}
"""These options are plain CLIP."""


OWN = ("alpha", "beta", "t_pos", "t_neg", "detach", "cost", "rbf_t", "between")
"""Options of the term."""


class Config(StrictModel):
    """Options of the loss; the defaults are the paper's for CIFAR-10, beside CLIP."""

    weight: float = Field(1.0, ge=0)
    """Of attraction and repulsion; 0 leaves plain CLIP, and no further view is encoded."""
    clip_weight: float = Field(1.0, ge=0)
    """Of plain CLIP; 0 between views leaves the text tower untrained."""
    between: Between = "views"
    """views: augmented views of a picture, of which `data.views` gives K + 1. texts: a picture and its K texts by
    `data.texts`; negatives are the other samples' texts, and their pictures for the texts."""
    alpha: float = Field(1.0, ge=0)
    """Of the attraction."""
    beta: float = Field(1.0, ge=0)
    """Of the repulsion."""
    t_pos: float = Field(1.0, ge=0)
    """How much harder far positives pull; no effect with K = 1."""
    t_neg: float = Field(0.9, ge=0)
    """How much harder near negatives push; the paper has 2 where there are many classes."""
    detach: bool = False
    """No gradient through the weights, as in the authors' code for ImageNet."""
    cost: Literal["euclidean", "rbf"] = "euclidean"
    """Of the repulsion. euclidean: -d. rbf: the logarithm of the mean of exp(-rbf_t d)."""
    rbf_t: float = Field(2.0, gt=0)
    """Factor of the distance in the rbf cost."""
    projector: beside.Projector = None
    """Widths of the hidden layer and the output of an MLP that views pass before they are compared, as in the paper;
    null: the embedding itself is compared."""
    mask: Mask = "none"
    """Which pairs are not used as negatives, as for the objective clip; by CLIP, and here between texts."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        beside.check(self.weight, self.clip_weight, self.mask, self.between, self.projector)
        refuse_idle(self, {"weight=0": () if self.weight else OWN})
        if self.alpha == self.beta == 0:
            raise ConfigError("objective.alpha=0 and objective.beta=0 leave nothing of the term: set weight=0 instead")
        if self.cost != "rbf" and self.rbf_t != type(self).model_fields["rbf_t"].default:
            raise ConfigError(f"objective.rbf_t={self.rbf_t} has no effect with cost={self.cost!r}: leave it out")
        return self


def attraction(query_BD: Tensor, positives_BPD: Tensor, config: Config) -> Tensor:
    """Scalar, without alpha: the weighted squared distance of queries and their own positives, all unit vectors."""
    apart_BP = 2.0 - 2.0 * torch.einsum("bd,bpd->bp", query_BD, positives_BPD)
    weight_BP = (config.t_pos * apart_BP).softmax(dim=1)
    return ((weight_BP.detach() if config.detach else weight_BP) * apart_BP).sum(dim=1).mean()


def nearness(rows_BD: Tensor, columns_BD: Tensor) -> Tensor:
    """BB: minus the squared distances of unit vectors."""
    return 2.0 * (rows_BD @ columns_BD.T) - 2.0


def repulsion(near_BB: Tensor, negative_BB: Tensor, config: Config) -> Tensor:
    """Scalar, without beta: the weighted cost of rows to their negatives; rows without any do not count."""
    counts_B = negative_BB.any(dim=1)
    masked_BB = (config.t_neg * near_BB).masked_fill(~negative_BB & counts_B[:, None], float("-inf"))
    weight_BB = masked_BB.softmax(dim=1)
    if config.detach:
        weight_BB = weight_BB.detach()
    cost_BB = near_BB if config.cost == "euclidean" else (config.rbf_t * near_BB).exp()
    pushed_B = (weight_BB * cost_BB).sum(dim=1)
    if not counts_B.any():
        return 0.0 * pushed_B.sum()
    mean = pushed_B.where(counts_B, 0.0).sum() / counts_B.sum()
    return mean if config.cost == "euclidean" else mean.log()


def between_views(views: tuple[Tensor, ...], config: Config) -> tuple[Tensor, Tensor]:
    """(attraction, repulsion), scalars, of K + 1 views of all ranks' samples, each BD."""
    stacked_BND = torch.stack(views, dim=1)
    queries = range(len(views))
    others = [[other for other in queries if other != query] for query in queries]
    pull = torch.stack([attraction(views[query], stacked_BND[:, others[query]], config) for query in queries]).mean()
    negative_BB = ~torch.eye(len(views[0]), dtype=torch.bool, device=views[0].device)
    push = [repulsion(nearness(*pair), negative_BB, config) for pair in combinations(views, 2)]
    return pull, torch.stack(push).mean()


def between_texts(
    image_BD: Tensor, texts: tuple[Tensor, ...], negative_BB: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """(attraction of pictures to their texts, mean repulsion of both sides), scalars; `negative_BB`: picture, text."""
    pull = attraction(image_BD, torch.stack(texts, dim=1), config)
    near = [nearness(image_BD, text_BD) for text_BD in texts]
    push = [repulsion(near_BB, negative_BB, config) for near_BB in near]
    push += [repulsion(near_BB.T, negative_BB.T, config) for near_BB in near]
    return pull, torch.stack(push).mean()


class Cacr(nn.Module):
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
        return beside.encode(model, pixels_BCHW, batch, between, config.clip_weight > 0, config.mask, "cacr")

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config = self.config
        term = self._term(features) if config.weight else None
        return beside.together(features, logit_scale, self.clip, config.clip_weight, config.weight, term)

    def _term(self, features: Features) -> beside.Term:
        config = self.config
        views = tuple(map(gather, beside.sides(features, config.between, self.project)))
        if config.between == "views":
            pull, push = between_views(views, config)
        else:
            negative_BB = ~beside.no_negatives(features)
            pull, push = between_texts(gather(features.image_BD).float(), views, negative_BB, config)
        return config.alpha * pull + config.beta * push, {"attraction": pull, "repulsion": push}


def build(config: Config, dims: Dims) -> Cacr:
    """The objective; a projector takes the embedding's width."""
    return Cacr(config, dims)
