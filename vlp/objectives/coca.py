"""CoCa: contrast, and the caption word by word from the picture (Yu et al. 2022, arXiv 2205.01917, equation 4).

For open_clip's CoCa models and equal to its CoCaLoss, except that the caption loss is a mean over the words of all
ranks' captions. The text tower must be causal, else it sees the words it is to predict. What is trained is served and
exported like any CoCa of open_clip, whose `generate` needs transformers 4. Suffixes: B samples, L tokens, T tokens of
the longest text without its first, D width of the shared embedding, N picture tokens, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp.distributed import gather
from vlp.objectives.base import Coupling, Dims, Encoder, Features, LossOutput, encode_pairs, refuse_idle, with_phrases
from vlp.objectives.clip import Config as ClipConfig
from vlp.objectives.clip import clip_loss
from vlp.phases import phase

NEEDS: tuple[str, ...] = ("pixels", "tokens")
COUPLING: Coupling = "global"
NEUTRAL: dict[str, Any] | None = {"caption_weight": 0}
"""Without the caption loss, which then needs no decoder either."""


class Config(StrictModel):
    """Options of the loss; the defaults are the paper's and open_clip's."""

    clip: ClipConfig = ClipConfig()
    """Options of the contrast, those of the objective clip."""
    caption_weight: float = Field(2.0, ge=0)
    contrast_weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _something_is_trained(self) -> "Config":
        if self.caption_weight == self.contrast_weight == 0:
            raise ConfigError("objective.caption_weight and objective.contrast_weight are both 0: set one of them")
        refuse_idle(self, {"contrast_weight=0": () if self.contrast_weight else ("clip",)})
        return self


def caption_nll(logits_BTV: Tensor, words_BT: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """(sum of the words' negative log-likelihoods, number of words), both B; padding counts nothing."""
    flat = F.cross_entropy(logits_BTV.flatten(0, 1).float(), words_BT.flatten(), ignore_index=pad, reduction="none")
    return flat.view(words_BT.shape).sum(dim=1), (words_BT != pad).sum(dim=1)


def last_word(tokens_BL: Tensor, pad: int) -> int:
    """Place of the last token that is no padding, at least 1."""
    places_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
    return max(1, int((places_L * (tokens_BL != pad)).amax()))


class CoCa(nn.Module):
    """Holds the options, and a reference to the model, whose decoder the trainer's encoder does not show."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self._model: tuple[Any, ...] = ()
        """In a tuple, so that the model's parameters do not become the objective's."""

    def attach(self, model: nn.Module) -> None:
        """Keep the model. Raises ConfigError for one that cannot caption."""
        if not self.config.caption_weight:
            return
        if not hasattr(model, "text_decoder"):
            raise ConfigError(
                "objective.name='coca' needs a model with a caption decoder (multimodal_cfg in its config): set "
                "model.name=starter-coca or coca_ViT-B-32, or objective.name=clip"
            )
        if getattr(model.text, "attn_mask", None) is None:
            raise ConfigError(
                "objective.name='coca' needs a causal text tower, and the model's sees all words at once, those to be "
                "predicted too: set model.name=starter-coca or coca_ViT-B-32"
            )
        self._model = (model,)

    def encode(self, model: Encoder, pixels_BCHW: Tensor, batch: Batch) -> Features:
        """Both towers once, and the decoder over the words of the longest text.

        `extra`: each caption's negative log-likelihood and its number of words, so that no BTV logits are kept.
        """
        if not self.config.caption_weight:
            return encode_pairs(model, pixels_BCHW, batch, self.config.clip.mask, "coca")
        (coca,) = self._model
        with phase("forward_image"):
            image_BD, image_BND = coca.visual(pixels_BCHW)
        with phase("forward_text"):
            text_BD, token_BLD = coca.text(batch.tokens)
        # the decoder is causal and has no positions of its own, so that what stands behind the longest text is no loss
        words_BT = batch.tokens[:, 1 : 1 + last_word(batch.tokens, coca.pad_id)]
        with phase("loss"):
            logits_BTV = coca.text_decoder(image_BND, token_BLD[:, : words_BT.shape[1]])
            nll_B, count_B = caption_nll(logits_BTV, words_BT, coca.pad_id)
        image_BD, text_BD = F.normalize(image_BD, dim=-1), F.normalize(text_BD, dim=-1)
        features = Features(image_BD, text_BD, extra={"nll": nll_B, "words": count_B})
        return with_phrases(features, batch, self.config.clip.mask, "coca")

    def forward(self, features: Features, logit_scale: Tensor) -> LossOutput:
        """Contrast and caption loss over the batch of all ranks."""
        config = self.config
        losses: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        if config.contrast_weight:
            loss, forward, backward = clip_loss(features, logit_scale, config.clip)
            losses.append(config.contrast_weight * loss)
            parts |= {"image_to_text": forward.detach(), "text_to_image": backward.detach()}
        if config.caption_weight:
            words = gather(features.extra["words"]).sum().clamp(min=1)
            caption = gather(features.extra["nll"]).float().sum() / words
            losses.append(config.caption_weight * caption)
            parts["caption"] = caption.detach()
        return LossOutput(sum(losses[1:], losses[0]), parts)


def build(config: Config, dims: Dims) -> CoCa:
    """The objective; the decoder is the model's."""
    return CoCa(config)
