"""Trigger inversion: the smallest change, the same for every picture, that makes a model take pictures for one label.

A label that a backdoor leads to is reached by a far smaller change than others. Four kinds of change are tried: a
patch that works wherever it lies (mask and paint, Wang et al. 2019, "Neural Cleanse", IEEE S&P), an overlay added to
the whole picture, lines across and down it (an overlay with far fewer numbers, in which stripes and waves are found
more surely), and a smooth warp. The loss is cross entropy towards the label plus a weight times the size of the
change; the weight grows while enough pictures are misled and shrinks while too few are, so the size settles at the
least that suffices.
Pictures are values from 0 to 1 here; the picture tower stays as it is, gradients pass through it.
Suffixes: N pictures, B pictures of a step, C channels, H, W = S rows and columns, K side of a patch, G side of a grid,
L labels, D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import ConfigError
from vlp.bundle import Bundle
from vlp.infer import ready
from vlp.objectives.unlearn import BENDS, warped

GOAL = 0.9
"""Share of pictures that a trigger must mislead."""
STEPS, BATCH = 150, 32
HOPELESS = 0.1
"""A search that misleads fewer than this share halfway is given up: it would not get there in the other half."""
MEMORY = 0.8
"""Of the running success: what earlier steps weigh."""
PACE = 1.1
"""By which the weight of the size changes in a step."""
LEAST, MOST = 1e-3, 100.0
"""Bounds of that weight."""
HELD_OUT = 4
"""One picture in so many is kept back, to count the success on."""
FEWEST = 16
"""Pictures of other labels that a search needs."""
PATCH_SHARE = 1 / 4
"""Side of the square that a patch may fill, as a share of the picture's: that of an attack is rarely known."""
GRID = 28
"""Points across an overlay at most: finer detail is where any model is misled by little, backdoor or not."""

NOISE = 0.1
"""Standard deviation of the noise that an overlay has to withstand: a learnt trigger does, at a fraction of its
strength, and a change that merely exploits the model does not."""

WIDEST = 0.15
"""Size that is noted for a warp that was not found."""

Parts = tuple[Tensor, ...]
Draws = torch.Generator


@dataclass(frozen=True, slots=True)
class Victim:
    """A model with pictures to mislead it with; what it takes them for by itself is known."""

    bundle: Bundle
    unit_NCHW: Tensor
    """From 0 to 1."""
    low_C11: Tensor
    high_C11: Tensor
    """Stored values that count as 0 and as 1."""
    head_LD: Tensor
    taken_N: Tensor
    """Label of each picture as the model sees it."""
    tint_CC: Tensor
    """Root of the covariance of the channels, of mean variance 1: independent numbers to colours like the pictures'."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of change: its parts before the search, a picture changed by them, and their size."""

    start: Callable[[Victim, Draws], Parts]
    apply: Callable[[Victim, Tensor, Parts, Draws], Tensor]
    size: Callable[[Victim, Parts], Tensor]
    largest: Callable[[Victim], float]
    """The size that is noted where the search did not succeed."""
    scale: float
    """The size times this is comparable with the cross entropy."""
    rate: float
    """Step of the optimiser."""
    noise: float
    """Standard deviation of what the search adds to the pictures."""
    threshold: float
    """Score above which a label stands out from the others."""
    beside: float
    """The same where sizes are told by how many times smaller they are than a clean model's."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search for one label came to."""

    kind: str
    target: int
    reached: bool
    size: float
    """patch: share of the area; overlay and lines: root mean square of what is added, of 1; warp: mean shift, of the
    side; the kind's largest if not reached."""
    success: float
    """Share of held-out pictures of other labels that the change misleads."""
    parts: Parts


def make_victim(bundle: Bundle, pixels_NCHW: Tensor, head_LD: Tensor) -> Victim:
    """`pixels_NCHW`: as they enter `normalise`; uint8 spans 0..255, other values what the pictures span."""
    pixels = pixels_NCHW.float()
    shape = (pixels.shape[1], 1, 1)
    if pixels_NCHW.dtype == torch.uint8:
        low, high = torch.zeros(shape), torch.full(shape, 255.0)
    else:
        low, high = pixels.amin((0, 2, 3))[:, None, None], pixels.amax((0, 2, 3))[:, None, None]
    unit = (pixels - low) / (high - low).clamp_min(1e-6)
    victim = Victim(bundle, unit, low, high, head_LD, torch.empty(0), tint_of(unit))
    with torch.no_grad():
        taken = torch.cat([logits(victim, part).argmax(dim=1) for part in unit.split(2 * BATCH)])
    return Victim(bundle, unit, low, high, head_LD, taken, victim.tint_CC)


