"""Boxes of samples on their way into a batch: the fields `boxes`, `box_mask` and `box_labels`.

They follow the first view of a picture through resize, crop and augmentation. Suffixes: B samples, M boxes, 4 the sides
x0, y0, x1, y1; fractions of the model's square input.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from data_pipelines.labels import read_names
from data_pipelines.stream import Boxes, Decoded

ENOUGH = 1000
"""Samples after which data without a single box is an error."""
DROPPED = ("other_label", "cut_away", "over_max")
"""Why a box is not in a batch: its label is not among the classes, too little of it is left in view, too many."""


class BoxConfig(StrictModel):
    """Which boxes a batch holds, and how they are numbered."""

    model_config = ConfigDict(ignored_types=(cached_property,))

    labels: tuple[str, ...] | Path | None = None
    """Classes in the order of their numbers, or a file: one per line, or a json list. None: no box has a number."""
    others: Literal["drop", "keep"] = "drop"
    """Boxes of other labels: left out, or kept with the number -1."""
    max: int = Field(16, ge=1)
    """Boxes of a sample in a batch (M); those beyond it are left out, the smallest first."""
    min_visible: float = Field(0.25, gt=0, le=1)
    """A box is left out if crops leave less than this share of its area in view."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "BoxConfig":
        if self.labels is None and "others" in self.model_fields_set:
            raise ConfigError(f"data.boxes.others={self.others} has no effect without data.boxes.labels: leave it out")
        return self

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Classes in the order of their numbers. Raises ConfigError."""
        if self.labels is None:
            return ()
        names = read_names(self.labels, "data.boxes.labels") if isinstance(self.labels, Path) else self.labels
        if isinstance(names, dict) or not names or len(set(names)) < len(names) or "" in names:
            raise ConfigError(
                f"data.boxes.labels: {str(self.labels)[:80]} must be a list of distinct names, at least one, none empty"
            )
        return tuple(names)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Name -> class number."""
        return {name: number for number, name in enumerate(self.names)}


def moved(boxes_BM4: Tensor, matrix_B23: Tensor) -> Tensor:
    """BM4: the axis-parallel boxes around boxes that an augmentation has moved.

    The matrices are those that `augment` samples by: from places of the result to places of its input, -1 to 1.
    """
    linear_B22, shift_B12 = matrix_B23[:, :, :2].double(), matrix_B23[:, :, 2].double()[:, None]
    x0, y0, x1, y1 = (2 * boxes_BM4.double() - 1).unbind(-1)
    corners_BK2 = torch.stack([torch.stack([x, y], -1) for x in (x0, x1) for y in (y0, y1)], 2).flatten(1, 2)
    there_BK2 = torch.linalg.solve(linear_B22, (corners_BK2 - shift_B12).transpose(1, 2)).transpose(1, 2)
    there_BM42 = there_BK2.unflatten(1, (boxes_BM4.shape[1], 4))
    return (torch.cat([there_BM42.amin(2), there_BM42.amax(2)], dim=-1) + 1) / 2


def box_fields(
    samples: Sequence[Decoded], config: BoxConfig, matrix_B23: Tensor | None, side: int
) -> tuple[dict[str, Tensor], Counter[str]]:
    """(`boxes` BM4, `box_mask` BM, `box_labels` BM, and how many boxes were `given` and dropped, by reason).

    `matrix_B23`: the augmentation, see `moved`. `side`: of the input, in pixels; a box of less than one is dropped.
    """
    given = [sample.boxes or Boxes(torch.empty(0, 4), ()) for sample in samples]
    most = max((len(item.names) for item in given), default=0)
    boxes_BN4 = torch.zeros(len(samples), most, 4, dtype=torch.float64)
    labels_BN = torch.full((len(samples), most), -1)
    real_BN = torch.zeros(len(samples), most, dtype=torch.bool)
    for row, item in enumerate(given):
        count = len(item.names)
        boxes_BN4[row, :count], real_BN[row, :count] = item.sides_M4.double(), True
        labels_BN[row, :count] = torch.tensor([config.numbers.get(name, -1) for name in item.names], dtype=torch.int64)
    notes = Counter(given=int(real_BN.sum()))
    if config.labels is not None and config.others == "drop":
        real_BN = _without(real_BN, labels_BN < 0, "other_label", notes)
    if matrix_B23 is not None and most:
        boxes_BN4 = moved(boxes_BN4, matrix_B23)
    shown_BN4 = boxes_BN4.clamp(0, 1)
    seen_BN, whole_BN = _areas(shown_BN4), _areas(boxes_BN4)
    narrow_BN = (shown_BN4[..., 2:] - shown_BN4[..., :2]).amin(-1) * side < 1
    real_BN = _without(real_BN, (seen_BN < config.min_visible * whole_BN) | narrow_BN, "cut_away", notes)
    order_BN = torch.where(real_BN, seen_BN, -1.0).argsort(dim=1, descending=True, stable=True)
    over_BN = order_BN.argsort(dim=1) >= config.max
    real_BN = _without(real_BN, over_BN, "over_max", notes)
    # the boxes that stay, in their own order, at the front
    place_BM = (~real_BN).long().argsort(dim=1, stable=True)[:, : config.max]
    mask_BM = real_BN.gather(1, place_BM)
    boxes_BM4 = shown_BN4.gather(1, place_BM[..., None].expand(-1, -1, 4)) * mask_BM[..., None]
    labels_BM = labels_BN.gather(1, place_BM).masked_fill(~mask_BM, -1)
    short = config.max - place_BM.shape[1]
    fields = {
        "boxes": F.pad(boxes_BM4.float(), (0, 0, 0, short)),
        "box_mask": F.pad(mask_BM, (0, short)),
        "box_labels": F.pad(labels_BM, (0, short), value=-1),
    }
    return fields, notes


def _areas(boxes_BN4: Tensor) -> Tensor:
    return (boxes_BN4[..., 2] - boxes_BN4[..., 0]) * (boxes_BN4[..., 3] - boxes_BN4[..., 1])


def _without(real_BN: Tensor, bad_BN: Tensor, reason: str, notes: Counter[str]) -> Tensor:
    dropped = int((real_BN & bad_BN).sum())
    if dropped:
        notes[reason] += dropped
    return real_BN & ~bad_BN
