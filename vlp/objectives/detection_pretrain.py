"""Detection-oriented pretraining from pairs alone (DITO: Kim et al. 2023, arXiv 2310.00161).

Random boxes of a picture are cut out of every level of a feature pyramid and embedded by a detector's region head. Over
the boxes of a picture their maximum is taken, number by number, which gives one vector of the picture per level; it is
contrasted with the text as in CLIP, and the losses of the levels are averaged:

    u^l = max over boxes of head(RoIAlign(pyramid^l, box)),   L = mean over l of CLIP(u^l, v)

A box that holds nothing the caption speaks of loses against the others in the maximum, where a mean of the boxes' own
losses would teach it the caption all the same. Boxes depend on the sample's key and the number of updates alone, so
that ranks, parts of a batch and resumes see the same ones. Beside the paper's maximum there is `pool=attention`: for
each pair the boxes are weighed by their similarity to that pair's text (PACL: Mukhoti et al. 2022, arXiv 2212.04994,
equation 3), which leaves the embedding of a single box in the space of the texts.

`crop_weight` adds what the captions taught the whole-picture tower: every box is drawn to what the tower as it started
makes of the box cut out as a picture (CLIPSelf: Wu et al. 2023, arXiv 2310.01403, here with the boxes of the contrast):

    L_crop = mean over l and boxes of 1 - cos(head(RoIAlign(pyramid^l, box)), tower(crop(picture, box)))

Suffixes: B samples, M boxes, N boxes of all samples, D width of the shared space, R pictures and C texts of all pairs.
"""

import copy
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp.detection.cost import region_flops, region_pass
from vlp.detection.maps import MapTower, maps_of
from vlp.detection.model import NAME, DetectionParts, PartsConfig, has_parts, load_parts, make_parts
from vlp.detection.roi import roi_align
from vlp.distributed import any_sharded, gather
from vlp.models.folders import place_of
from vlp.objectives.base import (
    Coupling,
    Dims,
    Encoder,
    Features,
    LossOutput,
    contrast_matrix,
    encode_pairs,
    false_negatives,
    phrase_labels,
    refuse_idle,
    with_phrases,
)
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.clip import clip_loss
from vlp.phases import phase

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"region_weight": 0, "clip_weight": 1}
"""Without regions nothing is left but CLIP."""

Pool = Literal["max", "mean", "attention"]
LEVEL = "level "
"""Beginning of the names under which features carry the regions of a level."""
CROP = "crop"
"""Name under which they carry every box's cosine with its crop, BM: the mean over levels."""


