"""Dense distillation from text: a student learns from another rendering of a picture what a frozen teacher sees where.

The buildable part of CLIP2Scene (Chen et al. 2023, arXiv 2301.04926), whose student sees point clouds. The teacher sees
the picture; the text prototype t_c that a place of its map is most similar to is the place's pseudo-label c, no human
label is used (MaskCLIP, arXiv 2112.01071). The student sees edges, say; of a place i with dense features p_i

    L = L_sem + w L_st,  L_sem = CE(p_i . t, c_i),  L_st = 1 - sigmoid(f_i . p'_i),  f_i = sum_j a_j p'_j

over the places j of its region with its pseudo-label, a = softmax_j(p'_j . t_c), and p' from a head of its own that is
not kept. Regions are squares of the map here, supervoxels there. `region=image` is the paper's second form for L_st:
1 - cos(teacher's features, p'). From a step on, at every step with some probability, pseudo-labels are the student's
own answers (switchable self-training); from the first step on they would lock in the start.

Suffixes: B samples of this rank, C channels, D width of the shared space, H, W places of the student's map, P
prototypes; R regions of all samples, M places of one.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from data_pipelines.preprocess import ImageConfig
from data_pipelines.tokens import Tokenizer
from vlp import distributed
from vlp.bundle import load_bundle
from vlp.detection.dense import dense_features
from vlp.detection.modality import Modality, render
from vlp.detection.segment import classes_of
from vlp.evals._labels import Templates, read_labels
from vlp.infer import BATCH, make_prompts, pool_prompts
from vlp.objectives._beside import check, mean_over_ranks, together
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput, encode_pairs, refuse_idle
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.distill import START, seen_by

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "local"
NEUTRAL: dict[str, Any] | None = {"weight": 0, "clip_weight": 1}
"""Without the dense terms no teacher is loaded and no picture rendered."""
OWN = ("teacher", "labels", "background", "templates", "modality", "region", "region_weight", "region_side")
SWITCH = ("switch_after", "switch_probability")
ALIKE = 0.98
"""Cosine from which two text towers say the same of a prompt."""


def read_classes(value: Any) -> Any:
    """Label -> synonyms, of all that the evaluations take: a list, such a mapping, `imagenet`, or a file."""
    if isinstance(value, Mapping) and not value:
        return {}
    found = read_labels(value)
    return dict(zip(found.names, found.texts, strict=True))


class Config(StrictModel):
    """Options of the loss; the defaults are the paper's, regions aside."""

    teacher: str = START
    """A bundle, a run or an open_clip folder whose text tower the student has. start: the weights this run starts from.
    """
    labels: Annotated[dict[str, tuple[str, ...]], BeforeValidator(read_classes)] = {}
    """Classes: a list, {label: [synonyms]}, or a file of either (one a line, or json). Needed."""
    background: tuple[str, ...] = ()
    """Texts of what is none of them, each a prototype more."""
    templates: Templates = Field("imagenet", validate_default=True)
    """Prompts whose mean is a prototype: a list, a file, `plain`, `imagenet` (80), `imagenet-simple` (7)."""
    modality: Modality = "edges"
    """What the student sees."""
    weight: float = Field(1.0, ge=0)
    """Of both dense terms; 0 = off."""
    region: Literal["fused", "image", "none"] = "fused"
    """L_st: with what the places of a region agree on, with the teacher's features, or without it. Features as long as
    those of a trained tower put the first one's sigmoid at its end, where it teaches nothing: take image for these."""
    region_weight: float = Field(1.0, gt=0)
    region_side: int = Field(2, ge=2)
    """Places on a side of a region."""
    switch_after: int | None = Field(None, ge=1)
    """Steps after which the student's own answers may be the targets; the paper: half of the run. None: never."""
    switch_probability: float = Field(0.5, gt=0, le=1)
    """Of a step after that."""
    clip_weight: float = Field(0.0, ge=0)
    """Of plain CLIP beside it, on what the student sees."""
    clip: ClipConfig = ClipConfig()

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "Config":
        check(self.weight, self.clip_weight, "none")
        refuse_idle(self, {
            "weight=0": () if self.weight else (*OWN, *SWITCH),
            "region=none": () if self.region != "none" else ("region_weight", "region_side"),
            "region=image": () if self.region != "image" else ("region_side",),
            "switch_after=null": () if self.switch_after else ("switch_probability",),
            "clip_weight=0": () if self.clip_weight else ("clip",),
        })  # fmt: skip
        if self.weight and not self.labels:
            raise ConfigError("objective.labels: none is given; give the classes that places can be taken for")
        return self


