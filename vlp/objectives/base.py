"""The contract between trainer and objectives, and the machinery they share.

Suffixes: B samples of this rank, or of all ranks once gathered; D embedding width; R rows (images) and C columns
(texts) of some pairs.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

import vlp.objectives
from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import ConfigError, MissingField
from data_pipelines.preprocess import ImageConfig
from data_pipelines.tokens import Tokenizer
from vlp import distributed
from vlp.distributed import Way, gather
from vlp.objectives._kernel import Job, Judge, Pairs, Precision, Side, pairwise_sigmoid, two_way

Coupling = Literal["global", "local", "stateful"]
"""global: needs the features of all ranks. local: a mean over samples. stateful: carries queues or averages."""

Exchange = Literal["auto", "gather", "local", "ring"]
"""A Way, or auto: the fastest exact one."""
Mask = Literal["none", "captions", "labels"]
"""Which pairs are not used as negatives. captions: equal own captions. labels: also texts made of nothing but labels
and captions that the picture carries too. Needs the batch fields `phrase_ids` and `text_phrase_ids`."""
UNTILED = 1024
"""Samples of all ranks from which tiles are about as fast as one piece, and sharing out is faster than gathering."""


@dataclass(frozen=True, slots=True)
class Dims:
    """What an objective may need to know to build its own parameters."""

    embed: int
    """D, width of the shared embedding."""
    init_logit_scale: float
    """Logarithm of the scale the model starts with."""
    classes: int = 0
    """Classes that `label_ids` and `multi_labels` number; 0 without `data.labels`."""
    clusters: int = 0
    """Clusters or entities that `cluster_ids` number; 0 without `data.clusters`."""
    image: ImageConfig | None = None
    """How the run's pictures are prepared; None: unknown, as in tests."""
    tokenizer: Tokenizer | None = None
    """What made the run's tokens."""
    box_labels: tuple[str, ...] = ()
    """Labels that `box_labels` of a batch number; empty without `data.boxes`."""
    weights: str | None = None
    """`model.weights`: what the model starts from, which may hold parts that an objective continues."""


@dataclass(frozen=True, slots=True)
class Features:
    """What an objective's encode step returns, for the samples of this rank."""

    image_BD: Tensor
    text_BD: Tensor
    phrase_ids_BP: Tensor | None = None
    """Numbers of all captions and labels of a sample, its own caption first, padded with -1."""
    text_phrase_ids_BQ: Tensor | None = None
    """Numbers of the phrases in its text, padded with -1."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What one objective needs besides, under names of its own: B rows each. Further views, labels, projections."""

    def map(self, move: Callable[[Tensor], Tensor]) -> "Features":
        """The same features with `move` applied to every tensor."""
        plain = {name: None if (old := getattr(self, name)) is None else move(old) for name in _PLAIN}
        return Features(**plain, extra={name: move(value) for name, value in self.extra.items()})  # type: ignore[arg-type]

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        plain = (getattr(self, name) for name in _PLAIN)
        return [*(value for value in plain if value is not None), *self.extra.values()]

    @staticmethod
    def cat(parts: "Sequence[Features]") -> "Features":
        """Features of several parts of a batch, one after the other."""
        columns = iter(zip(*(part.tensors() for part in parts), strict=True))
        return parts[0].map(lambda _: torch.cat(next(columns)))


