"""Less of a picture to compute: open_clip's ViT gives one token to the embedding, so the last block needs no other."""

from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

from vlp.models.blocks import Group, can_run, run_blocks


def can_pool_early(tower: Any) -> bool:
    """Whether `encode_pooled` gives this tower's output: open_clip's ViT with a class token or a mean, and no more."""
    possible: bool = (
        type(tower) is VisionTransformer
        and tower.attn_pool is None
        and tower.pool_type in ("tok", "avg")
        and not tower.output_tokens
        and can_run(tower.transformer)
    )
    return possible


def encode_pooled(tower: Any, pixels_BCHW: Tensor) -> Tensor:
    """The tower's output, BD, not normalised."""
    tokens_BLD = tower._embeds(pixels_BCHW)
    count, length, width = tokens_BLD.shape
    by_class = tower.pool_type == "tok"
    pooled_B = torch.arange(count, device=tokens_BLD.device) * length if by_class else None
    tokens_TD = run_blocks(tower.transformer, tokens_BLD.reshape(-1, width), [Group(count, length)], pooled_B)
    if by_class:
        pooled_BD = tower.ln_post(tokens_TD)
    else:
        pooled_BD, _ = tower._pool(tokens_TD.view(count, length, width))
    features: Tensor = pooled_BD if tower.proj is None else pooled_BD @ tower.proj
    return features