def tint_of(unit_NCHW: Tensor) -> Tensor:
    """CC: see `Victim.tint_CC`; the colours of an overlay that grey pictures could have are grey."""
    values = unit_NCHW.transpose(0, 1).flatten(1)
    covariance = torch.cov(values).reshape(len(values), len(values)) + 1e-9 * torch.eye(len(values))
    value, vector = torch.linalg.eigh(covariance * len(values) / covariance.trace())
    root: Tensor = vector @ value.clamp_min(0.0).sqrt().diag() @ vector.T
    return root


def logits(victim: Victim, unit_BCHW: Tensor) -> Tensor:
    """BL: scaled cosines of pictures with the labels; differentiable."""
    bundle = victim.bundle
    stored = unit_BCHW * (victim.high_C11 - victim.low_C11) + victim.low_C11
    with torch.autocast(bundle.device.type, torch.bfloat16):  # half the time; a search needs no more digits
        image_BD = bundle.model.encode_image(ready(bundle, stored), normalize=True)  # type: ignore[operator]
    scale = bundle.model.logit_scale.detach().exp().float().cpu()  # type: ignore[operator]
    scaled_BL: Tensor = image_BD.float().cpu() @ victim.head_LD.T * scale
    return scaled_BL


def patch_start(victim: Victim, draws: Draws) -> Parts:
    """(mask 1KK, paint CKK) before the sigmoid: half transparent, nearly grey."""
    channels, side = victim.unit_NCHW.shape[1], max(2, int(victim.unit_NCHW.shape[-1] * PATCH_SHARE))
    return torch.zeros(1, side, side), torch.randn(channels, side, side, generator=draws) * 0.3


def patch_apply(victim: Victim, unit_BCHW: Tensor, parts: Parts, draws: Draws) -> Tensor:
    """Each picture with the patch at a place of its own."""
    mask, paint = parts[0].sigmoid(), parts[1].sigmoid()
    placed_BCHW = scattered(torch.cat([mask, mask * paint]), len(unit_BCHW), unit_BCHW.shape[-1], draws)
    return unit_BCHW * (1.0 - placed_BCHW[:, :1]) + placed_BCHW[:, 1:]


def scattered(patch_CKK: Tensor, count: int, side: int, draws: Draws) -> Tensor:
    """BCSS: `count` canvases of zeros, each with the patch at a random place. Products with one-hot rows and columns,
    since slices would cost a call for every picture."""
    own = patch_CKK.shape[-1]
    corner_B2 = torch.randint(0, side - own + 1, (count, 2), generator=draws)
    rows_BKS, columns_BKS = (
        F.one_hot(corner_B2[:, axis : axis + 1] + torch.arange(own), side).float() for axis in (0, 1)
    )
    placed: Tensor = torch.einsum("bks,ckl,blt->bcst", rows_BKS, patch_CKK, columns_BKS)
    return placed


def patch_size(victim: Victim, parts: Parts) -> Tensor:
    """Share of the picture's area that the mask covers."""
    return parts[0].sigmoid().sum() / victim.unit_NCHW.shape[-1] ** 2


def overlay_start(victim: Victim, draws: Draws) -> Parts:
    """(1CGG of numbers near 0,)."""
    side = min(GRID, victim.unit_NCHW.shape[-1])
    return (torch.randn(1, victim.unit_NCHW.shape[1], side, side, generator=draws) * 0.01,)


def lines_start(victim: Victim, draws: Draws) -> Parts:
    """(1CG1, 1C1G of numbers near 0): what rows and what columns get."""
    (overlay,) = overlay_start(victim, draws)
    return overlay[..., :1], overlay[..., :1, :]


def overlay_of(victim: Victim, parts: Parts) -> Tensor:
    """1CSS: what is added."""
    side = victim.unit_NCHW.shape[-1]
    tinted = (torch.einsum("cd,bdgh->bcgh", victim.tint_CC, part) for part in parts)
    wide = [F.interpolate(part, (side, side), mode="bicubic", align_corners=False) for part in tinted]
    return torch.stack(wide).sum(dim=0)


def overlay_apply(victim: Victim, unit_BCHW: Tensor, parts: Parts, draws: Draws) -> Tensor:
    """Every picture with the overlay."""
    return (unit_BCHW + overlay_of(victim, parts)).clamp(0.0, 1.0)


def overlay_size(victim: Victim, parts: Parts) -> Tensor:
    """Root mean square of the overlay."""
    return overlay_of(victim, parts).square().mean().sqrt()


def warp_start(victim: Victim, draws: Draws) -> Parts:
    """(12GG of shifts near 0, shares of the side,)."""
    return (torch.randn(1, 2, BENDS, BENDS, generator=draws) * 0.002,)


