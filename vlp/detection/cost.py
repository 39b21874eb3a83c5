"""What regions cost beside one pass of a model's towers."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlp.detection.maps import maps_of
from vlp.detection.model import DetectionParts
from vlp.flops import TRAINED, count


def region_flops(
    model: nn.Module,
    parts: DetectionParts,
    side: int,
    channels: int,
    boxes: int,
    passes: int,
    run: Callable[[nn.Module, DetectionParts, Tensor, int], object] | None = None,
    crops: int = 0,
) -> int:
    """FLOPs of one sample, forward and backward: pyramid and region head on every level, and what windows and a second
    pass change about the tower, which may be negative.

    `model`: on the device without data (`meta`). `passes`: that its image tower costs, in forward passes. `run`: what
    is computed, if not `region_pass`. `crops`: further pictures that a tower sees without being trained.
    """
    parts = copy.deepcopy(parts).to("meta").eval().requires_grad_(False)
    tower = maps_of(model)
    pixels = torch.empty(1, channels, side, side, device="meta")
    own = count(lambda: tower(pixels, parts.config.window, dense=parts.config.residual))
    plain = count(lambda: model.encode_image(pixels))  # type: ignore[operator]
    whole = count(lambda: (run or region_pass)(model, parts, pixels, boxes))
    return passes * (own - plain) + TRAINED * (whole - own) + crops * plain


def region_pass(model: nn.Module, parts: DetectionParts, pixels_BCHW: Tensor, boxes: int) -> list[Tensor]:
    """Tower, pyramid and region head on every level, with so many boxes per picture; their places cost nothing."""
    boxes_BM4 = pixels_BCHW.new_zeros(len(pixels_BCHW), boxes, 4)
    return parts.embed(parts.levels(maps_of(model), pixels_BCHW), boxes_BM4)


def detector_pass(model: nn.Module, parts: DetectionParts, pixels_BCHW: Tensor, boxes: int) -> list[object]:
    """Tower, pyramid, dense head, and the region head with so many boxes per picture, spread over the levels evenly."""
    levels = parts.levels(maps_of(model), pixels_BCHW)
    each = -(-boxes // len(levels.maps))
    return [*parts.dense(levels.maps), *parts.embed(levels, pixels_BCHW.new_zeros(len(pixels_BCHW), each, 4))]
