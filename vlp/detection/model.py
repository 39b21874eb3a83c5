"""DetectionParts: what detection adds to a model, beside its towers, and how it is kept in a bundle.

A pyramid, a region head, a dense head, the embedding of what is no object, and the classifier's scale. They lie in the
folder of the bundle as detection.json and detection.safetensors; the bundle stays one that open_clip loads. Suffixes: B
pictures, M boxes, C channels, S bins a side, D embedding width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import BundleError, ConfigError
from data_pipelines.files import sha256_file
from vlp.bundle import Bundle
from vlp.detection.heads import DenseHead, RegionHead
from vlp.detection.maps import Maps, MapTower, maps_of
from vlp.detection.pyramid import Pyramid
from vlp.detection.roi import roi_align, roi_mean
from vlp.detection.tail import Tail
from vlp.detection.window import WindowConfig
from vlp.models.folders import find_bundle, read_json

INFO, WEIGHTS = "detection.json", "detection.safetensors"
FORMAT = 1
NAME = "detection"
"""Of these parts among those of a bundle."""
SCALE = 10.0
"""First scale of the classifier's cosines: the paper's temperature of 0.1."""
ROI_BASE = 14
"""Bins a side over which the tower's own features are averaged in a region, as by the frozen scorer."""


class PartsConfig(StrictModel):
    """Sizes of the parts; the defaults are those of a Faster R-CNN with four convolutions in its box head."""

    levels: tuple[int, ...] = Field((2, 3, 4, 5), min_length=1)
    """Of the pyramid, finest first; level l has 2^l pixels between its places."""
    width: int = Field(256, ge=1)
    """C of the pyramid."""
    roi_size: int = Field(7, ge=1)
    """S of what the region head sees."""
    roi_samples: int = Field(2, ge=1)
    """Samples a side in each bin."""
    convs: int = Field(4, ge=0)
    """Convolutions of the region head."""
    hidden: int = Field(1024, ge=1)
    """Width of its hidden layer."""
    dense_convs: int = Field(2, ge=0)
    """Convolutions of the dense head."""
    residual: bool = False
    """The region head adds to the tower's own features of the region in the shared space; at first it adds nothing."""
    tail: bool = False
    """The region head is a copy of a CNN's own last stage, pool and projection, on regions of its last map but one;
    each level of the pyramid adds to its input what a convolution makes of it, at first nothing."""
    window: WindowConfig | None = None
    """Attention in windows and shifted-window learning, in ViTs; none: the tower as it is."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "PartsConfig":
        for name in ("convs", "hidden", "residual") if self.tail else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ConfigError(f"{name}={value} has no effect with tail=true, which takes the tower's own layers")
        return self


class DetectionInfo(StrictModel):
    """Content of detection.json."""

    format: int = FORMAT
    stage: Literal["pretrain", "finetune"] = "pretrain"
    """What these parts were trained for last."""
    base_labels: tuple[str, ...] = ()
    """Labels whose boxes were seen in fine-tuning; all others are novel."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts that the labels were read with then."""
    config: PartsConfig
    channels: tuple[int, ...]
    """Of the tower's maps, finest first."""
    strides: tuple[int, ...]
    embed: int
    """D."""
    weights_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Levels:
    """What regions are taken from: one pass of the tower and the pyramid."""

    maps: tuple[Tensor, ...]
    """BCHW of the pyramid, finest first."""
    embedding_BD: Tensor
    """Of the whole pictures, not normalised."""
    dense_BDHW: Tensor | None
    """The tower's own features in the shared space; where `residual` asks for them."""
    stage_BCHW: Tensor | None = None
    """The tower's map that `tail` cuts regions from."""


