"""Distillation from a teacher CLIP: the student's similarities over the batch follow the teacher's, beside plain CLIP.

Softmax distillation (Hinton et al. 2015, arXiv 1503.02531) of the rows and columns of the similarity matrix, equal to
open_clip's DistillClipLoss, over the batch of all ranks. A teacher of another width will do, for similarities alone are
compared; it must read the student's tokens. With the teacher `start` a fine-tuned model stays close to what it was.
Suffixes: B samples of this rank, R and C rows and columns of a tile, D width of the student's embedding, E of the
teacher's.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from data_pipelines.preprocess import ImageConfig
from vlp import distributed
from vlp.bundle import load_bundle, same_words
from vlp.models.lean import LeanModel
from vlp.objectives._kernel import Judge, Pairs, Side
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
    way_for,
)
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.clip import clip_loss

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"weight": 0}
"""Without the teacher's term no teacher is loaded."""
START = "start"
PARTS = ("image_to_text", "text_to_image", "distill")
WHOLE = 4096
"""Samples of all ranks up to which both terms come from one matrix of all pairs; above, from tiles."""


class Config(StrictModel):
    """Options of the loss; the defaults are open_clip's."""

    teacher: str = START
    """A bundle, a run or an open_clip folder with the recipe's tokenizer (`tokenizer.kind=weights` with `model.weights`
    of the same family, or CLIP's own). start: the weights this run starts from."""
    weight: float = Field(1.0, ge=0)
    """Of the teacher's term, beside 1 of plain CLIP."""
    student_sees: Literal["first", "second"] = "first"
    """View of a picture that the student gets, of `data.views`; the teacher gets the first, as `data.augment` says."""
    clip: ClipConfig = ClipConfig()
    """Options of plain CLIP, those of the objective clip; a fixed temperature is for the teacher's term too."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        refuse_idle(self, {"weight=0": () if self.weight else ("teacher",)})
        return self


def teacher_judge(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Judge:
    """Targets in proportion to the exponential of the teacher's scaled similarities.

    The kernel divides them by their sums over rows and over columns, which makes them the teacher's two softmaxes.
    """
    with torch.no_grad():  # one offset for all tiles of all ranks: near the highest score, so that nothing overflows
        own = (image_BE.float() * text_BE.float()).sum(dim=1).amax() * scale
        highest = distributed.gather(own[None]).amax()

    def judge(rows: Side, columns: Side) -> Pairs:
        logits_RC = scale * (rows[0].float() @ columns[1].float().T)
        return Pairs(target_RC=(logits_RC - highest).exp_())

    return judge


def both_losses(
    image_BD: Tensor, text_BD: Tensor, teacher_image_BE: Tensor, teacher_text_BE: Tensor, scale: Tensor, other: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(image-to-text, text-to-image, teacher's term) of the batch of all ranks in one piece, in half the time.

    `scale` and `other`: the student's and the teacher's.
    """
    logits_BB = scale.float() * (image_BD.float() @ text_BD.float().T)
    taught_BB = other * (teacher_image_BE.float() @ teacher_text_BE.float().T)
    own, soft = [], []
    for student_BB, teacher_BB in ((logits_BB, taught_BB), (logits_BB.T, taught_BB.T)):
        logs_BB = student_BB.log_softmax(dim=1)
        own.append(-logs_BB.diagonal().mean())
        soft.append(-(logs_BB * teacher_BB.softmax(dim=1)).sum(dim=1).mean())
    return own[0], own[1], 0.5 * (soft[0] + soft[1])


def seen_by(image: ImageConfig, student: ImageConfig | None, pixels_BCHW: Tensor) -> Tensor:
    """Network input of a student as that of a model with other means, deviations or size."""
    if student is not None and (image.mean, image.std, image.scale) != (student.mean, student.std, student.scale):
        mean, deviation, own_mean, own_deviation = (
            torch.tensor(values, device=pixels_BCHW.device).mul_(config.scale).view(1, -1, 1, 1)
            for config in (image, student)
            for values in (config.mean, config.std)
        )
        pixels_BCHW = (pixels_BCHW * own_deviation + (own_mean - mean)) / deviation
    if pixels_BCHW.shape[-1] != image.size:
        pixels_BCHW = F.interpolate(pixels_BCHW.float(), (image.size, image.size), mode="bilinear", antialias=True)
    return pixels_BCHW


