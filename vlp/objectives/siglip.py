"""SigLIP: every pair a yes-or-no question of its own (Zhai et al. 2023, arXiv 2303.15343, algorithm 1).

Its recipe starts the model's scale at 10 (`model.init_logit_scale` = ln 10); the bias, from -10, is the objective's.
The loss shares nothing with CLIP's: the neutral setting, mask=none, is open_clip's SigLipLoss.
"""

from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from vlp.objectives._kernel import Precision
from vlp.objectives.base import (
    Coupling,
    Dims,
    Encoder,
    Exchange,
    Features,
    LossOutput,
    Mask,
    encode_pairs,
    false_negatives,
    phrase_labels,
    refuse_idle,
    sigmoid_contrast,
)

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = None
"""No option makes it plain CLIP: it shares nothing with a softmax."""


class Config(StrictModel):
    """Options of the loss; the defaults are the paper's."""

    mask: Mask = "none"
    """Which pairs are left out, as for the objective clip."""
    init_bias: float = -10.0
    """First value of the learned bias: nearly all pairs are no pairs, and the loss starts out knowing it."""
    exchange: Exchange = "auto"
    """How ranks share the loss, as for the objective clip."""
    precision: Precision = "fp32"
    """Of the scores."""


class SigLip(nn.Module):
    """Holds the learned bias, a scalar, unless the model has one: then its own is trained, saved and exported."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.logit_bias: nn.Parameter | None = nn.Parameter(torch.tensor(config.init_bias))
        self._of_model: tuple[nn.Parameter, ...] = ()
        """In a tuple, so that the model's parameter does not become the objective's."""

    def attach(self, model: nn.Module) -> None:
        """Take the model's bias, which may come from weights. Raises ConfigError where two would be given."""
        theirs = getattr(model, "logit_bias", None)
        if isinstance(theirs, nn.Parameter):
            refuse_idle(self.config, {"name=siglip, for the model has a logit_bias of its own": ("init_bias",)})
            self._of_model, self.logit_bias = (theirs,), None

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once."""
        return encode_pairs(model, pixels_BCHW, batch, self.config.mask, "siglip")

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """The loss over the batch of all ranks."""
        labels, config = phrase_labels(features), self.config
        judge = false_negatives if labels else None
        bias = self._of_model[0].float() if self.logit_bias is None else self.logit_bias
        loss = sigmoid_contrast(
            features, logit_scale, bias, labels, judge, exchange=config.exchange, precision=config.precision
        )
        return LossOutput(loss, {"logit_bias": bias.detach()})


def build(config: Config, dims: Dims) -> SigLip:
    """The objective; SigLIP needs no dimensions."""
    return SigLip(config)
