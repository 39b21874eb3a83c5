"""open_clip's transformer blocks, with their own weights and to rounding their results, in less work.

All tokens of a batch go through the linear layers side by side, however long each sequence is; only attention sees
sequences. The last block is computed for the tokens that are pooled, and for no other. On CPUs attention is plain
products: in bfloat16 the fused kernels take three to five times as long, forward and backward.

Suffixes: T tokens of all sequences, D width; per group of equally long sequences R sequences, H heads, Q queries, L
tokens, E width of a head; S sequences of all groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MOST_SCORES = 2**27
"""Scores of one group from which plain products would need too much memory, and the fused kernel is used."""


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive sequences of a batch that are equally long, padding included."""

    count: int
    length: int
    mask_QL: Tensor | None = None
    """What is added to the scores: -inf where a query may not look."""


def can_run(transformer: object) -> bool:
    """Whether these are open_clip's standard blocks."""
    return isinstance(transformer, Transformer) and all(
        type(block) is ResidualAttentionBlock
        and not hasattr(block, "ln_1_kv")
        and block.attn.in_proj_bias is not None
        and block.attn.in_proj_weight is not None
        for block in transformer.resblocks
    )


def run_blocks(transformer: Any, tokens_TD: Tensor, groups: Sequence[Group], pooled_S: Tensor | None) -> Tensor:
    """TD, or SD where `pooled_S` says which token of each sequence, counted over all, is wanted of the last block."""
    last = len(transformer.resblocks) - 1
    for number, block in enumerate(transformer.resblocks):
        wanted = pooled_S if number == last else None
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            tokens_TD = checkpoint(_block, block, tokens_TD, groups, wanted, use_reentrant=False)
        else:
            tokens_TD = _block(block, tokens_TD, groups, wanted)
    return tokens_TD


def _block(block: Any, tokens_TD: Tensor, groups: Sequence[Group], pooled_S: Tensor | None) -> Tensor:
    """One pre-norm block; of all tokens, or of the pooled ones as queries and all others as keys and values."""
    normed_TD = block.ln_1(tokens_TD)
    if pooled_S is None:
        mixed_TD = _attention(block.attn, normed_TD, groups)
    else:
        tokens_TD = tokens_TD[pooled_S]
        mixed_TD = _pooled_attention(block.attn, normed_TD, groups, pooled_S)
    tokens_TD = tokens_TD + block.ls_1(block.attn.out_proj(mixed_TD))
    result: Tensor = tokens_TD + block.ls_2(block.mlp(block.ln_2(tokens_TD)))
    return result


def _attention(attn: nn.MultiheadAttention, normed_TD: Tensor, groups: Sequence[Group]) -> Tensor:
    heads, width = attn.num_heads, normed_TD.shape[1]
    projected = F.linear(normed_TD, attn.in_proj_weight, attn.in_proj_bias)
    mixed = []
    for group, part in zip(groups, projected.split([g.count * g.length for g in groups]), strict=True):
        query, key, value = part.view(group.count, group.length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed.append(attend(query, key, value, group.mask_QL).transpose(1, 2).reshape(-1, width))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _pooled_attention(
    attn: nn.MultiheadAttention, normed_TD: Tensor, groups: Sequence[Group], pooled_S: Tensor
) -> Tensor:
    """SD: the pooled tokens look at their own sequences, as far as their own row of the mask allows."""
    heads, width = attn.num_heads, normed_TD.shape[1]
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    query_SD = F.linear(normed_TD[pooled_S], weight[:width], bias[:width])
    projected = F.linear(normed_TD, weight[width:], bias[width:])
    mixed, first, token = [], 0, 0
    for group in groups:
        rows = slice(first, first + group.count)
        part = projected[token : token + group.count * group.length]
        key, value = part.view(group.count, group.length, 2, heads, -1).permute(2, 0, 3, 1, 4)
        query = query_SD[rows].view(group.count, heads, 1, -1)
        mask = group.mask_QL
        if mask is not None:
            places_R = pooled_S[rows] - token - torch.arange(group.count, device=pooled_S.device) * group.length
            mask = mask[places_R][:, None, None]
        mixed.append(attend(query, key, value, mask).reshape(-1, width))
        first, token = rows.stop, token + len(part)
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def attend(query_RHQE: Tensor, key_RHLE: Tensor, value_RHLE: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, RHQE. `mask`: QL or R11L, added to the scores.

    In bfloat16 on CPUs scores are rounded to bfloat16 and summed up in float32, as plain attention under autocast does.
    """
    scores = query_RHQE.shape[0] * query_RHQE.shape[1] * query_RHQE.shape[2] * key_RHLE.shape[2]
    if query_RHQE.device.type != "cpu" or scores > MOST_SCORES:
        mask = None if mask is None else mask.to(query_RHQE.dtype)
        return F.scaled_dot_product_attention(query_RHQE, key_RHLE, value_RHLE, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):
        scores_RHQL = (query_RHQE * query_RHQE.shape[-1] ** -0.5) @ key_RHLE.transpose(2, 3)
        if mask is not None:
            scores_RHQL = scores_RHQL + mask.to(scores_RHQL.dtype)
        mixed_RHQE: Tensor = scores_RHQL.softmax(dim=-1) @ value_RHLE
        return mixed_RHQE
