"""A feature pyramid from whatever maps an image tower gives: one map of each level, all of one width.

Level l has 2^l pixels between its places. A single map (a ViT's token grid) is brought to every level by itself, as in
ViTDet's simple pyramid (Li et al. 2022, arXiv 2203.16527): transposed convolutions up, max-pooling down. The maps of a
CNN go from coarse to fine, each finer one added (FPN, Lin et al. 2017, arXiv 1612.03144); levels beyond the tower's own
are made as for a ViT. Suffixes: B pictures, C channels, H rows and W columns of a map.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.errors import ConfigError
from vlp.detection.maps import as_type


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every place, so that neither batch nor ranks matter."""

    def forward(self, input: Tensor) -> Tensor:
        """BCHW to BCHW."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_norm(before: int, after: int, kernel: int) -> nn.Sequential:
    """A convolution that keeps the map's size, and a norm."""
    return nn.Sequential(nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False), ChannelNorm(after))


class Pyramid(nn.Module):
    """Maps of a tower to maps of `levels`, finest first."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, levels: Sequence[int]) -> None:
        """`channels`, `strides`: of the tower's maps, finest first. Raises ConfigError for levels out of order."""
        super().__init__()
        if list(levels) != list(range(levels[0], levels[-1] + 1)):
            raise ConfigError(f"levels={list(levels)}: give consecutive levels, finest first, such as [3, 4, 5]")
        own = [round(math.log2(stride)) for stride in strides]
        self.levels = tuple(levels)
        self.sources = tuple(_nearest(own, level) for level in levels)
        """For each level the tower's map that it starts from."""
        self.steps = tuple(level - own[source] for level, source in zip(levels, self.sources, strict=True))
        """Halvings from there; negative: doublings."""
        inputs = [channels[source] // 2 ** max(0, -step) for source, step in zip(self.sources, self.steps, strict=True)]
        if min(inputs) < 1:
            raise ConfigError(f"levels={list(levels)}: the tower's maps are too narrow to be enlarged so often")
        resize: list[nn.Module] = []
        for source, step in zip(self.sources, self.steps, strict=True):
            resize.append(_up(channels[source], -step) if step < 0 else _down(step))
        self.resize = nn.ModuleList(resize)
        self.lateral = nn.ModuleList(conv_norm(before, width, 1) for before in inputs)
        self.smooth = nn.ModuleList(conv_norm(width, width, 3) for _ in levels)

    @property
    def top_down(self) -> bool:
        """Whether coarser levels are added to finer ones: where they come from maps of their own."""
        return len(set(self.sources)) > 1

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """BCHW of each level, finest first; C = width."""
        weight: Tensor = self.lateral[0][0].weight  # type: ignore[index]
        maps = [as_type(map_BCHW, weight) for map_BCHW in maps]
        parts = zip(self.sources, self.resize, self.lateral, strict=True)
        levels: list[Tensor] = [lateral(resize(maps[source])) for source, resize, lateral in parts]
        if self.top_down:
            for finer in reversed(range(len(levels) - 1)):
                size = levels[finer].shape[2:]
                levels[finer] = levels[finer] + F.interpolate(levels[finer + 1], size=size, mode="nearest")
        return tuple(smooth(map_BCHW) for smooth, map_BCHW in zip(self.smooth, levels, strict=True))


def _nearest(own: Sequence[int], level: int) -> int:
    """Which of the tower's maps is closest to a level; of two alike the finer one."""
    return min(range(len(own)), key=lambda place: (abs(own[place] - level), place))


def _up(channels: int, doublings: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(doublings):
        if number:
            layers += [ChannelNorm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
    return nn.Sequential(*layers)


def _down(halvings: int) -> nn.Sequential:
    # a last odd row or column counts, so that a map of one place stays one
    return nn.Sequential(*(nn.MaxPool2d(2, ceil_mode=True) for _ in range(halvings)))