_PLAIN = ("image_BD", "text_BD", "phrase_ids_BP", "text_phrase_ids_BQ")


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The scalar to minimise and its named parts, for the log."""

    loss: Tensor
    parts: Mapping[str, Tensor]


class Encoder(Protocol):
    """What an objective asks of a model; every open_clip model answers it."""

    logit_scale: nn.Parameter

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """BCHW float to BD."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """BL int64 to BD."""


class Objective(Protocol):
    """What `build` returns: an nn.Module with two steps.

    The second step gets the features of this rank. An objective whose COUPLING is not local begins with
    `gather_features`, or calls `contrast` or another function that works over ranks. Either way N ranks must give the
    loss and, averaged over the ranks, the gradients of one process on the whole batch.

    An objective with a copy of the model to keep up (a momentum tower) also has `attach(model)`, called once before
    the optimiser is made, and `after_step(model)`, called after every update that was applied. What it registers as
    buffers or parameters is saved and resumed; parameters with a gradient are trained.

    One that learns more than the towers has `extra_parts()`, name -> module with `save(folder)`: they are averaged and
    handed over with the model (bundle.Part). One that takes towers apart says `whole_towers = True`: it then gets
    pixels and tokens even where both trunks are frozen. `rate_scale(name)` multiplies the learning rate of a parameter
    of the model; `more_flops(model, side, channels, passes)` counts what it computes beside one pass of both towers,
    and `picture_pass(model, pixels)` runs all it computes of pictures, for estimates.
    """

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Forward both towers for what the loss needs. Pixels, and those of `batch.views`, are normalised already."""

    def __call__(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks, equal on each; `logit_scale` is the model's, as a factor."""


def names() -> list[str]:
    """All objectives: the modules of this folder that are neither private nor this one."""
    found = (module.name for module in pkgutil.iter_modules(vlp.objectives.__path__))
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def load(settings: Mapping[str, Any]) -> tuple[Any, StrictModel]:
    """(module, its validated Config) of `{"name": ..., **options}`. Raises ConfigError."""
    options = dict(settings)
    name = options.pop("name", None)
    if name not in names():
        raise ConfigError(f"objective.name: {name!r} is unknown; known: {', '.join(names())}")
    module = importlib.import_module(f"vlp.objectives.{name}")
    try:
        return module, module.Config.model_validate(options)
    except ValidationError as error:
        known = {"": sorted(module.Config.model_fields)}
        raise ConfigError("\n".join(f"objective.{line}" for line in explain(error, known).splitlines())) from error


def gather_features(features: Features) -> Features:
    """Features of all ranks in rank order, with gradients."""
    return features.map(distributed.gather)


def way_for(exchange: Exchange, samples: int) -> Way:
    """How to share out the loss of a batch; `samples`: of this rank."""
    if distributed.world_size() == 1:
        return "gather"
    if exchange != "auto":
        return exchange
    return "gather" if samples * distributed.world_size() < UNTILED else "local"


def contrast(
    features: Features,
    logit_scale: Tensor,
    labels: Side = (),
    judge: Judge | None = None,
    *,
    smoothing: float = 0.0,
    decoupled: bool = False,
    weights: tuple[Tensor, Tensor] | None = None,
    exchange: Exchange = "auto",
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """(image-to-text, text-to-image) cross-entropy over the batch of all ranks, scalars; see `_kernel.two_way`.

    Less than UNTILED samples with nothing but excluded pairs and smoothing are computed in one piece, in float32.
    """
    image_BD, text_BD = features.image_BD, features.text_BD
    way = way_for(exchange, len(image_BD))
    if way == "gather":
        image_BD, text_BD, labels = gather(image_BD), gather(text_BD), tuple(map(gather, labels))
        weights = weights and (gather(weights[0]), gather(weights[1]))
    job = Job(way, precision, judge, smoothing, decoupled)
    return contrast_by(job, image_BD, text_BD, logit_scale, labels, weights)


def contrast_by(
    job: Job,
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    labels: Side = (),
    weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `contrast`; with way "gather" every rank must hand in the batch of all ranks."""
    if job.way == "gather" and len(image_BD) < UNTILED:
        pairs = job.judge(labels, labels) if job.judge else Pairs()
        special = job.decoupled or any(item is not None for item in (weights, pairs.log_weight_RC, pairs.target_RC))
        if not special:
            logits_BB = logit_scale.float() * (image_BD.float() @ text_BD.float().T)
            return contrast_matrix(logits_BB, pairs.excluded_RC, job.smoothing)
    return two_way(image_BD, text_BD, logit_scale, labels, job, weights)


def contrast_matrix(
    logits_BB: Tensor, excluded_BB: Tensor | None = None, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(image-to-text, text-to-image) cross-entropy of logits that are there already, own pairs on the diagonal."""
    if excluded_BB is not None:
        logits_BB = mask_pairs(logits_BB, excluded_BB)
    return _row_loss(logits_BB, smoothing), _row_loss(logits_BB.T, smoothing)


def sigmoid_contrast(
    features: Features,
    logit_scale: Tensor,
    bias: Tensor,
    labels: Side = (),
    judge: Judge | None = None,
    *,
    exchange: Exchange = "auto",
    precision: Precision = "fp32",
) -> Tensor:
    """Pairwise sigmoid loss over the batch of all ranks, a scalar; see `_kernel.pairwise_sigmoid`."""
    image_BD, text_BD = features.image_BD, features.text_BD
    way = way_for(exchange, len(image_BD))
    if way == "gather":
        image_BD, text_BD, labels = gather(image_BD), gather(text_BD), tuple(map(gather, labels))
    return pairwise_sigmoid(image_BD, text_BD, logit_scale, bias, labels, Job(way, precision, judge))


def refuse_idle(config: StrictModel, idle: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError for an option that was given where it has no effect.

    `idle`: what the other options say -> names of the options that then have no effect; empty where they have one.
    """
    for where, names in idle.items():
        for name in names:
            if name in config.model_fields_set:
                value = getattr(config, name)
                raise ConfigError(f"objective.{name}={value} has no effect with objective.{where}: leave it out")


def further(batch: Batch, field: Literal["views", "extra_tokens"], count: int, by: str) -> tuple[Tensor, ...]:
    """The first `count` further views or texts of a batch. Raises MissingField naming the option that provides them."""
    found: tuple[Tensor, ...] = getattr(batch, field) or ()
    if len(found) < count:
        option = "data.views" if field == "views" else "data.texts"
        raise MissingField(
            f"{by} needs {count} of the batch field {field!r}, this data has {len(found)}: set {option}={count + 1}"
        )
    return found[:count]


def encode_pairs(model: Encoder, pixels_BCHW: Tensor, batch: Batch, mask: Mask, name: str) -> Features:
    """Both towers once, and the phrases that `mask` compares. Raises MissingField."""
    image_BD = model.encode_image(pixels_BCHW, normalize=True)
    return with_phrases(Features(image_BD, model.encode_text(batch.text_input, normalize=True)), batch, mask, name)


def with_phrases(features: Features, batch: Batch, mask: Mask, name: str) -> Features:
    """The features and the phrases that `mask` compares. Raises MissingField."""
    by = f"{name} with mask={mask}"
    return replace(
        features,
        phrase_ids_BP=None if mask == "none" else batch.require("phrase_ids", by),
        text_phrase_ids_BQ=batch.require("text_phrase_ids", by) if mask == "labels" else None,
    )


def phrase_labels(features: Features) -> Side:
    """What `false_negatives` compares, as far as the features hold it."""
    return tuple(ids for ids in (features.phrase_ids_BP, features.text_phrase_ids_BQ) if ids is not None)


def false_negatives(rows: Side, columns: Side) -> Pairs:
    """Pairs with equal own captions, and those whose text is true of the picture where texts' phrases are given."""
    excluded_RC = rows[0][:, :1] == columns[0][:, 0]
    if len(rows) > 1:
        excluded_RC |= true_texts(rows[0], columns[1])
    return Pairs(excluded_RC)


def true_texts(phrase_ids_RP: Tensor, text_phrase_ids_CQ: Tensor) -> Tensor:
    """RC bool: text j says nothing but captions and labels of picture i, so it is true of that picture as well."""
    distinct_U, where_CQ = text_phrase_ids_CQ.unique(return_inverse=True)
    place_RP = torch.searchsorted(distinct_U, phrase_ids_RP).clamp_(max=len(distinct_U) - 1)
    row, column = (distinct_U[place_RP] == phrase_ids_RP).nonzero(as_tuple=True)
    known_RU = (distinct_U < 0).repeat(len(phrase_ids_RP), 1)
    known_RU[row, place_RP[row, column]] = True
    true_RC: Tensor = known_RU[:, where_CQ].all(dim=2)
    return true_RC


def mask_pairs(logits_BB: Tensor, pairs_BB: Tensor) -> Tensor:
    """-inf at the given pairs, which are then no negatives of each other; the diagonal stays."""
    others = ~torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    return logits_BB.masked_fill(pairs_BB & others, float("-inf"))


def _row_loss(logits_BB: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with the diagonal as target, `smoothing` of it spread evenly over the unmasked entries of a row."""
    targets = torch.arange(len(logits_BB), device=logits_BB.device)
    loss = F.cross_entropy(logits_BB, targets)
    if smoothing == 0.0:
        return loss
    logs = logits_BB.log_softmax(dim=1)
    masked = torch.isinf(logits_BB)
    even = -(logs.masked_fill(masked, 0.0).sum(dim=1) / (~masked).sum(dim=1)).mean()
    return (1.0 - smoothing) * loss + smoothing * even
