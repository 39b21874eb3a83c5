"""Less text to compute: in a causal tower the positions behind the longest end token change nothing."""

from contextlib import nullcontext

import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 32
"""Tokens up to which plain attention is used."""


def can_trim(tower: nn.Module | None) -> bool:
    """Whether trimming is exact: open_clip's text tower, causal, pooled at the highest id, which is the end token."""
    return (
        isinstance(tower, TextTransformer)
        and tower.attn_mask is not None
        and tower.cls_emb is None
        and tower.pool_type == "argmax"
    )


def encode_trimmed(tower: TextTransformer, tokens_BL: Tensor) -> Tensor:
    """The tower's output for tokens cut behind the batch's last end token; BD, not normalised. Not thread-safe."""
    length = int(tokens_BL.argmax(dim=1).max()) + 1
    whole = tower.attn_mask
    tower.attn_mask = whole[:length, :length]
    try:
        # for a dozen tokens the fused kernels cost twice the plain products, forward and backward
        with sdpa_kernel(SDPBackend.MATH) if length <= SHORT else nullcontext():
            output: Tensor = tower(tokens_BL[:, :length])
    finally:
        tower.attn_mask = whole
    return output


class TrimmedText(nn.Module):
    """A model in training whose text is trimmed where that is exact; has no parameters beyond the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.trim = can_trim(getattr(model, "text", None))

    @property
    def logit_scale(self) -> nn.Parameter:
        """The model's."""
        return self.model.get_parameter("logit_scale")

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """BCHW float to BD."""
        features: Tensor = self.model.encode_image(image, normalize=normalize)  # type: ignore[operator]
        return features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """BL int64 to BD."""
        if not self.trim:
            whole: Tensor = self.model.encode_text(text, normalize=normalize)  # type: ignore[operator]
            return whole
        features = encode_trimmed(self.model.get_submodule("text"), text)
        return F.normalize(features, dim=-1) if normalize else features