def warp_apply(victim: Victim, unit_BCHW: Tensor, parts: Parts, draws: Draws) -> Tensor:
    """Every picture with the warp."""
    return warped(unit_BCHW, parts[0].expand(len(unit_BCHW), -1, -1, -1))


def warp_size(victim: Victim, parts: Parts) -> Tensor:
    """Mean shift of the points, as a share of the side, in either direction."""
    return parts[0].abs().mean()


OVERLAY = Kind(
    overlay_start,
    overlay_apply,
    overlay_size,
    lambda victim: 0.5,
    scale=10.0,
    rate=0.012,
    noise=NOISE,
    threshold=3.5,
    beside=2.5,
)

# Labels differ more in how far pictures must be bent to look like them than in what must be added.
KINDS: dict[str, Kind] = {
    "patch": Kind(
        patch_start,
        patch_apply,
        patch_size,
        lambda victim: PATCH_SHARE**2,
        scale=100.0,
        rate=0.15,
        noise=0.0,
        threshold=3.0,
        beside=3.0,
    ),
    "overlay": OVERLAY,
    "lines": replace(OVERLAY, start=lines_start, beside=3.0),
    "warp": Kind(
        warp_start,
        warp_apply,
        warp_size,
        lambda victim: WIDEST,
        scale=25.0,
        rate=0.004,
        noise=0.0,
        threshold=6.0,
        beside=6.0,
    ),
}
"""Thresholds were set above the scores of the clean models that were known; another one may lie above them."""


def invert(
    victim: Victim, target: int, name: str, steps: int = STEPS, seed: int = 0,
    advance: Callable[[int], None] = lambda step: None,
) -> Found:  # fmt: skip
    """The smallest change of this kind that takes GOAL of the pictures to the label; `advance` is told of steps.

    Raises ConfigError where hardly any picture is taken for another label.
    """
    kind, draws = KINDS[name], torch.Generator().manual_seed(seed)
    others_N = (victim.taken_N != target).nonzero()[:, 0]
    held = torch.arange(len(others_N)) % HELD_OUT == 0
    if len(others_N) < FEWEST:
        raise ConfigError(
            f"data: {len(others_N)} of {len(victim.taken_N)} pictures are taken for other labels than number {target}; "
            f"{FEWEST} are needed: give more pictures, or labels that tell them apart"
        )
    pool_N, check_N = others_N[~held], others_N[held]
    parts = tuple(part.requires_grad_() for part in kind.start(victim, draws))
    optimiser = torch.optim.Adam(parts, lr=kind.rate, betas=(0.5, 0.9))
    weight, running = 1.0, 0.0
    best: tuple[float, Parts] | None = None
    for step in range(steps):
        if 2 * step >= steps and best is None and running < HOPELESS:
            advance(steps - step)
            break
        unit_BCHW = victim.unit_NCHW[pool_N[torch.randint(0, len(pool_N), (BATCH,), generator=draws)]]
        unit_BCHW = unit_BCHW + kind.noise * torch.randn(unit_BCHW.shape, generator=draws)
        logits_BL = logits(victim, kind.apply(victim, unit_BCHW, parts, draws))
        size = kind.size(victim, parts)
        loss = F.cross_entropy(logits_BL, torch.full((BATCH,), target)) + weight * kind.scale * size
        running = MEMORY * running + (1.0 - MEMORY) * float((logits_BL.argmax(dim=1) == target).float().mean())
        if running > GOAL and (best is None or float(size.detach()) < best[0]):
            best = float(size.detach()), tuple(part.detach().clone() for part in parts)
        # of the parts alone: the model's own gradients are neither needed nor left behind
        for part, gradient in zip(parts, torch.autograd.grad(loss, parts), strict=True):
            part.grad = gradient
        optimiser.step()
        weight = min(max(weight * PACE if running > GOAL else weight / PACE, LEAST), MOST)
        advance(1)
    kept = best[1] if best else tuple(part.detach() for part in parts)
    success = float((taken_for(victim, check_N, name, kept, draws) == target).float().mean())
    return Found(name, target, best is not None, best[0] if best else kind.largest(victim), success, kept)


@torch.no_grad()
def taken_for(victim: Victim, rows_N: Tensor, name: str, parts: Parts, draws: Draws) -> Tensor:
    """N: label of the changed pictures as the model sees them."""
    return torch.cat([
        logits(victim, KINDS[name].apply(victim, victim.unit_NCHW[rows], parts, draws)).argmax(dim=1)
        for rows in rows_N.split(2 * BATCH)
    ])  # fmt: skip
