"""Detector fine-tuning on boxes of base categories: where objects are, and which text they are called by.

The second half of DITO (Kim et al. 2023, arXiv 2310.00161) as its released code does it: one anchor per point with
centreness, an IoU loss of the boxes, and a classifier whose weights are the texts of the categories, read by the frozen
text tower, beside a learned background. The parts (pyramid, heads) come from the bundle that the run starts from, where
it has any, and are written into the one that it ends with. Regions for the classifier are the true boxes and the best
proposals of the step itself, so nothing is drawn at random.

Suffixes: B pictures, M boxes, P points of all levels, R regions (boxes and proposals), D embedding width, K classes.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp.detection.boxes import IouLoss, is_valid
from vlp.detection.cost import detector_pass, region_flops
from vlp.detection.losses import BACKGROUND, IGNORED, centre_loss, class_logits, class_loss, side_loss
from vlp.detection.maps import MapTower, maps_of
from vlp.detection.model import NAME, DetectionParts, PartsConfig
from vlp.detection.propose import join_levels, propose
from vlp.detection.targets import Targets, assign_points, match_regions
from vlp.infer import make_prompts, pool_prompts
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput
from vlp.objectives.detection_pretrain import start_parts
from vlp.phases import phase

NEEDS: tuple[str, ...] = ("pixels", "boxes", "box_mask", "box_labels")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = None
"""Boxes and texts of categories in place of captions: no setting makes it plain CLIP."""
TEXTS = 64
"""Prompts that go through the text tower together."""


class Config(StrictModel):
    """Options of fine-tuning; the defaults are the paper's, as far as its code tells them."""

    parts: PartsConfig | None = None
    """Sizes of pyramid and heads; default: as in `start`, else those of PartsConfig."""
    start: Path | None = None
    """Bundle or run whose pyramid and heads are trained on; default: `model.weights`, where it holds any."""
    templates: tuple[str, ...] = Field(("{}",), min_length=1)
    """Prompts of a category, averaged; `vlp detect` uses them too unless told otherwise."""
    backbone_rate: float = Field(0.6, ge=0)
    """The image tower's multiple of the learning rate; 0 leaves it as it is."""
    proposals: int = Field(32, ge=0)
    """Best proposals of each picture that the classifier learns from, beside its boxes."""
    match: float = Field(0.5, gt=0, lt=1)
    """IoU with a box from which a proposal is of its category; below it is background."""
    background_weight: float = Field(0.9, ge=0)
    """Of background regions in the classifier's loss, beside 1."""
    radius: float | None = Field(1.5, gt=0)
    """Cells around the middle of a box whose points answer for it; null: all that lie in it."""
    centre_of: Literal["everywhere", "boxes"] = "everywhere"
    """Points that learn centreness. everywhere: outside of boxes it is 0. boxes: those within boxes alone, so that
    objects nobody marked are not unlearned (OLN)."""
    box_loss: IouLoss = "linear"
    class_weight: float = Field(1.0, ge=0)
    box_weight: float = Field(2.0, ge=0)
    centre_weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Config":
        if not (self.class_weight or self.box_weight or self.centre_weight):
            raise ConfigError("objective.class_weight, box_weight and centre_weight are all 0: nothing is learned")
        return self


def classes_of(match_BK: Tensor, classes_BM: Tensor, filled_BK: Tensor) -> Tensor:
    """BK: class of every proposal: that of the box it was matched with, BACKGROUND without one, IGNORED if no box."""
    if classes_BM.shape[1] == 0:
        found_BK = torch.full_like(match_BK, BACKGROUND)
    else:
        found_BK = torch.where(match_BK < 0, BACKGROUND, classes_BM.gather(1, match_BK.clamp(min=0)))
    return found_BK.masked_fill(~filled_BK, IGNORED)


