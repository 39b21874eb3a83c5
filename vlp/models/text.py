"""Less text to compute: in a causal tower the positions behind a text's end token change nothing.

A batch is sorted by length and cut behind the longest text of each group of similar length.
Suffixes: B texts, L tokens, T tokens of all texts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from vlp.models.blocks import Group, can_run, run_blocks

GROUP = 2
"""Fewest texts of a group."""
MOST_GROUPS = {"cpu": 16, "cuda": 4}
"""More of them pad less; fewer keep a GPU's kernels large."""


def can_trim(tower: Any) -> bool:
    """Whether trimming is exact: open_clip's text tower, causal, pooled at the highest id, which is the end token.

    `tower` is a text tower, or a plain open_clip CLIP, which is its own.
    """
    plain = isinstance(tower, CLIP) and tower.text_pool_type == "argmax"
    custom = isinstance(tower, TextTransformer) and tower.cls_emb is None and tower.pool_type == "argmax"
    return (plain or custom) and tower.attn_mask is not None and can_run(tower.transformer)


def encode_trimmed(tower: Any, tokens_BL: Tensor) -> Tensor:
    """The tower's output for texts cut behind their group's last end token; BD, not normalised."""
    device = tokens_BL.device
    ends_B, order_B = tokens_BL.argmax(dim=1).sort()
    count = max(1, min(MOST_GROUPS.get(device.type, MOST_GROUPS["cuda"]), len(ends_B) // GROUP))
    lengths = [int(ends[-1]) + 1 for ends in ends_B.cpu().tensor_split(count)]
    tokens, places, pooled, groups, first = [], [], [], list[Group](), 0
    for length, ends, rows in zip(lengths, ends_B.tensor_split(count), order_B.tensor_split(count), strict=True):
        tokens.append(tokens_BL[rows, :length].reshape(-1))
        places.append(torch.arange(length, device=device).repeat(len(rows)))
        pooled.append(first + torch.arange(len(rows), device=device) * length + ends)
        groups.append(Group(len(rows), length, tower.attn_mask[:length, :length]))
        first += len(rows) * length
    dtype = tower.transformer.get_cast_dtype()
    positions_TD = F.embedding(torch.cat(places), tower.positional_embedding)
    tokens_TD = tower.token_embedding(torch.cat(tokens)).to(dtype) + positions_TD.to(dtype)
    pooled_BD = run_blocks(tower.transformer, tokens_TD, groups, torch.cat(pooled))[order_B.argsort()]
    features: Tensor = tower.ln_final(pooled_BD)
    projection = tower.text_projection
    if projection is not None:
        features = projection(features) if isinstance(projection, nn.Linear) else features @ projection
    return features