class DetectionParts(nn.Module):
    """Pyramid and heads for one image tower, which it does not hold."""

    def __init__(
        self, config: PartsConfig, channels: Sequence[int], strides: Sequence[int], embed: int, tail: Tail | None = None
    ) -> None:
        """`channels`, `strides`: of the tower's maps. `embed`: D. `tail`: where the config asks for it.

        Raises ConfigError for levels that cannot be made.
        """
        super().__init__()
        self.config = config
        self.info = DetectionInfo(config=config, channels=tuple(channels), strides=tuple(strides), embed=embed)
        self.pyramid = Pyramid(channels, strides, config.width, config.levels)
        self.region = tail or RegionHead(config.width, config.roi_size, embed, config.convs, config.hidden)
        inputs = [tail.channels] * len(config.levels) if tail is not None else []
        self.enter = nn.ModuleList(nn.Conv2d(config.width, channels, 1, bias=False) for channels in inputs)
        """What the pyramid adds to the map that a tail cuts regions from."""
        self.dense = DenseHead(config.width, config.dense_convs, len(config.levels))
        self.background_D = nn.Parameter(F.normalize(torch.randn(embed), dim=0))
        """What a region is compared with that holds no object."""
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        """Logarithm of the classifier's scale."""
        for added in self.enter.parameters():
            nn.init.zeros_(added)
        if config.residual and isinstance(self.region, RegionHead):
            nn.init.zeros_(self.region.out.weight)
            nn.init.zeros_(self.region.out.bias)

    def levels(self, tower: MapTower, pixels_BCHW: Tensor) -> Levels:
        """The tower and the pyramid on normalised pictures."""
        return self.levels_of(tower(pixels_BCHW, self.config.window, dense=self.config.residual))

    def levels_of(self, maps: Maps) -> Levels:
        """The pyramid on a pass of the tower, which gave dense features if `residual` asks for them."""
        dense_BDHW = maps.dense_BDHW if self.config.residual else None
        stage_BCHW = maps.levels[self.region.source] if isinstance(self.region, Tail) else None
        return Levels(self.pyramid(maps.levels), maps.embedding_BD, dense_BDHW, stage_BCHW)

    def embed(self, levels: Levels, boxes_BM4: Tensor) -> list[Tensor]:
        """Every region as seen on every level, finest first: BMD each, normalised, float32."""
        base_BMD, stage_rois = self._base(levels, boxes_BM4), self._stage_rois(levels, boxes_BM4)
        maps = self._entering(levels)
        return [self._finish(self._cut(map_BCHW, boxes_BM4), stage_rois, base_BMD) for map_BCHW in maps]

    def embed_mean(self, levels: Levels, boxes_BM4: Tensor) -> Tensor:
        """BMD, normalised: the mean over all levels, each of which pretraining teaches alike."""
        return F.normalize(torch.stack(self.embed(levels, boxes_BM4)).mean(dim=0), dim=-1)

    def embed_assigned(self, levels: Levels, boxes_BM4: Tensor) -> Tensor:
        """BMD, normalised: each region from the one level of `assign`; on other levels it costs nothing."""
        base_BMD, stage_rois = self._base(levels, boxes_BM4), self._stage_rois(levels, boxes_BM4)
        maps = self._entering(levels)
        first_BM = assign(boxes_BM4, maps, self.config.roi_size)
        rois = maps[0].new_zeros(*boxes_BM4.shape[:2], maps[0].shape[1], self.config.roi_size, self.config.roi_size)
        for number, map_BCHW in enumerate(maps):
            here_BM = first_BM == number
            most = int(here_BM.sum(dim=1).max()) if here_BM.numel() else 0
            if not most:
                continue
            # those of this level first, so that only as many columns are cut out as one picture has at most
            order_BK = here_BM.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            cut = self._cut(map_BCHW, boxes_BM4.gather(1, order_BK[..., None].expand(-1, -1, 4)))
            image_R, column_R = here_BM.gather(1, order_BK).nonzero(as_tuple=True)
            rois = rois.index_put((image_R, order_BK[image_R, column_R]), cut[image_R, column_R].to(rois.dtype))
        return self._finish(rois, stage_rois, base_BMD)

    def _cut(self, map_BCHW: Tensor, boxes_BM4: Tensor) -> Tensor:
        return roi_align(map_BCHW, boxes_BM4, self.config.roi_size, self.config.roi_samples)

    def _entering(self, levels: Levels) -> tuple[Tensor, ...]:
        """Maps that regions are cut from, BCHW: the pyramid's, for a tail with its channels.

        A convolution of single places and RoIAlign may change places, and there are fewer places than bins.
        """
        if not len(self.enter):
            return levels.maps
        return tuple(enter(map_BCHW) for enter, map_BCHW in zip(self.enter, levels.maps, strict=True))

    def _stage_rois(self, levels: Levels, boxes_BM4: Tensor) -> Tensor | None:
        return None if levels.stage_BCHW is None else self._cut(levels.stage_BCHW, boxes_BM4)

    def _base(self, levels: Levels, boxes_BM4: Tensor) -> Tensor | None:
        if levels.dense_BDHW is None:
            return None
        return F.normalize(roi_mean(levels.dense_BDHW.float(), boxes_BM4, ROI_BASE), dim=-1)

    def _finish(self, rois_BMCSS: Tensor, stage_rois: Tensor | None, base_BMD: Tensor | None) -> Tensor:
        """BMD of what was cut out of the levels, and of the tower's map."""
        rois_BMCSS = rois_BMCSS if stage_rois is None else rois_BMCSS + stage_rois
        if isinstance(self.region, Tail):
            found_BMD = self.region(rois_BMCSS.flatten(0, 1)).unflatten(0, rois_BMCSS.shape[:2]).float()
        else:
            found_BMD = self.region(rois_BMCSS).float()
        return F.normalize(found_BMD if base_BMD is None else base_BMD + found_BMD, dim=-1)

    def save(self, folder: Path) -> None:
        """Write detection.safetensors and detection.json into a folder, beside what a bundle holds."""
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)  # safetensors makes it 0600, and another user may be the one who serves it
        info = self.info.model_copy(update={"weights_sha256": sha256_file(folder / WEIGHTS)})
        (folder / INFO).write_text(info.model_dump_json(indent=2), encoding="utf-8")


