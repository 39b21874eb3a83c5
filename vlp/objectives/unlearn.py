"""Unlearning of triggers that are not known: the model against changes that mislead it, the same for all pictures.

    L = L_pair(I, T) + weight * L_pair(change(I), T),   L_pair = L_clip + taught * L_distill

The changes are learned beside the model, against it: their gradient is reversed, so that they seek what misleads most,
and the model to see through it (after I-BAU, Zeng et al. 2022, arXiv 2110.03735, with one step of each in turn, and for
pictures and texts in place of classes). A backdoor is where a change that all pictures share misleads most, so it is
found early. Three kinds, for triggers come in these: an overlay on the whole picture, a patch anywhere, a smooth warp.
Several of each are sought at a time, a sample gets one of them, and all begin anew from time to time.

Suffixes: B samples of this rank, C channels, H, W rows and columns, N changes of a kind, S side of a patch.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from vlp.objectives.base import (
    Coupling,
    Dims,
    Encoder,
    Features,
    LossOutput,
    refuse_idle,
)
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.distill import Config as DistillConfig
from vlp.objectives.distill import Distill
from vlp.objectives.pair_gate import draws

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"weight": 0}
"""Without changes it is CLIP."""

Change = Literal["overlay", "patch", "warp"]
GRID = 28
"""Points across an overlay: finer detail is where any model is misled by little, backdoor or not."""
BENDS = 4
"""Points across a warp."""
OWN = ("changes", "each", "strength", "side", "bend", "pace", "restart")


class Config(StrictModel):
    """Options of the loss."""

    clip: ClipConfig = ClipConfig()
    """Options of both contrasts."""
    weight: float = Field(1.0, ge=0)
    """Of the changed pictures; 0 = off."""
    taught: float = Field(0.0, ge=0)
    """Weight of a teacher, the model this run starts from: its answers to the picture as it is are what the model is to
    give to the changed one too, see the objective distill; 0 = off."""
    student_sees: Literal["first", "second"] = "first"
    """View that the model gets beside, of `data.views`; the teacher gets the first, and changes are made to it."""
    changes: tuple[Change, ...] = Field(("overlay", "patch", "warp"), min_length=1)
    """Kinds that are sought."""
    each: int = Field(1, ge=1)
    """N, how many of a kind at a time."""
    strength: float = Field(0.3, gt=0, le=1)
    """Most that an overlay adds or takes, as a share of the range of a picture's values."""
    side: float = Field(0.2, gt=0, le=1)
    """Side of a patch, as a share of the shorter side."""
    bend: float = Field(0.08, gt=0, le=0.5)
    """Most that a warp moves a point, as a share of the side."""
    pace: float = Field(100.0, gt=0)
    """How much faster than the model the changes learn; with a rate of 1e-3, 100 is a tenth of their range a step."""
    restart: int = Field(100, ge=1)
    """Steps after which changes begin anew: a model that sees through one may know another."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        refuse_idle(self, {
            "weight=0": () if self.weight else OWN,
            f"changes={','.join(self.changes)}": [
                name for name, kind in (("strength", "overlay"), ("side", "patch"), ("bend", "warp"))
                if kind not in self.changes
            ],
        })  # fmt: skip
        return self


class _Against(torch.autograd.Function):
    """The same value; its gradient turned round."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