class Config(StrictModel):
    """Options of the loss; the defaults are the paper's as far as they are known."""

    clip: ClipConfig = ClipConfig()
    """Options of the contrasts, those of the objective clip."""
    region_weight: float = Field(1.0, ge=0)
    """Weight of the mean over levels."""
    clip_weight: float = Field(0.0, ge=0)
    """Weight of CLIP between whole pictures and texts, from the same pass; the paper trains regions alone."""
    crop_weight: float = Field(0.0, ge=0)
    """Weight of the likeness of regions to what the tower made of them as pictures at the start."""
    pool: Pool = "max"
    """How the boxes of a picture become one vector. max: the paper's. mean: of all boxes. attention: per text, weighed
    by their similarity to it."""
    pool_temperature: float = Field(0.1, gt=0)
    """attention: cosines are divided by it before the softmax over boxes."""
    boxes: int = Field(16, ge=1)
    """M: random boxes per picture and step."""
    min_side: float = Field(0.15, gt=0, le=1)
    """Shortest side of a box, as a share of the picture's."""
    max_side: float = Field(0.8, gt=0, le=1)
    max_aspect: float = Field(2.0, ge=1)
    """Largest ratio of the sides before a box is cut off at `max_side`; evenly drawn in the logarithm."""
    whole: bool = True
    """The first box is the whole picture, so that no caption is without its subject."""
    seed: int = 0
    """Of the boxes."""
    parts: PartsConfig | None = None
    """Sizes of pyramid and heads; default: as in `start`, else those of PartsConfig."""
    start: Path | None = None
    """Bundle or run whose pyramid and heads are trained on; default: `model.weights`, where it holds any."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        if self.region_weight == self.clip_weight == self.crop_weight == 0:
            raise ConfigError("objective.region_weight, clip_weight and crop_weight are all 0: set one of them")
        if self.min_side > self.max_side:
            raise ConfigError(
                f"objective.min_side={self.min_side} is above objective.max_side={self.max_side}: lower it"
            )
        boxes = ("boxes", "min_side", "max_side", "max_aspect", "whole", "seed")
        idle = {
            "region_weight=0": () if self.region_weight else ("pool",),
            "region_weight=0 and crop_weight=0": () if self.has_regions else (*boxes, "parts", "start"),
            f"pool={self.pool}": () if self.pool == "attention" else ("pool_temperature",),
        }
        refuse_idle(self, idle)
        if self.pool == "attention":
            ours = ClipConfig(mask=self.clip.mask, image_weight=self.clip.image_weight, smoothing=self.clip.smoothing)
            if self.clip != ours.model_copy(update={"fixed_temperature": self.clip.fixed_temperature}):
                raise ConfigError(
                    "objective.clip.exchange and precision have no effect with objective.pool=attention, which "
                    "compares every box with every text on each rank: leave them out"
                )
        return self

    @property
    def has_regions(self) -> bool:
        """Whether anything is learned from boxes."""
        return bool(self.region_weight or self.crop_weight)


def random_boxes(keys: Sequence[str], update: int, config: Config) -> Tensor:
    """BM4 float32, xyxy fractions: boxes of every sample by its key, the number of updates and the seed alone."""
    drawn_BM4 = np.stack([_numbers(f"{config.seed}/{update}/{key}", config.boxes) for key in keys])
    low, high = math.log(config.min_side), math.log(config.max_side)
    side_BM = np.exp(low + (high - low) * drawn_BM4[..., 0])
    stretch_BM = np.exp((drawn_BM4[..., 1] - 0.5) * math.log(config.max_aspect))  # the ratio's square root
    size_BM2 = np.stack([side_BM * stretch_BM, side_BM / stretch_BM], axis=-1).clip(config.min_side, config.max_side)
    start_BM2 = drawn_BM4[..., 2:] * (1 - size_BM2)
    boxes_BM4 = np.concatenate([start_BM2, start_BM2 + size_BM2], axis=-1)
    if config.whole:
        boxes_BM4[:, 0] = (0, 0, 1, 1)
    return torch.from_numpy(boxes_BM4.astype(np.float32))


def _numbers(name: str, rows: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """rows x 4 even numbers from 0 to 1."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random((rows, 4))


def pool_boxes(regions_BMD: Tensor, pool: Pool) -> Tensor:
    """BD, normalised: the boxes of every picture as one vector."""
    pooled_BD = regions_BMD.amax(dim=1) if pool == "max" else regions_BMD.mean(dim=1)
    return F.normalize(pooled_BD, dim=-1)


def attention_scores(regions_RMD: Tensor, text_CD: Tensor, temperature: float) -> Tensor:
    """RC: cosine of every text with the boxes of every picture, weighed by their similarity to that very text.

    The weighted sum is normalised, as in PACL's equation 4.
    """
    cosine_RMC = regions_RMD @ text_CD.T
    weight_RMC = (cosine_RMC / temperature).softmax(dim=1)
    dot_RC = (weight_RMC * cosine_RMC).sum(dim=1)
    # the square of a weighted sum's length is weights x products of boxes x weights: no RCD tensor is needed
    products_RMM = regions_RMD @ regions_RMD.transpose(1, 2)
    square_RC = (weight_RMC * (products_RMM @ weight_RMC)).sum(dim=1)
    return dot_RC / square_RC.clamp(min=1e-12).sqrt()


