"""From two towers' opinions of regions to detections: labels, the geometric ensemble, and which boxes are told.

The ensemble is F-VLM's (Kuo et al. 2022, arXiv 2209.15639, equation 3) as DITO's released code applies it. Suffixes: B
pictures, R regions, K labels, N candidates (pairs of a region and a label), T detections.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp.detection.boxes import nms_batch

CANDIDATES = 1000
"""Pairs of a region and a label that suppression looks at, at least."""


class Options(StrictModel):
    """How boxes are scored and chosen; the defaults are the paper's, but for the threshold."""

    threshold: float = Field(0.3, ge=0, lt=1)
    """Lowest score of a detection."""
    top_k: int = Field(100, ge=1)
    """Most detections of a picture."""
    proposals: int = Field(100, ge=1)
    """Regions of a picture that are looked at closely."""
    nms: float = Field(0.5, ge=0, le=1)
    """IoU above which of two boxes of one label the worse one goes."""
    ensemble: bool = True
    """Whether the frozen tower has a say; without it the detector's own score stands alone."""
    base: float = Field(0.35, ge=0, le=1)
    """Its weight for labels that fine-tuning saw."""
    novel: float = Field(0.65, ge=0, le=1)
    """Its weight for all others."""
    objectness: float = Field(3.0, ge=0)
    """Weight of the objectness beside the label's 1 in their geometric mean, which is the score: the order is that of
    label x objectness^3, as in the paper, and good boxes score near 1, as in FCOS."""
    temperature: float | None = Field(None, gt=0)
    """Of the detector's softmax; default: the one it learned."""
    frozen_temperature: float | None = Field(None, gt=0)
    """Of the frozen tower's; default: its own, the paper's 0.01 for CLIP's weights."""
    templates: tuple[str, ...] | None = Field(None, min_length=1)
    """Prompts of a label, averaged; default: those of fine-tuning."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Options":
        for name in ("base", "novel", "frozen_temperature"):
            if name in self.model_fields_set and not self.ensemble:
                raise ConfigError(f"{name}={getattr(self, name)} has no effect with ensemble=false: leave it out")
        return self


DEFAULT = Options()


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in pictures of the model's size, best first; where `valid_BT` is False there was no more."""

    boxes_BT4: Tensor
    """Fractions of the model's square input."""
    scores_BT: Tensor
    label_BT: Tensor
    """int64: number of the label in `labels`."""
    valid_BT: Tensor
    labels: tuple[str, ...]
    """The distinct ones of those asked for."""


def normal_form(label: str) -> str:
    """What two spellings of one label have in common."""
    return " ".join(label.split()).casefold()


def merge_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels in their order, each as spelt first. Raises ConfigError for none at all, or an empty one."""
    found: dict[str, str] = {}
    for label in labels:
        if not (form := normal_form(label)):
            raise ConfigError(f"labels: {label!r} is empty: name what to look for")
        found.setdefault(form, " ".join(label.split()))
    if not found:
        raise ConfigError("labels: none are given: name at least one thing to look for")
    return tuple(found.values())


def frozen_weights(labels: Sequence[str], base_labels: Iterable[str], options: Options) -> Tensor:
    """K: how much the frozen tower counts for each label."""
    known = {normal_form(label) for label in base_labels}
    return torch.tensor([options.base if normal_form(label) in known else options.novel for label in labels])


def ensemble(logits_BRK1: Tensor, frozen_BRK: Tensor, weights_K: Tensor) -> Tensor:
    """BRK: p^(1-w) q^w of every label, which with the background's p sum to one.

    `logits_BRK1`: the detector's, the background last; p is their softmax. `frozen_BRK`: the frozen tower's, over the
    labels alone; q is theirs. In logarithms, for with ten thousand labels both are small.
    """
    logs_BRK1 = logits_BRK1.log_softmax(dim=-1)
    mixed_BRK = (1 - weights_K) * logs_BRK1[..., :-1] + weights_K * frozen_BRK.log_softmax(dim=-1)
    return torch.cat([mixed_BRK, logs_BRK1[..., -1:]], dim=-1).softmax(dim=-1)[..., :-1]


def choose(boxes_BR4: Tensor, scores_BRK: Tensor, labels: tuple[str, ...], options: Options) -> Found:
    """The best pairs of a region and a label above the threshold, of each label those that do not overlap.

    A score that is not above the threshold is none; 0 never is.
    """
    count = scores_BRK.shape[-1]
    candidates = min(scores_BRK.shape[1] * count, max(CANDIDATES, 10 * options.top_k))
    scores_BN, pair_BN = scores_BRK.flatten(1).topk(candidates, dim=1)
    label_BN = pair_BN % count
    boxes_BN4 = _rows(boxes_BR4, pair_BN // count)
    valid_BN = scores_BN > options.threshold
    place_BT, valid_BT = nms_batch(boxes_BN4, scores_BN, options.nms, label_BN, valid_BN, keep=options.top_k)
    return Found(
        _rows(boxes_BN4, place_BT), scores_BN.gather(1, place_BT), label_BN.gather(1, place_BT), valid_BT, labels
    )


def _rows(boxes_BN4: Tensor, place_BT: Tensor) -> Tensor:
    """BT4: boxes in these places."""
    return boxes_BN4.gather(1, place_BT[..., None].expand(-1, -1, 4))
