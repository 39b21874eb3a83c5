"""ViTs with attention in windows, and shifted-window learning (DITO: Kim et al. 2023, arXiv 2310.00161).

The token grid is cut into windows x windows parts, and in most layers a token sees its own part only (as in ViTDet, Li
et al. 2022, arXiv 2203.16527). A class token and other prefix tokens go into every window as a copy, and the copies are
averaged after the layer. Shifted-window learning runs the same blocks a second time on the grid rolled by half a
window, rolls the result back and averages both; positions are added after the roll, so they stay where they are. Tokens
that wrap round at the edge need no mask.

With one window and no shift the result is the tower's own, bit for bit. Stochastic depth, where a tower has it, drops
whole windows. Suffixes: B pictures, C channels, H rows and W columns of the token grid, P prefix tokens, L tokens of a
picture, prefix included, D width of the tower, N windows of all pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError


class WindowConfig(StrictModel):
    """How a ViT's layers see the token grid; the defaults are the paper's for B and L."""

    windows: int = Field(4, ge=1)
    """Windows a side of the grid; 1: every token sees all."""
    global_layers: int = Field(4, ge=1)
    """Layers that see the whole grid, evenly spaced, the last of the tower among them; 1: the last alone."""
    shift: bool = False
    """Shifted-window learning: a second pass on the grid rolled by half a window, averaged with the first."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "WindowConfig":
        if self.windows == 1 and self.global_layers != type(self).model_fields["global_layers"].default:
            raise ConfigError(f"global_layers={self.global_layers} has no effect with windows=1: leave it out")
        if self.windows == 1 and self.shift:
            raise ConfigError("shift=true shifts windows, and windows=1 has none: set windows to 2 or more")
        return self


PLAIN = WindowConfig(windows=1)
"""The tower as it is."""


@dataclass(frozen=True, slots=True)
class Vit:
    """The parts of a ViT between which tokens are rolled and cut."""

    patches: Callable[[Tensor], Tensor]
    """BCHW pixels -> BHWD."""
    start: Callable[[Tensor], Tensor]
    """BHWD -> BLD: positions added, prefix tokens in front."""
    blocks: Sequence[nn.Module]
    prefix: int
    """P."""
    checkpointed: bool
    """Whether activations of blocks are computed again in the backward pass."""
    dropped: bool
    """Whether the tower leaves patches out in training."""


def vit_of(tower: nn.Module) -> Vit | None:
    """The parts of open_clip's `VisionTransformer` or of a timm tower of that kind; None for others."""
    if isinstance(tower, VisionTransformer):
        return _open_clip(tower)
    trunk = getattr(tower, "trunk", None)
    return _timm(trunk) if isinstance(trunk, TimmVisionTransformer) else None


def _open_clip(tower: Any) -> Vit:
    def patches(pixels_BCHW: Tensor) -> Tensor:
        grid_BHWD: Tensor = tower.conv1(pixels_BCHW).permute(0, 2, 3, 1)
        return grid_BHWD

    def start(grid_BHWD: Tensor) -> Tensor:
        own_BPD = tower.class_embedding.to(grid_BHWD.dtype).expand(len(grid_BHWD), 1, -1)
        tokens_BLD = torch.cat([own_BPD, grid_BHWD.flatten(1, 2)], dim=1)
        tokens_BLD = tokens_BLD + tower.positional_embedding.to(tokens_BLD.dtype)
        started: Tensor = tower.ln_pre(tower.patch_dropout(tokens_BLD))
        return started

    dropped = not isinstance(tower.patch_dropout, nn.Identity)
    blocks = tower.transformer
    return Vit(patches, start, blocks.resblocks, 1, blocks.grad_checkpointing, dropped)