class DetectionPretrain(nn.Module):
    """Holds the options, pyramid and heads, the number of updates, and a reference to the model's image tower."""

    whole_towers = True
    updates: Tensor

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config, self.dims = config, dims
        self.parts: DetectionParts | None = None
        self._tower: tuple[MapTower, ...] = ()
        """In a tuple, so that the model's parameters do not become the objective's."""
        self._teacher: tuple[nn.Module, ...] = ()
        """The tower as it started; not saved, for it starts the same in a resumed run."""
        if config.has_regions:
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def attach(self, model: nn.Module) -> None:
        """Make the pyramid and the heads, or load them; keep a copy of the tower. Raises ConfigError, BundleError."""
        if not self.config.has_regions:
            return
        self._tower = (maps_of(model),)
        self.parts = start_parts(self.config.parts, self.config.start, self.dims, model)
        self.parts.info = self.parts.info.model_copy(update={"stage": "pretrain", "base_labels": ()})
        self.parts.to(next(model.parameters()).device)
        # trained in fine-tuning; what gets no gradient would only be moved by weight decay
        for unused in (self.parts.dense, self.parts.background_D, self.parts.log_scale):
            unused.requires_grad_(False)
        if self.config.crop_weight:
            self._teacher = (self._start_of(model),)

    def _start_of(self, model: Any) -> nn.Module:
        if self.dims.weights is None:
            raise ConfigError(
                f"objective.crop_weight={self.config.crop_weight} teaches regions what the tower makes of crops at the "
                "start, which is nothing yet: set model.weights to a trained bundle or run"
            )
        if any_sharded(model.visual.parameters()):
            raise ConfigError("objective.crop_weight copies the image tower: set run.strategy=ddp, not fsdp")
        teacher: nn.Module = copy.deepcopy(model.visual)
        return teacher.eval().requires_grad_(False)

    def after_step(self, model: nn.Module) -> None:
        """Count."""
        if self.config.has_regions:
            self.updates += 1

    def extra_parts(self) -> dict[str, nn.Module]:
        """Pyramid and heads, for the bundle."""
        return {} if self.parts is None else {NAME: self.parts}

    def more_flops(self, model: nn.Module, side: int, channels: int, passes: int) -> int:
        """What regions cost beside one pass of the towers, forward and backward, of one sample."""
        if self.parts is None:
            return 0
        boxes = self.config.boxes
        crops = boxes if self.config.crop_weight else 0
        return region_flops(model, self.parts, side, channels, boxes, passes, crops=crops)

    def picture_pass(self, model: Any, pixels_BCHW: Tensor) -> object:
        """What is computed of pictures, for an estimate of its memory."""
        if self.parts is None:
            return model.encode_image(pixels_BCHW)
        return region_pass(model, self.parts, pixels_BCHW, self.config.boxes)

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """One pass of both towers; `extra`: per level the pooled regions, BD, or with attention all of them, BMD."""
        config = self.config
        if self.parts is None:
            return encode_pairs(model, pixels_BCHW, batch, config.clip.mask, "detection_pretrain")
        boxes_BM4 = random_boxes(batch.keys, int(self.updates), config).to(pixels_BCHW.device)
        (tower,) = self._tower
        with phase("forward_image"):
            levels = self.parts.levels(tower, pixels_BCHW)
            regions = self.parts.embed(levels, boxes_BM4)
        extra = {}
        if config.crop_weight:
            extra[CROP] = self._likeness(regions, pixels_BCHW, boxes_BM4)
        if config.region_weight:
            pool = config.pool
            pooled = regions if pool == "attention" else [pool_boxes(regions_BMD, pool) for regions_BMD in regions]
            extra |= {f"{LEVEL}{number}": found for number, found in enumerate(pooled)}
        text_BD = model.encode_text(batch.text_input, normalize=True)
        # without CLIP's weight its features only say how many samples there are, and lead no gradient to the tower
        image_BD = F.normalize(levels.embedding_BD, dim=-1) if config.clip_weight else text_BD.detach()
        features = Features(image_BD, text_BD, extra=extra)
        return with_phrases(features, batch, config.clip.mask, "detection_pretrain")

    def _likeness(self, regions: Sequence[Tensor], pixels_BCHW: Tensor, boxes_BM4: Tensor) -> Tensor:
        """BM: mean over levels of the cosine of every region with the tower's embedding of its crop."""
        (teacher,) = self._teacher
        with torch.no_grad(), phase("forward_image"):
            crops_NCHW = roi_align(pixels_BCHW, boxes_BM4, pixels_BCHW.shape[-1], samples=1).flatten(0, 1)
            taught_BMD = F.normalize(teacher(crops_NCHW).float(), dim=-1).unflatten(0, boxes_BM4.shape[:2])
        return torch.stack([(found_BMD * taught_BMD).sum(dim=-1) for found_BMD in regions]).mean(dim=0)

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """`clip_weight` x CLIP + `region_weight` x the mean over levels + `crop_weight` x crops, over all ranks."""
        config, losses, parts = self.config, [], {}
        if config.clip_weight:
            loss, forward, backward = clip_loss(features, logit_scale, config.clip)
            losses.append(config.clip_weight * loss)
            parts = {"image_to_text": forward.detach(), "text_to_image": backward.detach()}
        found = {name: value for name, value in features.extra.items() if name.startswith(LEVEL)}
        if found:
            levels = [self._level_loss(value, features, logit_scale) for value in found.values()]
            losses.append(config.region_weight * torch.stack(levels).mean())
            names = self.parts.config.levels if self.parts is not None else range(len(levels))
            parts |= {f"level_{number}": loss.detach() for number, loss in zip(names, levels, strict=True)}
        if CROP in features.extra:
            crop = 1 - gather(features.extra[CROP]).mean()
            losses.append(config.crop_weight * crop)
            parts[CROP] = crop.detach()
        return LossOutput(torch.stack(losses).sum(), parts)

    def _level_loss(self, regions: Tensor, features: Features, logit_scale: Tensor) -> Tensor:
        """CLIP of one level; `regions`: BD, with attention BMD."""
        options = self.config.clip
        if self.config.pool != "attention":
            own = Features(regions, features.text_BD, features.phrase_ids_BP, features.text_phrase_ids_BQ)
            return clip_loss(own, logit_scale, options)[0]
        if options.fixed_temperature is not None:
            logit_scale = logit_scale.new_tensor(1.0 / options.fixed_temperature)
        scores_RC = attention_scores(
            gather(regions).float(), gather(features.text_BD).float(), self.config.pool_temperature
        )
        labels = tuple(map(gather, phrase_labels(features)))
        excluded_RC = false_negatives(labels, labels).excluded_RC if labels else None
        forward, backward = contrast_matrix(logit_scale.float() * scores_RC, excluded_RC, options.smoothing)
        return options.image_weight * forward + (1 - options.image_weight) * backward


def start_parts(config: PartsConfig | None, start: Path | None, dims: Dims, model: nn.Module) -> DetectionParts:
    """Parts of a bundle that is trained on, else fresh ones. Raises ConfigError where other sizes are asked for."""
    source = start or (place_of(dims.weights) if dims.weights else None)
    if source is None or (start is None and not (source.is_dir() and has_parts(source))):
        return make_parts(config or PartsConfig(), model, dims.embed)
    parts = load_parts(source, model)
    if parts.info.embed != dims.embed:
        raise ConfigError(
            f"objective.start={source}: its region head ends in {parts.info.embed} numbers, the model's space has "
            f"{dims.embed}: take both from one bundle"
        )
    if config is not None and config != parts.config:
        ours, theirs = config.model_dump(), parts.config.model_dump()
        key = next(key for key, value in ours.items() if value != theirs[key])
        raise ConfigError(
            f"objective.parts.{key}={ours[key]!r}, but the parts in {source} have {theirs[key]!r}: leave "
            "objective.parts out, or start from other weights"
        )
    return parts


def build(config: Config, dims: Dims) -> DetectionPretrain:
    """The objective; pyramid and heads are made when it meets the model."""
    return DetectionPretrain(config, dims)