class Distill(nn.Module):
    """Holds the teacher, outside of its state: it does not change, and is not saved with the run."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config, self.dims = config, dims
        self._teacher: tuple[LeanModel, ...] = ()
        self._image: ImageConfig | None = None
        """How the teacher wants its pictures, where that is not how the student gets them."""

    def attach(self, model: nn.Module) -> None:
        """Load or copy the teacher. Raises ConfigError for one that reads other tokens or pictures."""
        if not self.config.weight:
            return
        if self.config.teacher == START:
            if distributed.any_sharded(model.parameters()):
                raise ConfigError("objective.teacher='start' copies the model: set run.strategy=ddp, not fsdp")
            teacher = copy.deepcopy(model)
        else:
            teacher = self._load(self.config.teacher)
        device = next(model.parameters()).device
        self._teacher = (LeanModel(teacher.to(device).eval().requires_grad_(False)),)

    def _load(self, source: str) -> nn.Module:
        bundle, where = load_bundle(Path(source)), f"objective.teacher={source!r}"
        image, tokenizer = self.dims.image, self.dims.tokenizer
        if image is not None and image.channels != bundle.image.channels:
            raise ConfigError(
                f"{where} takes pictures of {bundle.image.channels} channels, data.image.channels={image.channels}: "
                "choose a teacher for these pictures"
            )
        if tokenizer is not None and not same_words(bundle.tokenizer, tokenizer):
            raise ConfigError(
                f"{where} has another tokenizer than the recipe, so that token ids would mean other words to it: "
                "choose a teacher with the recipe's tokenizer, or start from its weights with tokenizer.kind=weights"
            )
        longest = bundle.tokenizer.config.context_length
        if tokenizer is not None and tokenizer.config.context_length > longest:
            raise ConfigError(
                f"{where} reads {longest} tokens, tokenizer.context_length={tokenizer.config.context_length}: "
                f"set tokenizer.context_length={longest}"
            )
        self._image = bundle.image
        return bundle.model

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers of the student, and of the teacher without gradient."""
        second = self.config.student_sees == "second"
        own_BCHW = further(batch, "views", 1, "distill")[0] if second else pixels_BCHW
        features = encode_pairs(model, own_BCHW, batch, self.config.clip.mask, "distill")
        if not self.config.weight:
            return features
        if batch.image_features is not None:
            raise ConfigError(
                "objective.name='distill' shows the teacher the pictures, but with both trunks frozen their features "
                "are computed once: set model.lock_image=false or model.lock_text=false"
            )
        (teacher,) = self._teacher
        with torch.no_grad():
            pixels_BCHW = pixels_BCHW if self._image is None else seen_by(self._image, self.dims.image, pixels_BCHW)
            pixels_BCHW = pixels_BCHW.to(next(teacher.parameters()).dtype)
            image_BE = teacher.encode_image(pixels_BCHW, normalize=True)
            text_BE = teacher.encode_text(batch.tokens, normalize=True)
        extra = {"teacher_image": image_BE, "teacher_text": text_BE}
        return replace(features, extra=extra)

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """Plain CLIP and the teacher's term over the batch of all ranks."""
        config, clip = self.config, self.config.clip
        if not config.weight:
            loss, *own = clip_loss(features, logit_scale, clip)
            return LossOutput(loss, dict(zip(PARTS, (value.detach() for value in own), strict=False)))
        if clip.fixed_temperature is not None:
            logit_scale = logit_scale.new_tensor(1.0 / clip.fixed_temperature)
        scale = self._teacher[0].logit_scale.detach().float().exp()
        sides = features.extra["teacher_image"].detach(), features.extra["teacher_text"].detach()
        count = len(features.image_BD)
        at_once = way_for(clip.exchange, count) == "gather" and count * distributed.world_size() <= WHOLE
        if at_once and clip.mask == "none" and not clip.smoothing:
            everyone = distributed.gather(features.image_BD), distributed.gather(features.text_BD)
            teachers = distributed.gather(sides[0]), distributed.gather(sides[1])
            forward, backward, distilled = both_losses(*everyone, *teachers, logit_scale, scale)
            loss = clip.image_weight * forward + (1.0 - clip.image_weight) * backward
        else:
            loss, forward, backward = clip_loss(features, logit_scale, clip)
            exact: dict[str, Any] = {"exchange": clip.exchange, "precision": clip.precision}
            soft = contrast(features, logit_scale, sides, teacher_judge(*sides, scale), **exact)
            distilled = 0.5 * soft[0] + 0.5 * soft[1]
        parts = dict(zip(PARTS, (forward.detach(), backward.detach(), distilled.detach()), strict=True))
        return LossOutput(loss + config.weight * distilled, parts)


def build(config: Config, dims: Dims) -> Distill:
    """The objective; its teacher is loaded when it meets the model."""
    return Distill(config, dims)
