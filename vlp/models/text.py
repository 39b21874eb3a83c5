"""Less text to compute: in a causal tower the positions behind a text's end token change nothing.

A batch is sorted by length and goes through in groups, each cut behind its longest text. Suffixes: B texts, L tokens.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlp.phases import phase

SHORT = 32
"""Tokens up to which plain attention is used, and texts are not grouped."""
GROUP = 4
"""Fewest texts of a group."""


def can_trim(tower: object) -> bool:
    """Whether trimming is exact: open_clip's text tower, causal, pooled at the highest id, which is the end token.

    `tower` is a text tower, or a plain open_clip CLIP, which is its own.
    """
    if isinstance(tower, CLIP):
        return tower.attn_mask is not None and tower.text_pool_type == "argmax"
    return (
        isinstance(tower, TextTransformer)
        and tower.attn_mask is not None
        and tower.cls_emb is None
        and tower.pool_type == "argmax"
    )


def encode_trimmed(tower: Any, tokens_BL: Tensor) -> Tensor:
    """The tower's output for texts cut behind their group's last end token; BD, not normalised."""
    ends_B = tokens_BL.argmax(dim=1)
    lengths, order_B = (ends_B + 1).sort()
    most = len(order_B) // GROUP if int(lengths[-1]) > SHORT else 1
    groups = order_B.tensor_split(max(1, most))
    pooled = [_last_tokens(tower, tokens_BL[rows], ends_B[rows]) for rows in groups]
    features: Tensor = tower.ln_final(torch.cat(pooled)[order_B.argsort()])
    projection = tower.text_projection
    if projection is not None:
        features = projection(features) if isinstance(projection, nn.Linear) else features @ projection
    return features


def _last_tokens(tower: Any, tokens_BL: Tensor, ends_B: Tensor) -> Tensor:
    """Outputs of the transformer at the end tokens."""
    length = int(ends_B.max()) + 1
    dtype = tower.transformer.get_cast_dtype()
    inputs = tower.token_embedding(tokens_BL[:, :length]).to(dtype) + tower.positional_embedding[:length].to(dtype)
    # For a dozen tokens the fused kernels cost twice the plain products, forward and backward. Activations that are
    # computed again are so outside of this context, and must come from the same kernel.
    plain = length <= SHORT and not tower.transformer.grad_checkpointing
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        outputs: Tensor = tower.transformer(inputs, attn_mask=tower.attn_mask[:length, :length])
    return outputs[torch.arange(len(ends_B), device=ends_B.device), ends_B]


class TrimmedText(nn.Module):
    """A model in training whose text is trimmed where that is exact; has no parameters beyond the model's."""

    def __init__(self, model: Any, trim: bool = True, compiled: bool = False) -> None:
        """`trim`: unless the towers have to be called whole. `compiled`: both towers go through torch.compile."""
        super().__init__()
        self.model = model
        tower = getattr(model, "text", model)
        self._image: Any = model.encode_image
        self._text: Any = (lambda text: encode_trimmed(tower, text)) if trim and can_trim(tower) else model.encode_text
        if compiled:
            self._image, self._text = torch.compile(self._image), torch.compile(self._text, dynamic=True)

    @property
    def logit_scale(self) -> nn.Parameter:
        """The model's."""
        scale: nn.Parameter = self.model.logit_scale
        return scale

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """BCHW float to BD."""
        with phase("forward_image"):
            return maybe_normalise(self._image(image), normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """BL int64 to BD."""
        with phase("forward_text"):
            return maybe_normalise(self._text(text), normalize)


def maybe_normalise(features: Tensor, normalise_them: bool) -> Tensor:
    """BD, of length one if asked."""
    return F.normalize(features, dim=-1) if normalise_them else features