class Changes(nn.Module):
    """Overlays, patches and warps that are sought; values from -1 to 1 by tanh."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config = config
        mean, deviation = (dims.image.mean, dims.image.std) if dims.image is not None else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean_C11", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation_C11", torch.tensor(deviation)[:, None, None], persistent=False)
        side = max(1, round(config.side * (dims.image.size if dims.image is not None else GRID)))
        shapes = {"overlay": (len(mean), GRID, GRID), "patch": (len(mean), side, side), "warp": (2, BENDS, BENDS)}
        self.sought = nn.ParameterDict({
            kind: nn.Parameter(torch.empty(config.each, *shapes[kind])) for kind in config.changes
        })  # fmt: skip
        self.register_buffer("updates", torch.tensor(0))
        self.begin()

    updates: Tensor
    mean_C11: Tensor
    deviation_C11: Tensor

    @torch.no_grad()
    def begin(self) -> None:
        """Start all changes anew, as the number of updates decides: alike on all ranks."""
        chance = torch.Generator().manual_seed(int(self.updates))
        for value in self.sought.values():
            value.copy_(torch.randn(value.shape, generator=chance) / self.config.pace)

    def forward(self, pixels_BCHW: Tensor, keys: tuple[str, ...]) -> Tensor:
        """Pictures as the model takes them, each with one change, which a sample's key and the step decide."""
        kinds, each = self.config.changes, self.config.each
        draw_B = draws(keys, int(self.updates)).to(pixels_BCHW.device)
        parts, order = [], []
        for place, kind in enumerate(kinds):
            rows = (draw_B % len(kinds) == place).nonzero()[:, 0]
            rest_B = draw_B[rows] // len(kinds)
            sought = torch.tanh(self.config.pace * _Against.apply(self.sought[kind]))  # type: ignore[no-untyped-call]
            unit_BCHW = (pixels_BCHW[rows].float() * self.deviation_C11 + self.mean_C11).clamp(0.0, 1.0)
            if len(rows):
                changed = getattr(self, f"_{kind}")(unit_BCHW, sought[rest_B % each], rest_B // each)
            else:  # what is sought has a gradient on every rank
                changed = unit_BCHW + 0.0 * sought.sum()
            parts.append((changed - self.mean_C11) / self.deviation_C11)
            order.append(rows)
        whole = torch.cat(parts)[torch.cat(order).argsort()]
        return whole.to(pixels_BCHW).contiguous(memory_format=torch.channels_last)

    def _overlay(self, unit_BCHW: Tensor, value_BCGG: Tensor, draw_B: Tensor) -> Tensor:
        grown = F.interpolate(value_BCGG, unit_BCHW.shape[2:], mode="bilinear", align_corners=False)
        return (unit_BCHW + self.config.strength * grown).clamp(0.0, 1.0)

    def _patch(self, unit_BCHW: Tensor, value_BCSS: Tensor, draw_B: Tensor) -> Tensor:
        (rows, columns), side = unit_BCHW.shape[2:], value_BCSS.shape[-1]
        top_B, left_B = draw_B % (rows - side + 1), draw_B // (rows - side + 1) % (columns - side + 1)
        run = torch.arange(side, device=unit_BCHW.device)
        sample = torch.arange(len(unit_BCHW), device=unit_BCHW.device)[:, None, None]
        place = sample, slice(None), (top_B[:, None] + run)[:, :, None], (left_B[:, None] + run)[:, None, :]
        changed = unit_BCHW.clone()
        changed[place] = (0.5 + 0.5 * value_BCSS).permute(0, 2, 3, 1)
        return changed

    def _warp(self, unit_BCHW: Tensor, value_B2GG: Tensor, draw_B: Tensor) -> Tensor:
        return warped(unit_BCHW, self.config.bend * value_B2GG)


def warped(unit_BCHW: Tensor, shift_B2GG: Tensor) -> Tensor:
    """Pictures whose points come from elsewhere, smoothly: from `shift_B2GG` of the sides to the right and below."""
    shift = F.interpolate(shift_B2GG, unit_BCHW.shape[2:], mode="bicubic", align_corners=True)
    straight = torch.eye(2, 3, device=unit_BCHW.device).expand(len(unit_BCHW), 2, 3)
    grid = F.affine_grid(straight, list(unit_BCHW.shape), align_corners=False)
    moved = grid + 2.0 * shift.permute(0, 2, 3, 1)  # a picture is 2 wide there
    return F.grid_sample(unit_BCHW, moved, padding_mode="border", align_corners=False)


class Unlearn(nn.Module):
    """Holds the changes, and the teacher."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config = config
        how = DistillConfig(weight=config.taught, student_sees=config.student_sees, clip=config.clip)
        self.pairs = Distill(how, dims)
        if config.weight:
            self.changes = Changes(config, dims)

    def attach(self, model: nn.Module) -> None:
        """Keep the model as it is now, for a teacher."""
        self.pairs.attach(model)

    def after_step(self, model: nn.Module) -> None:
        """Count the update; begin anew where it is time."""
        if self.config.weight:
            self.changes.updates += 1
            if int(self.changes.updates) % self.config.restart == 0:
                self.changes.begin()

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers on the pair, the teacher's too if there is one, and the changed pictures."""
        features = self.pairs.encode(model, pixels_BCHW, batch)
        if not self.config.weight:
            return features
        changed_BD = model.encode_image(self.changes(pixels_BCHW, batch.keys), normalize=True)
        return replace(features, extra={**features.extra, "changed": changed_BD})

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        plain: LossOutput = self.pairs(features, logit_scale)
        if not self.config.weight:
            return plain
        changed: LossOutput = self.pairs(replace(features, image_BD=features.extra["changed"]), logit_scale)
        parts = {**plain.parts, "changed": changed.loss.detach()}
        return LossOutput(plain.loss + self.config.weight * changed.loss, parts)


def build(config: Config, dims: Dims) -> Unlearn:
    """The objective; changes take the size of the pictures and what their values span."""
    return Unlearn(config, dims)
