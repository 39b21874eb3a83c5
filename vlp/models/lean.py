"""A model whose towers leave out what does not reach its features, for training."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.models.image import can_pool_early, encode_pooled
from vlp.models.text import can_trim, encode_trimmed
from vlp.phases import phase


class LeanModel(nn.Module):
    """A model in training: the same weights, the same features to rounding. Has no parameters beyond the model's."""

    def __init__(self, model: Any, trim: bool = True, compiled: bool = False) -> None:
        """`trim`: unless the towers have to be called whole, as under FSDP. `compiled`: by torch.compile."""
        super().__init__()
        self.model = model
        tower = getattr(model, "text", model)
        visual = getattr(model, "visual", None)
        early = trim and can_pool_early(visual)
        self._image: Any = (lambda image: encode_pooled(visual, image)) if early else model.encode_image
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