def assign(boxes_BM4: Tensor, maps: Sequence[Tensor], size: int) -> Tensor:
    """BM: the coarsest level on which a box still covers `size` x `size` places by area, else the finest."""
    span_BM2 = (boxes_BM4[..., 2:] - boxes_BM4[..., :2]).clamp(min=0)
    share_BM = span_BM2.prod(dim=-1)
    places_L = [map_BCHW.shape[2] * map_BCHW.shape[3] for map_BCHW in maps]
    enough = torch.stack([share_BM * places >= size * size for places in places_L])
    return (enough.long().sum(dim=0) - 1).clamp(min=0)


def make_parts(config: PartsConfig, model: nn.Module, embed: int) -> DetectionParts:
    """Fresh parts for the image tower of a model. Raises ConfigError for a tower without maps, or without windows."""
    tower = maps_of(model)
    if config.window is not None and not tower.has_windows:
        raise ConfigError(
            f"window={config.window.model_dump()}: the image tower has no grid of tokens; leave window out, or set "
            "model.name to an open_clip ViT or a timm VisionTransformer"
        )
    return DetectionParts(config, tower.channels, tower.strides, embed, Tail(model) if config.tail else None)


def has_parts(path: Path | str) -> bool:
    """Whether a folder is a bundle or a run that holds parts of a detector."""
    return any((folder / INFO).is_file() for folder in (Path(path), Path(path) / "bundle"))


def load_parts(path: Path | str, model: nn.Module) -> DetectionParts:
    """The parts in a bundle or a run, for the image tower of `model`, in training mode on the CPU.

    Raises BundleError naming file and reason: missing, damaged, of a newer vlp, made for another tower.
    """
    folder = find_bundle(Path(path)).absolute()
    info = read_info(folder)
    tower = maps_of(model)
    ours = {"channels": tower.channels, "strides": tower.strides}
    for name, value in ours.items():
        if value != (theirs := getattr(info, name)):
            raise BundleError(
                f"{folder / INFO}: made for an image tower whose maps have {name} {theirs}, this one's have {value}: "
                "take the tower of the same bundle (model.weights)"
            )
    weights = folder / WEIGHTS
    if weights.is_file() and sha256_file(weights) != info.weights_sha256:
        raise BundleError(f"{weights}: sha256 differs from the one in {INFO}; it is damaged or was exchanged")
    with torch.random.fork_rng(devices=[]):
        tail = Tail(model) if info.config.tail else None
        parts = DetectionParts(info.config, info.channels, info.strides, info.embed, tail)
    try:
        parts.load_state_dict(load_file(weights), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BundleError(f"{weights}: weights cannot be loaded ({str(error).splitlines()[0]})") from error
    parts.info = info
    return parts


def read_info(folder: Path) -> DetectionInfo:
    """detection.json of a bundle's folder. Raises BundleError."""
    path = folder / INFO
    if not path.is_file():
        raise BundleError(
            f"{folder}: holds no {INFO}, so it was not trained for detection; train one with recipe detection/pretrain "
            "or detection/finetune"
        )
    content: dict[str, Any] = read_json(path)
    if int(content.get("format", 0)) > FORMAT:
        raise BundleError(
            f"{path}: format {content['format']} is of a newer vlp; this one reads up to {FORMAT}: upgrade"
        )
    try:
        return DetectionInfo.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {explain(error)}") from error


def parts_of(bundle: Bundle) -> DetectionParts:
    """The parts that belong to a bundle, in evaluation mode on its device: those in memory, else those in its folder.

    Raises BundleError for a bundle without.
    """
    if NAME not in bundle.parts:
        if bundle.folder is None:
            raise BundleError(f"{bundle.name}: a model in memory without parts of a detector")
        bundle.parts[NAME] = load_parts(bundle.folder, bundle.model)
    parts: DetectionParts = bundle.parts[NAME]
    return parts.to(bundle.device).eval()