def _timm(trunk: Any) -> Vit:
    def patches(pixels_BCHW: Tensor) -> Tensor:
        tokens: Tensor = trunk.patch_embed(pixels_BCHW)
        if tokens.ndim == 4:  # towers of any picture size keep the grid
            return tokens
        rows, columns = trunk.patch_embed.dynamic_feat_size(pixels_BCHW.shape[-2:])
        return tokens.view(len(tokens), rows, columns, -1)

    def start(grid_BHWD: Tensor) -> Tensor:
        grid = grid_BHWD if trunk.dynamic_img_size else grid_BHWD.flatten(1, 2)
        started: Tensor = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(grid)))
        return started

    dropped = not isinstance(trunk.patch_drop, nn.Identity)
    return Vit(patches, start, trunk.blocks, trunk.num_prefix_tokens, trunk.grad_checkpointing, dropped)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the blocks of a ViT give; with a shift the means of both passes."""

    after_BLD: Tensor
    """Behind the last block, before any final norm; prefix tokens first."""
    before_BLD: Tensor
    """What the last block was given."""
    grid: tuple[int, int]
    """H and W of the patches."""


def run_vit(vit: Vit, pixels_BCHW: Tensor, window: WindowConfig = PLAIN) -> Tokens:
    """One pass of a ViT, or two.

    Raises ConfigError for a grid that cannot be cut in such windows, and for a tower that drops patches.
    """
    grid_BHWD = vit.patches(pixels_BCHW)
    rows, columns = grid = grid_BHWD.shape[1], grid_BHWD.shape[2]
    if vit.dropped:
        raise ConfigError("model.patch_dropout leaves holes in the token grid: set it to 0")
    _check(window, rows, columns, len(vit.blocks))
    after_BLD, before_BLD = _blocks(vit, vit.start(grid_BHWD), grid, window)
    if not window.shift:
        return Tokens(after_BLD, before_BLD, grid)
    down, right = rows // window.windows // 2, columns // window.windows // 2
    rolled = _blocks(vit, vit.start(grid_BHWD.roll((-down, right), (1, 2))), grid, window)

    def mean(own_BLD: Tensor, rolled_BLD: Tensor) -> Tensor:
        prefix_BPD, patches_BLD = rolled_BLD[:, : vit.prefix], rolled_BLD[:, vit.prefix :]
        back_BHWD = patches_BLD.unflatten(1, grid).roll((down, -right), (1, 2))
        return 0.5 * (own_BLD + torch.cat([prefix_BPD, back_BHWD.flatten(1, 2)], dim=1))

    return Tokens(mean(after_BLD, rolled[0]), mean(before_BLD, rolled[1]), grid)


def _check(window: WindowConfig, rows: int, columns: int, layers: int) -> None:
    count = window.windows
    if rows % count or columns % count:
        raise ConfigError(
            f"windows={count}: a grid of {rows} x {columns} tokens cannot be cut in {count} x {count} equal windows; "
            f"set data.image.size to a multiple of {count} patches, or windows to a divisor of the grid's side"
        )
    if count > 1 and window.global_layers > layers:
        raise ConfigError(f"global_layers={window.global_layers}: the tower has {layers} layers")
    if window.shift and min(rows, columns) // count < 2:
        raise ConfigError(f"shift=true: windows={count} leaves windows of one token, of which there is no half")


def is_global(layer: int, layers: int, count: int) -> bool:
    """Whether layer number `layer` (0-based) of `layers` is one of `count` evenly spaced ones that end with the last.

    As ViTDet places them: of 12 layers and 4 these are 2, 5, 8 and 11.
    """
    return layer in [(number + 1) * layers // count - 1 for number in range(count)]


def _blocks(vit: Vit, tokens_BLD: Tensor, grid: tuple[int, int], window: WindowConfig) -> tuple[Tensor, Tensor]:
    """Tokens after the last block, and before it."""
    layers = len(vit.blocks)
    before_BLD = tokens_BLD
    for number, block in enumerate(vit.blocks):
        whole = window.windows == 1 or is_global(number, layers, window.global_layers)
        run = block if whole else _Windowed(block, grid, vit.prefix, window.windows)
        before_BLD = tokens_BLD
        if vit.checkpointed and torch.is_grad_enabled():
            tokens_BLD = checkpoint(run, tokens_BLD, use_reentrant=False)
        else:
            tokens_BLD = run(tokens_BLD)
    return tokens_BLD, before_BLD


@dataclass(frozen=True, slots=True)
class _Windowed:
    """A block as it is, run on every window by itself."""

    block: nn.Module
    grid: tuple[int, int]
    prefix: int
    windows: int

    def __call__(self, tokens_BLD: Tensor) -> Tensor:
        count, (rows, columns) = self.windows, self.grid
        prefix_BPD, patches_BLD = tokens_BLD[:, : self.prefix], tokens_BLD[:, self.prefix :]
        down, right = rows // count, columns // count
        cut = patches_BLD.reshape(len(tokens_BLD), count, down, count, right, -1).transpose(2, 3)
        cut_NLD = cut.reshape(-1, down * right, tokens_BLD.shape[2])
        copies_NPD = prefix_BPD.repeat_interleave(count * count, dim=0)
        found_NLD = self.block(torch.cat([copies_NPD, cut_NLD], dim=1))
        means_BPD = found_NLD[:, : self.prefix].unflatten(0, (-1, count * count)).mean(dim=1)
        back = found_NLD[:, self.prefix :].reshape(-1, count, count, down, right, tokens_BLD.shape[2]).transpose(2, 3)
        return torch.cat([means_BPD, back.reshape(patches_BLD.shape)], dim=1)
