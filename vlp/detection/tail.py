"""A tower's own last stage as region head: Faster R-CNN's first box head (arXiv 1506.01497), RegionCLIP's (arXiv
2112.09106).

Everything above the last but one of a CNN's maps, pool and projection included, is copied and runs on regions that were
cut out of that map. A region then fills the last stage as a whole picture does, and what the tower learned of pictures
holds for it from the start. Batch norms keep their statistics, which those of regions would spoil. Suffixes: N regions,
C channels, S bins a side, D embedding width.
"""

import copy
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_pipelines.errors import ConfigError
from vlp import distributed
from vlp.detection.maps import as_type, maps_of
from vlp.models.layout import set_channels_last


class Tail(nn.Module):
    """Copies of a tower's last stage, its pool and its heads."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ConfigError for a tower whose last stage is not known, or which ranks hold in parts."""
        super().__init__()
        visual: Any = getattr(model, "visual", None)
        trunk: Any = getattr(visual, "trunk", None)
        if not isinstance(visual, TimmModel) or not isinstance(trunk, EfficientNet | ResNet | ConvNeXt):
            kind = type(trunk if trunk is not None else visual).__name__
            raise ConfigError(
                f"tail=true: the last stage of the image tower {kind} cannot be taken for regions; set tail to false, "
                "or model.config to a timm EfficientNet, ResNet or ConvNeXt"
            )
        if distributed.any_sharded(visual.parameters()):
            raise ConfigError(
                "run.strategy='fsdp': tail=true copies a part of the tower, which needs run.strategy='ddp'"
            )
        tower = maps_of(model)
        if len(tower.strides) < 2:
            raise ConfigError("tail=true: the image tower has one map, and nothing above the last but one")
        self.source = len(tower.strides) - 2
        """Which of the tower's maps the regions are cut from."""
        self.channels = tower.channels[self.source]
        self.stage = nn.Sequential(*(copy.deepcopy(part) for part in _above(trunk, tower.strides[self.source])))
        self.pool = copy.deepcopy(_pool(trunk))
        self.head = copy.deepcopy(visual.head)
        self.float().requires_grad_(True)
        set_channels_last(self, torch.device("cpu"))

    def train(self, mode: bool = True) -> "Tail":
        """As every module, but batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, rois_NCSS: Tensor) -> Tensor:
        """ND, not normalised."""
        if not len(rois_NCSS):  # pools of nothing are no numbers
            return rois_NCSS.new_zeros(0, self._width())
        rois_NCSS = as_type(rois_NCSS, next(self.head.parameters(), next(self.parameters())))
        found_ND: Tensor = self.head(self.pool(self.stage(rois_NCSS.contiguous(memory_format=torch.channels_last))))
        return found_ND

    def _width(self) -> int:
        last = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return int(last[-1].out_features) if last else self.channels


def _above(trunk: Any, stride: int) -> list[nn.Module]:
    """All that a trunk runs on its map of this stride, up to its pool."""
    place = [str(item["module"]) for item in trunk.feature_info if int(item["reduction"]) == stride][-1]
    if isinstance(trunk, ResNet):
        layers = ["layer1", "layer2", "layer3", "layer4"]
        return [getattr(trunk, name) for name in layers[layers.index(place) + 1 :]]
    first = int(place.split(".")[1]) + 1
    if isinstance(trunk, ConvNeXt):
        return [*list(trunk.stages)[first:], trunk.norm_pre]
    return [*list(trunk.blocks)[first:], trunk.conv_head, trunk.bn2]


def _pool(trunk: Any) -> nn.Module:
    """A trunk's pool and what it runs behind it."""
    if isinstance(trunk, ConvNeXt):
        head: nn.Module = trunk.head
        return head
    return nn.Sequential(trunk.global_pool, trunk.fc if isinstance(trunk, ResNet) else trunk.classifier)