class DetectionFinetune(nn.Module):
    """Holds the parts of the detector and the texts of the categories, which do not change."""

    whole_towers = True
    texts_KD: Tensor

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        if not dims.box_labels:
            raise ConfigError("objective.name='detection_finetune' needs data.boxes.labels: the base categories")
        if dims.tokenizer is None:
            raise ConfigError("objective.name='detection_finetune' needs the run's tokenizer, to read category names")
        self.config, self.dims = config, dims
        self.labels = tuple(dims.box_labels)
        self.parts: DetectionParts | None = None
        self._tower: tuple[MapTower, ...] = ()
        """In a tuple, so that the model's parameters do not become the objective's."""
        self.register_buffer("texts_KD", torch.zeros(len(self.labels), dims.embed))

    def attach(self, model: nn.Module) -> None:
        """Make or load the parts, and read the names of the categories. Raises ConfigError, BundleError."""
        device = next(model.parameters()).device
        self._tower = (maps_of(model),)
        self.parts = start_parts(self.config.parts, self.config.start, self.dims, model)
        changed = {"stage": "finetune", "base_labels": self.labels, "templates": self.config.templates}
        self.parts.info = self.parts.info.model_copy(update=changed)
        self.texts_KD = self._read_labels(model, device)
        self.to(device)

    @torch.no_grad()
    def _read_labels(self, model: Any, device: torch.device) -> Tensor:
        """KD: normalised texts of the categories. The text tower gets no gradient, so they stay right."""
        assert self.dims.tokenizer is not None
        tokens_NL = self.dims.tokenizer(make_prompts(self.labels, self.config.templates)).to(device)
        training = model.training
        model.eval()
        rows = [model.encode_text(chunk_NL, normalize=True).float() for chunk_NL in tokens_NL.split(TEXTS)]
        model.train(training)
        return pool_prompts(torch.cat(rows), len(self.labels))

    def rate_scale(self, name: str) -> float:
        """Multiple of the learning rate for a parameter of the model."""
        return self.config.backbone_rate if name.startswith("visual.") else 1.0

    def extra_parts(self) -> dict[str, nn.Module]:
        """Pyramid and heads, for the bundle."""
        assert self.parts is not None, "attach comes first"
        return {NAME: self.parts}

    def more_flops(self, model: nn.Module, side: int, channels: int, passes: int) -> int:
        """What pyramid and heads cost beside one pass of the towers, forward and backward, of one sample.

        Proposals alone count as regions; the text tower, which rests, is counted by the trainer all the same.
        """
        assert self.parts is not None, "attach comes first"
        return region_flops(model, self.parts, side, channels, self.config.proposals, passes, detector_pass)

    def picture_pass(self, model: nn.Module, pixels_BCHW: Tensor) -> object:
        """What is computed of pictures, for an estimate of its memory."""
        assert self.parts is not None, "attach comes first"
        return detector_pass(model, self.parts, pixels_BCHW, self.config.proposals)

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """The image tower and the heads; what every point and region says, and what it should have said.

        `extra`: centre BP, sides BP4, regions BRD, and their targets box BP, ltrb BP4, centreness BP, inside BP, class
        BR. The text tower is not called; `text_BD` repeats the pictures.
        """
        assert self.parts is not None, "attach comes first"
        by = "detection_finetune"
        boxes_BM4, mask_BM = batch.require("boxes", by).float(), batch.require("box_mask", by)
        labels_BM = batch.require("box_labels", by)
        mask_BM = mask_BM & is_valid(boxes_BM4)
        boxes_BM4 = torch.where(mask_BM[..., None], boxes_BM4, 0.0)
        (tower,) = self._tower
        with phase("forward_image"):
            levels = self.parts.levels(tower, pixels_BCHW)
        points, centre_BP, sides_BP4 = join_levels(self.parts.dense(levels.maps))
        targets = assign_points(points, boxes_BM4, mask_BM, self.config.radius)
        found_BK4, _, filled_BK = propose(points, centre_BP, sides_BP4, self.config.proposals)
        regions_BR4 = torch.cat([boxes_BM4, found_BK4], dim=1)
        known_BM = labels_BM.masked_fill(~mask_BM | (labels_BM < 0), IGNORED)
        match_BK = match_regions(found_BK4, boxes_BM4, mask_BM, self.config.match)
        class_BR = torch.cat([known_BM, classes_of(match_BK, known_BM, filled_BK)], dim=1)
        image_BD = F.normalize(levels.embedding_BD, dim=-1)
        extra = {
            "centre": centre_BP,
            "sides": sides_BP4,
            "regions": self.parts.embed_assigned(levels, regions_BR4),
            "class": class_BR,
            "box": targets.box_BP,
            "ltrb": targets.ltrb_BP4,
            "centreness": targets.centreness_BP,
            "inside": targets.inside_BP,
        }
        return Features(image_BD, image_BD, extra=extra)

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The weighted sum of the three losses over the batch of all ranks; the model's own scale takes no part."""
        assert self.parts is not None, "attach comes first"
        config, extra = self.config, features.extra
        targets = Targets(extra["box"], extra["ltrb"], extra["centreness"], extra["inside"])
        logits_BRK = class_logits(extra["regions"], self.texts_KD, self.parts.background_D, self.parts.log_scale.exp())
        parts = {
            "class": class_loss(logits_BRK, extra["class"], config.background_weight),
            "box": side_loss(extra["sides"], targets, config.box_loss),
            "centre": centre_loss(extra["centre"], targets, config.centre_of == "everywhere"),
        }
        weights = (config.class_weight, config.box_weight, config.centre_weight)
        loss = sum(
            (weight * part for weight, part in zip(weights, parts.values(), strict=True) if weight),
            start=logit_scale.new_zeros(()),
        )
        return LossOutput(loss, {name: value.detach() for name, value in parts.items()})


def build(config: Config, dims: Dims) -> DetectionFinetune:
    """The objective; its parts are made or loaded when it meets the model. Raises ConfigError without categories."""
    return DetectionFinetune(config, dims)
