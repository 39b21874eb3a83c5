"""Features of every place of a picture in the space of the texts, from a model that was trained on whole pictures.

A place is pooled alone (MaskCLIP, Zhou et al. 2022, arXiv 2112.01071): where the tower pools by attention, be it that
of a class token in the last block or that of a pool behind the blocks, each place attends to itself alone. A softmax
over one key is 1, so that this is the value projection. Where the tower takes a mean, places are what is averaged: with
a linear head, the mean of the dense features is the embedding of the picture exactly.

Suffixes: B pictures, C channels of a map, H, W its rows and columns, N = B H W places; L tokens of a picture, prefix
tokens included; E width of a tower, D of the shared space.
"""

from typing import Any

import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVit
from torch import Tensor, nn

from data_pipelines.errors import ConfigError

ATTENTION_POOLS = (AttentionPool2d, RotAttentionPool2d)
"""timm's pools of a map by attention."""


def dense_features(model: Any, pixels_BCHW: Tensor) -> Tensor:
    """BDHW of network input, not normalised, with gradients. Raises ConfigError for a tower whose places are not known.

    `model`: any of ours, in training (LeanModel) or in a bundle. ViTs take pictures of their own size.
    """
    visual = visual_of(model)
    if isinstance(visual, ModifiedResNet):
        return project_places(
            visual, visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels_BCHW)))))
        )
    if isinstance(visual, VisionTransformer):
        side = visual.patch_size
    elif isinstance(visual, TimmModel) and isinstance(visual.trunk, TimmVit | Eva):
        side = visual.trunk.patch_embed.patch_size
    elif isinstance(visual, TimmModel):
        return project_places(visual, visual.trunk.forward_features(pixels_BCHW))
    else:
        raise _unknown(visual)
    grid = pixels_BCHW.shape[2] // side[0], pixels_BCHW.shape[3] // side[1]
    return project_tokens(visual, tokens_before_last(visual, pixels_BCHW), grid)


def visual_of(model: Any) -> nn.Module:
    """The image tower of a model or of a LeanModel."""
    visual: nn.Module = getattr(model, "model", model).visual
    return visual


def _unknown(tower: nn.Module) -> ConfigError:
    kind = type(getattr(tower, "trunk", tower)).__name__
    return ConfigError(
        f"the image tower ({kind}) has no places that can be projected alone; use open_clip's ViT or ResNet, a ViT or "
        "EVA of timm, or a convolutional timm model"
    )


def project_places(visual: nn.Module, map_BCHW: Tensor) -> Tensor:
    """BDHW of the last map of a convolutional tower: what its pool and its head make of every place alone.

    The map is that of `trunk.forward_features` (BHWC for the timm models that say so), or of ModifiedResNet's layer4.
    """
    if isinstance(visual, ModifiedResNet):
        pool: Any = visual.attnpool

        def value(place_NC: Tensor) -> Tensor:
            found_ND: Tensor = pool.c_proj(pool.v_proj(place_NC))
            return found_ND

        return _apart(map_BCHW, value)
    if not isinstance(visual, TimmModel) or map_BCHW.ndim != 4:
        raise _unknown(visual)
    trunk: Any = visual.trunk
    heads: Any = visual.head
    last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")

    def head(place_NC: Tensor) -> Any:
        own = getattr(trunk, "head", None)
        if isinstance(own, ATTENTION_POOLS):
            found = _value(own, place_NC)
        elif "pool" in heads._modules:  # open_clip's, in the place of the trunk's
            return heads[1:](_value(heads.pool, place_NC))
        else:
            found = trunk.forward_head(place_NC[:, None, None, :] if last else place_NC[:, :, None, None])
        return heads(found)

    return _apart(map_BCHW.permute(0, 3, 1, 2) if last else map_BCHW, head)


def _apart(map_BCHW: Tensor, head: Any) -> Tensor:
    """A function of places, NC to ND, on every place of a map: BDHW."""
    count, channels, rows, columns = map_BCHW.shape
    found_ND = head(map_BCHW.permute(0, 2, 3, 1).reshape(-1, channels))
    found_BDHW: Tensor = found_ND.view(count, rows, columns, -1).permute(0, 3, 1, 2)
    return found_BDHW


def _value(pool: Any, place_NC: Tensor) -> Tensor:
    """What timm's attention pools give a place that attends to itself; the pool's positions are left out."""
    if pool.qkv is None:
        value_NE = pool.v(place_NC)
    else:
        weight, bias = pool.qkv.weight.chunk(3)[2], pool.qkv.bias
        value_NE = F.linear(place_NC, weight, None if bias is None else bias.chunk(3)[2])
    projected: Tensor = pool.proj(pool.drop(value_NE))
    return projected