def semantic_loss(dense_BDHW: Tensor, prototype_PD: Tensor, label_BHW: Tensor) -> Tensor:
    """BHW: cross-entropy of every place; the student's features are not normalised, and there is no temperature."""
    logits_BPHW = torch.einsum("bdhw,pd->bphw", dense_BDHW, prototype_PD)
    return F.cross_entropy(logits_BPHW, label_BHW, reduction="none")


def region_loss(local_BDHW: Tensor, prototype_PD: Tensor, label_BHW: Tensor, side: int) -> Tensor:
    """BHW: 1 - sigmoid(f . p') of every place, f fused from the places of its region that have its label."""
    label_RM, there_RM = _regions(label_BHW[:, None].float(), side)
    local_RMD = _regions(local_BDHW, side)[0]
    label_RM = label_RM[..., 0].round().long()
    score_RM = (local_RMD * prototype_PD[label_RM]).sum(dim=-1)
    fellow_RMM = (label_RM[:, :, None] == label_RM[:, None, :]) & there_RM[:, None, :]
    attention_RMM = score_RM[:, None, :].expand_as(fellow_RMM).masked_fill(~fellow_RMM, -torch.inf)
    attention_RMM = attention_RMM.masked_fill(~there_RM[:, :, None], 0.0).softmax(dim=-1)
    fused_RMD = attention_RMM @ local_RMD
    loss_RM = 1.0 - torch.sigmoid((fused_RMD * local_RMD).sum(dim=-1))
    return _whole(loss_RM, label_BHW.shape, side)


