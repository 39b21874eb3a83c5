"""A model whose towers leave out what does not reach its features, for training."""

from functools import partial
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
        # asked for in so many words, because open_clip's CoCa normalises unless told otherwise
        image, text = (partial(encode, normalize=False) for encode in (model.encode_image, model.encode_text))
        self._image: Any = (lambda pixels: encode_pooled(visual, pixels)) if early else image
        trimmed = trim and can_trim(tower)
        self._text: Any = (lambda tokens: encode_trimmed(tower, tokens)) if trimmed else text
        if compiled:
            self._image = torch.compile(self._image)
            # where texts are cut depends on their words: compiled, every new length would be compiled anew
            self._text = self._text if trimmed else torch.compile(self._text)

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
