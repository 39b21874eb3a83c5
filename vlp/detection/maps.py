"""Feature maps of any image tower, with the image-level embedding from the same pass.

Towers: timm's that give intermediate maps (nearly all), open_clip's ViT and ResNets. What runs between a tower's parts
runs inside a call of the tower, so that sharded towers (FSDP2) are whole while it does. Suffixes: B pictures, C
channels, H rows and W columns of a map, L tokens, D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from data_pipelines.errors import ConfigError
from vlp.detection.dense import project_places, project_tokens
from vlp.detection.window import PLAIN, Vit, WindowConfig, run_vit, vit_of

FINEST = 4
"""Pixels between the places of the finest map that is handed out."""
Found = tuple[tuple[Tensor, ...], Tensor | None, Tensor]
"""Maps, finest first; dense features where asked for; embedding."""


@dataclass(frozen=True, slots=True)
class Maps:
    """What one pass of an image tower gives."""

    levels: tuple[Tensor, ...]
    """BCHW each, finest first; of a ViT its one token grid, normalised as for pooling."""
    embedding_BD: Tensor
    """The picture in the shared space, not normalised."""
    dense_BDHW: Tensor | None = None
    """Every place in the shared space as if pooled alone, where asked for; see dense.py."""


@dataclass(frozen=True, slots=True)
class MapTower:
    """The image tower of a model, asked for its maps. Holds a reference, no state."""

    tower: nn.Module
    channels: tuple[int, ...]
    """C of the maps, finest first."""
    strides: tuple[int, ...]
    """Pixels between the places of the maps."""
    run: Callable[[Tensor, WindowConfig, bool], Found]
    """Of pixels, windows, and whether dense features are wanted."""
    has_windows: bool

    def __call__(self, pixels_BCHW: Tensor, window: WindowConfig | None = None, dense: bool = False) -> Maps:
        """Maps and embedding of normalised pictures. Raises ConfigError for windows in a tower without tokens.

        `dense`: dense features too, from the same pass; ConfigError for a tower whose places cannot be pooled alone.
        """
        if window is not None and not self.has_windows:
            raise ConfigError(
                f"windows={window.windows}: the image tower has no grid of tokens to attend in windows; leave windows "
                "out, or set model.name to an open_clip ViT or a timm VisionTransformer"
            )
        found = inside(self.tower, lambda pixels: self.run(pixels, window or PLAIN, dense), pixels_BCHW)
        levels, dense_BDHW, embedding_BD = found
        return Maps(levels, embedding_BD, dense_BDHW)


def inside(tower: nn.Module, function: Callable[[Tensor], Any], pixels_BCHW: Tensor) -> Any:
    """`function(pixels_BCHW)` in place of the tower's forward pass, its hooks included. Returns tensors or tuples."""
    own = tower.__dict__.get("forward")
    tower.forward = function
    try:
        return tower(pixels_BCHW)
    finally:
        if own is None:
            del tower.forward
        else:
            tower.forward = own


def maps_of(model: nn.Module) -> MapTower:
    """The map tower of an open_clip model. Raises ConfigError for a tower without maps."""
    tower: Any = getattr(model, "visual", None)
    vit = vit_of(tower)
    if vit is not None:
        return _of_vit(tower, vit)
    if isinstance(tower, ModifiedResNet):
        return _of_resnet(tower)
    if isinstance(tower, TimmModel) and hasattr(tower.trunk, "forward_intermediates"):
        return _of_timm(tower)
    kind = type(getattr(tower, "trunk", tower)).__name__
    raise ConfigError(
        f"detection needs feature maps, which the image tower {kind} does not give: set model.name or model.config to "
        "an open_clip ViT or ResNet, or to a timm tower with forward_intermediates"
    )


def _of_vit(tower: Any, vit: Vit) -> MapTower:
    trunk = getattr(tower, "trunk", None)

    def run(pixels_BCHW: Tensor, window: WindowConfig, dense: bool) -> Found:
        tokens = run_vit(vit, pixels_BCHW, window)
        tokens_BLD = tokens.after_BLD
        if trunk is not None:
            normed_BLD = trunk.norm(tokens_BLD)
            embedding_BD = tower.head(trunk.forward_head(normed_BLD))
        else:
            pooled_BD, _ = tower._pool(tokens_BLD)
            embedding_BD = pooled_BD if tower.proj is None else pooled_BD @ tower.proj
            # the norm of a tower with attention pooling is not of the tokens' width
            normed_BLD = tokens_BLD if tower.attn_pool is not None else tower.ln_post(tokens_BLD)
        patches_BLD = normed_BLD[:, vit.prefix :]
        dense_BDHW = project_tokens(tower, tokens.before_BLD, tokens.grid) if dense else None
        return (patches_BLD.transpose(1, 2).unflatten(2, tokens.grid),), dense_BDHW, embedding_BD

    if trunk is not None:
        width, stride = int(trunk.embed_dim), int(trunk.patch_embed.patch_size[0])
    else:
        width, stride = len(tower.class_embedding), int(tower.patch_size[0])
    return MapTower(tower, (width,), (stride,), run, has_windows=True)


def _of_resnet(tower: Any) -> MapTower:
    layers = (tower.layer1, tower.layer2, tower.layer3, tower.layer4)

    def run(pixels_BCHW: Tensor, window: WindowConfig, dense: bool) -> Found:
        found, map_BCHW = [], tower.stem(pixels_BCHW)
        for layer in layers:
            map_BCHW = layer(map_BCHW)
            found.append(map_BCHW)
        return tuple(found), project_places(tower, map_BCHW) if dense else None, tower.attnpool(map_BCHW)

    channels = tuple(int(layer[-1].conv3.out_channels) for layer in layers)
    return MapTower(tower, channels, (4, 8, 16, 32), run, has_windows=False)


def _of_timm(tower: Any) -> MapTower:
    trunk = tower.trunk
    known = [(int(item["reduction"]), number, int(item["num_chs"])) for number, item in enumerate(trunk.feature_info)]
    # of the stages with one stride the last; a tower whose stages all have one is a transformer with one grid
    last = {stride: (number, channels) for stride, number, channels in known if stride >= FINEST}
    strides = tuple(sorted(last))
    indices = [last[stride][0] for stride in strides]

    def run(pixels_BCHW: Tensor, window: WindowConfig, dense: bool) -> Found:
        final, found = trunk.forward_intermediates(pixels_BCHW, indices=indices, output_fmt="NCHW")
        dense_BDHW = project_places(tower, final) if dense else None
        return tuple(found), dense_BDHW, tower.head(trunk.forward_head(final))

    return MapTower(tower, tuple(last[stride][1] for stride in strides), strides, run, has_windows=False)


def as_type(map_BCHW: Tensor, weight: Tensor) -> Tensor:
    """The map in the type of the weights it meets, unless autocast sees to that."""
    kind = map_BCHW.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return map_BCHW
    return map_BCHW.to(weight.dtype)