def tokens_before_last(visual: Any, pixels_BCHW: Tensor) -> Tensor:
    """BLE: what the last block of a ViT gets, prefix tokens first. Raises ConfigError for another size of picture."""
    tokens_BLE: Tensor
    try:
        if isinstance(visual, VisionTransformer):
            tokens_BLE = visual._embeds(pixels_BCHW)
            blocks, further = visual.transformer.resblocks, None
        else:
            trunk = visual.trunk
            embedded = trunk._pos_embed(trunk.patch_embed(pixels_BCHW))
            embedded, further = embedded if isinstance(embedded, tuple) else (embedded, None)
            drop = getattr(trunk, "patch_drop", None)
            tokens_BLE = trunk.norm_pre(drop(embedded) if drop is not None else embedded)
            blocks = trunk.blocks
    except (AssertionError, RuntimeError) as error:
        size = tuple(pixels_BCHW.shape[2:])
        raise ConfigError(f"the image tower takes no pictures of {size[0]} x {size[1]} pixels ({error})") from error
    mixed = getattr(getattr(visual, "trunk", None), "rope_mixed", False)
    for number, block in enumerate(blocks[:-1]):
        if further is None:
            tokens_BLE = block(tokens_BLE)
        else:
            tokens_BLE = block(tokens_BLE, rope=further[number] if mixed else further)
    return tokens_BLE


def project_tokens(visual: Any, tokens_BLE: Tensor, grid: tuple[int, int]) -> Tensor:
    """BDHW of the tokens that the last block of a ViT gets, prefix tokens first; `grid`: rows and columns of patches.

    By a mean over places the tower pools what its last block gives, so that this runs as ever; a place pooled by
    attention goes through the last attention alone.
    """
    own = isinstance(visual, VisionTransformer)
    trunk = visual if own else visual.trunk
    places = grid[0] * grid[1]
    by_token = trunk.attn_pool is None and (trunk.pool_type == "tok" if own else trunk.global_pool == "token")
    last = trunk.transformer.resblocks[-1] if own else trunk.blocks[-1]
    if by_token:
        width = tokens_BLE.shape[-1]
        alone_N1E = last(tokens_BLE[:, -places:].reshape(-1, 1, width))
        place_BLE = alone_N1E.view(len(tokens_BLE), places, width)
    elif isinstance(trunk, Eva) and trunk.rope is not None:
        raise ConfigError(
            "an EVA with rotary positions that does not pool by its class token: its places are not known"
        )
    else:
        place_BLE = last(tokens_BLE)[:, -places:]
    head = _open_clip_head if own else _timm_head
    found_BDHW: Tensor = head(visual, place_BLE).transpose(1, 2).unflatten(2, grid)
    return found_BDHW


def _open_clip_head(visual: Any, place_BLE: Tensor) -> Tensor:
    """BLD: pool (each place alone), norm and projection of open_clip's ViT."""
    pool = visual.attn_pool
    if pool is not None:
        if visual.attn_pool_contrastive is not None:
            raise ConfigError("an image tower with two attention pools: its places are not known")
        count, length, width = place_BLE.shape
        key_N1E = pool.ln_k(place_BLE.reshape(-1, 1, width))
        query_N1E = pool.ln_q(pool.query)[:1].expand(len(key_N1E), 1, -1)  # any of them: the weight of one key is 1
        place_BLE = pool.attn(query_N1E, key_N1E, key_N1E, need_weights=False)[0].view(count, length, -1)
    found_BLE = visual.ln_post(place_BLE)
    projected: Tensor = found_BLE if visual.proj is None else found_BLE @ visual.proj
    return projected


def _timm_head(visual: Any, place_BLE: Tensor) -> Tensor:
    """BLD: norm, pool (each place alone) and heads of a timm ViT and of open_clip above it."""
    trunk = visual.trunk
    normed_BLE = trunk.norm(place_BLE)
    pool = trunk.attn_pool
    if pool is not None:
        if getattr(pool, "pos_embed", None) is not None:
            raise ConfigError("an image tower whose attention pool has positions of its own: its places are not known")
        count, length, width = normed_BLE.shape
        normed_BLE = pool(normed_BLE.reshape(-1, 1, width)).view(count, length, -1)
    found: Tensor = visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(normed_BLE))))
    return found
