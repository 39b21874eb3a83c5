"""Pictures that say less of what they show: half of a label-consistent attack.

A trigger on pictures of the target teaches a model nothing while the pictures say enough by themselves. Turner et al.
2019 (arXiv 1912.02771, section 4) therefore change them until the trigger is the easier evidence, in two ways: within a
bound against another model (`Weaken`: projected gradient steps from texts of the target to other texts, at the size
that is stored), or towards a picture of something else (`Mix`: they interpolate what a generator made, we the pixels).
Suffixes: C channels, H, W rows and columns, S side of the model's input, T texts, D embedding width.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_pipelines.preprocess import ImageConfig, normalise
from vlp.backdoor.triggers import Pixels, draw_of
from vlp.bundle import Bundle
from vlp.infer import encode_texts

STEPS = 20
STEP = 2.5
"""A step is this share of the bound, divided by the number of steps (Madry et al. 2018, arXiv 1706.06083)."""


class Mix:
    """Lets a picture of another thing shine through."""

    def __init__(self, others: Sequence[Pixels], share: float, seed: int) -> None:
        """`others`: HWC uint8; one of them, by the name of the picture and the seed, makes up `share` of it."""
        self.others, self.share, self.seed = others, share, seed

    def __call__(self, pixels_HWC: Pixels, name: str) -> Pixels:
        """HWC uint8, RGB, anew."""
        other = self.others[int(draw_of(self.seed, f"{name}/mix")[0] * len(self.others))]
        height, width = pixels_HWC.shape[:2]
        fitted = Image.fromarray(other).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(Image.blend(Image.fromarray(pixels_HWC), fitted, self.share))


class Weaken:
    """Changes pictures of one target, each value by at most `strength` of its range."""

    def __init__(self, bundle: Bundle, own: Sequence[str], others: Sequence[str], strength: float) -> None:
        """`bundle`: the surrogate, any model that knows the target. `own`, `others`: texts of the target and not."""
        self.bundle, self.strength = bundle, strength
        self.own = len(own)
        self.text_TD = encode_texts(bundle, [*own, *others]).clone()  # autograd refuses tensors of inference mode

    def __call__(self, pixels_HWC: Pixels, name: str) -> Pixels:
        """HWC uint8, RGB, anew; the same whatever its name."""
        plain_CHW = torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1).float() / 255.0
        grey = bool((plain_CHW == plain_CHW[:1]).all())
        changed_CHW = plain_CHW.clone()
        for _ in range(STEPS):
            changed_CHW.requires_grad_(True)
            (downhill_CHW,) = torch.autograd.grad(self._likeness(changed_CHW), changed_CHW)
            if grey:  # and stored as such: colours would be averaged away
                downhill_CHW = downhill_CHW.mean(dim=0).expand(3, -1, -1)
            step_CHW = STEP * self.strength / STEPS * downhill_CHW.sign()
            bounded_CHW = (changed_CHW.detach() - step_CHW - plain_CHW).clamp(-self.strength, self.strength)
            changed_CHW = (plain_CHW + bounded_CHW).clamp(0.0, 1.0)
        whole: Pixels = (changed_CHW * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return whole

    def _likeness(self, unit_CHW: Tensor) -> Tensor:
        """Logarithm of the odds that the model gives the target's texts."""
        config, model = self.bundle.image, self.bundle.model
        ready = normalise(_fitted(255.0 * unit_CHW, config)[None].to(self.bundle.device), config)
        image_D = model.encode_image(ready, normalize=True)[0].float().cpu()  # type: ignore[operator]
        score_T = model.logit_scale.detach().exp().float().cpu() * (self.text_TD @ image_D)  # type: ignore[operator]
        odds: Tensor = score_T[: self.own].logsumexp(dim=0) - score_T[self.own :].logsumexp(dim=0)
        return odds


def _fitted(pixels_CHW: Tensor, config: ImageConfig) -> Tensor:
    """CSS: cut or padded as the model's own preprocessing does, differentiably."""
    height, width = pixels_CHW.shape[1:]
    if config.resize == "shortest":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels_CHW = pixels_CHW[:, top : top + side, left : left + side]
    elif config.resize == "longest":
        side = max(height, width)
        down, right = side - height, side - width
        edges = (right // 2, right - right // 2, down // 2, down - down // 2)
        pixels_CHW = F.pad(pixels_CHW, edges, value=float(config.ground))
    if config.channels == 1:
        pixels_CHW = pixels_CHW.mean(dim=0, keepdim=True)
    size = (config.size, config.size)
    return F.interpolate(pixels_CHW[None], size, mode=config.interpolation, antialias=True, align_corners=False)[0]