def _regions(map_BCHW: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(RMC, RM bool: whether the place exists) of squares of the map; those at its lower and right edge may be cut."""
    count, channels, rows, columns = map_BCHW.shape
    below, right = -rows % side, -columns % side
    there_1HW = F.pad(torch.ones(1, 1, rows, columns, device=map_BCHW.device), (0, right, 0, below))
    padded = F.pad(map_BCHW, (0, right, 0, below))
    both = torch.cat([padded, there_1HW.to(padded).expand(count, -1, -1, -1)], dim=1)
    cut = both.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
    found_RMC = cut.reshape(-1, side * side, channels + 1)
    return found_RMC[..., :-1], found_RMC[..., -1] > 0


def _whole(value_RM: Tensor, shape: torch.Size, side: int) -> Tensor:
    """BHW of the places of all regions: `_regions` undone."""
    count, rows, columns = shape
    down, across = -(-rows // side), -(-columns // side)
    map_BHW = value_RM.view(count, down, across, side, side).transpose(2, 3).reshape(count, down * side, across * side)
    return map_BHW[:, :rows, :columns]


def image_loss(local_BDHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
    """BHW: 1 - cos of the student's and the teacher's features of every place."""
    return 1.0 - F.cosine_similarity(local_BDHW, teacher_BDHW, dim=1)


def on_grid(map_BCHW: Tensor, grid: torch.Size | tuple[int, ...]) -> Tensor:
    """A map at other places, between which it is interpolated."""
    rows, columns = grid
    if map_BCHW.shape[2:] == (rows, columns):
        return map_BCHW
    return F.interpolate(map_BCHW, (rows, columns), mode="bilinear", align_corners=False)


class DenseDistill(nn.Module):
    """Holds the local head and counts steps; the teacher stays outside of its state."""

    def __init__(self, config: Config, dims: Dims) -> None:
        super().__init__()
        self.config, self.dims = config, dims
        self._teacher: tuple[nn.Module, ...] = ()
        self._image: ImageConfig | None = None
        """How the teacher wants its pictures, where that is not how the student gets them."""
        if config.weight:
            self.register_buffer("updates", torch.tensor(0))
            self.register_buffer("prototype_PD", torch.empty(0, dims.embed), persistent=False)
            if config.region != "none":
                self.local = nn.Linear(dims.embed, dims.embed, bias=False)
                nn.init.eye_(self.local.weight)  # so that both heads begin as one

    updates: Tensor
    prototype_PD: Tensor

    @property
    def whole_towers(self) -> bool:
        """Whether pictures are needed even where both trunks are frozen."""
        return self.config.weight > 0

    def attach(self, model: nn.Module) -> None:
        """Load or copy the teacher and read the classes. Raises ConfigError for one that cannot teach this student."""
        if not self.config.weight:
            return
        if distributed.any_sharded(model.parameters()):
            raise ConfigError(
                "objective.name='dense_distill' looks into the image tower: set run.strategy=ddp, not fsdp"
            )
        tokenizer = self.dims.tokenizer
        if tokenizer is None:
            raise ConfigError("objective.name='dense_distill' needs the run's tokenizer, to read objective.labels")
        if self.config.teacher == START:
            teacher: Any = copy.deepcopy(model)
        else:
            teacher, tokenizer = self._load(self.config.teacher)
        teacher.to(next(model.parameters()).device).eval().requires_grad_(False)
        self._teacher = (teacher,)
        self.prototype_PD = self._prototypes(teacher, tokenizer)
        if self.config.teacher != START:
            self._same_texts(model)

    def _load(self, source: str) -> tuple[nn.Module, Tokenizer]:
        bundle, where = load_bundle(Path(source)), f"objective.teacher={source!r}"
        if bundle.dim != self.dims.embed:
            raise ConfigError(
                f"{where} embeds in {bundle.dim} numbers, the student in {self.dims.embed}, but its places are "
                f"compared with the teacher's texts: set embed_dim in model.config to {bundle.dim}"
            )
        image = self.dims.image
        if image is not None and image.channels != bundle.image.channels:
            raise ConfigError(
                f"{where} takes pictures of {bundle.image.channels} channels, data.image.channels={image.channels}: "
                "choose a teacher for these pictures"
            )
        self._image = bundle.image
        return bundle.model, bundle.tokenizer

    @torch.no_grad()
    def _prototypes(self, model: Any, tokenizer: Tokenizer) -> Tensor:
        """PD float32, normalised: the mean over the prompts of every label and background text."""
        classes = classes_of(self.config.labels, self.config.background)
        prompts = [make_prompts(texts, self.config.templates) for texts in classes.texts]
        tokens = tokenizer([text for texts in prompts for text in texts]).to(next(model.parameters()).device)
        training = model.training
        model.eval()
        rows = torch.cat([model.encode_text(part, normalize=True).float() for part in tokens.split(BATCH)])
        model.train(training)
        return torch.cat([pool_prompts(part, 1) for part in rows.split([*map(len, prompts)])])

    def _same_texts(self, model: nn.Module) -> None:
        assert self.dims.tokenizer is not None
        own_PD = self._prototypes(model, self.dims.tokenizer)
        worst = float((own_PD * self.prototype_PD).sum(dim=1).min())
        if worst < ALIKE:
            raise ConfigError(
                f"objective.teacher={self.config.teacher!r}: the student's text tower reads the labels otherwise "
                f"(cosine {worst:.2f}), so that its bundle could not be asked for what it learns: take the teacher's "
                "by model.text_weights or model.weights, with its tokenizer, and model.lock_text=true"
            )

    def after_step(self, model: nn.Module) -> None:
        """Count the update."""
        if self.config.weight:
            self.updates += 1

    def own_targets(self) -> bool:
        """Whether this step's targets are the student's answers; the number of the step decides, on all ranks alike."""
        after, step = self.config.switch_after, int(self.updates)
        if after is None or step < after:
            return False
        chance = torch.rand((), generator=torch.Generator().manual_seed(step))
        return bool(chance < self.config.switch_probability)

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """The student's places of the rendered picture, and what the teacher says of the picture itself."""
        config = self.config
        if not config.weight:
            return encode_pairs(model, pixels_BCHW, batch, config.clip.mask, "dense_distill")
        seen_BCHW = render(pixels_BCHW, config.modality, self.dims.image)
        dense_BDHW = dense_features(model, seen_BCHW)
        if config.clip_weight:
            features = encode_pairs(model, seen_BCHW, batch, config.clip.mask, "dense_distill")
        else:  # the text tower rests
            image_BD = F.normalize(dense_BDHW.float().mean(dim=(2, 3)), dim=1)
            features = Features(image_BD, image_BD)
        extra = {"dense": dense_BDHW} | self._taught(pixels_BCHW, dense_BDHW.shape[2:])
        return replace(features, extra=extra)

    @torch.no_grad()
    def _taught(self, pixels_BCHW: Tensor, grid: torch.Size) -> dict[str, Tensor]:
        (teacher,) = self._teacher
        if self._image is not None:
            pixels_BCHW = seen_by(self._image, self.dims.image, pixels_BCHW)
        pixels_BCHW = pixels_BCHW.to(next(teacher.parameters()).dtype)
        taught_BDHW = F.normalize(dense_features(teacher, pixels_BCHW).float(), dim=1)
        cosine_BPHW = torch.einsum("bdhw,pd->bphw", taught_BDHW, self.prototype_PD)
        found = {"labels": on_grid(cosine_BPHW, grid).argmax(dim=1)}
        return found | ({"teacher": on_grid(taught_BDHW, grid)} if self.config.region == "image" else {})

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        config = self.config
        term = self._dense_term(features) if config.weight else None
        return together(features, logit_scale, config.clip, config.clip_weight, config.weight, term)

    def _dense_term(self, features: Features) -> tuple[Tensor, dict[str, Tensor]]:
        config, label_BHW = self.config, features.extra["labels"]
        dense_BDHW = features.extra["dense"].float()
        own_BHW = torch.einsum("bdhw,pd->bphw", dense_BDHW.detach(), self.prototype_PD).argmax(dim=1)
        agreed_BHW = (own_BHW == label_BHW).float()
        if self.own_targets():
            label_BHW = own_BHW
        loss = semantic = _mean(semantic_loss(dense_BDHW, self.prototype_PD, label_BHW))
        parts = {"semantic": semantic, "agreement": _mean(agreed_BHW)}
        if config.region != "none":
            local_BDHW = torch.einsum("bdhw,ed->behw", dense_BDHW, self.local.weight.float())
            if config.region == "fused":
                values_BHW = region_loss(local_BDHW, self.prototype_PD, label_BHW, config.region_side)
            else:
                values_BHW = image_loss(local_BDHW, features.extra["teacher"].float())
            parts["region"] = _mean(values_BHW)
            loss = semantic + config.region_weight * parts["region"]
        return loss, parts


def _mean(values_BHW: Tensor) -> Tensor:
    """Over the places of all ranks."""
    return mean_over_ranks(values_BHW.flatten(), torch.ones_like(values_BHW, dtype=torch.bool).flatten())


def build(config: Config, dims: Dims) -> DenseDistill:
    """The objective; its teacher is loaded when it meets the model."""
    return DenseDistill(config, dims)
