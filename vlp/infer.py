"""Running a bundle: the one code path behind evaluation in the loop, `vlp eval` and the server.

Suffixes: N pictures or texts, D embedding width, L labels (in tokens_NL: text length), P prompts.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.preprocess import load_image, normalise
from vlp.bundle import Bundle

BATCH = 64
TEMPLATES = ("{}",)


@torch.inference_mode()
def encode_pixels(bundle: Bundle, pixels_NCHW: Tensor) -> Tensor:
    """uint8 NCHW of the model's size to L2-normalised float32 ND on the CPU."""
    model = bundle.model
    rows = [
        model.encode_image(ready(bundle, chunk), normalize=True).float().cpu()  # type: ignore[operator]
        for chunk in pixels_NCHW.split(BATCH)
    ]
    return torch.cat(rows) if rows else torch.empty(0, bundle.dim)


def ready(bundle: Bundle, pixels_NCHW: Tensor) -> Tensor:
    """Pixels as the image tower takes them: normalised, on its device, channels last: a third less time in
    convolutions, next to none of it in others."""
    return normalise(pixels_NCHW.to(bundle.device), bundle.image).contiguous(memory_format=torch.channels_last)


def encode_images(bundle: Bundle, images: Iterable[bytes]) -> Tensor:
    """Encoded pictures to L2-normalised float32 ND. Raises BadSample for a picture that cannot be used."""
    pixels = [load_image(data, bundle.image) for data in images]
    return encode_pixels(bundle, torch.stack(pixels)) if pixels else torch.empty(0, bundle.dim)


def encode_texts(bundle: Bundle, texts: Sequence[str]) -> Tensor:
    """Texts to L2-normalised float32 ND."""
    return encode_tokens(bundle, bundle.tokenizer(texts)) if len(texts) else torch.empty(0, bundle.dim)


@torch.inference_mode()
def encode_tokens(bundle: Bundle, tokens_NL: Tensor) -> Tensor:
    """Token ids, padded to length L, to L2-normalised float32 ND on the CPU."""
    rows = [
        bundle.model.encode_text(chunk.to(bundle.device), normalize=True).float().cpu()  # type: ignore[operator]
        for chunk in tokens_NL.split(BATCH)
    ]
    return torch.cat(rows) if rows else torch.empty(0, bundle.dim)


def label_head(bundle: Bundle, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """LD classifier weights: the normalised mean over templates of each label's text embedding."""
    return pool_prompts(encode_texts(bundle, make_prompts(labels, templates)), len(labels))


def make_prompts(labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every label in every template, label by label. Replaces `{}` only: templates may come from strangers."""
    return [template.replace("{}", label) for label in labels for template in templates]


def pool_prompts(prompts_PD: Tensor, labels: int) -> Tensor:
    """LD: embeddings of `make_prompts` to one normalised mean per label."""
    return F.normalize(prompts_PD.view(labels, -1, prompts_PD.shape[-1]).mean(dim=1), dim=-1)


def classify(bundle: Bundle, image_ND: Tensor, head_LD: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities, cosines), both NL; the softmax uses the model's own logit scale."""
    cosines_NL = image_ND @ head_LD.T
    scale = bundle.model.logit_scale.detach().exp().float().cpu()  # type: ignore[operator]
    return (cosines_NL * scale).softmax(dim=-1), cosines_NL
