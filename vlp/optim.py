"""Optimiser, learning-rate schedule, and the running average of weights (EMA)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipelines.config import StrictModel


class OptimConfig(StrictModel):
    """How weights are updated."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.1
    """On matrices and convolutions; never on biases, norms, scales and embedding tables."""
    warmup: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: float = 0.0
    """Share of `lr` left at the end of the cosine."""
    grad_clip: float | None = 1.0
    """Largest gradient norm; None switches clipping off."""
    ema: float = 0.0
    """Decay of the weight average that is evaluated and exported; 0 switches it off."""
    max_logit_scale: float = 100.0


def build_optimizer(model: nn.Module, objective: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW over everything trainable of model and objective; decay on matrices and convolutions only."""
    named = [(n, p) for module in (model, objective) for n, p in module.named_parameters() if p.requires_grad]
    decays = [p.ndim >= 2 and "embedding" not in name for name, p in named]
    groups = [
        {"params": [p for (_, p), yes in zip(named, decays, strict=True) if yes], "weight_decay": config.weight_decay},
        {"params": [p for (_, p), yes in zip(named, decays, strict=True) if not yes], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Rate of update number `step` (0-based) out of `total`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup) / max(1, total - config.warmup))
    floor = config.lr * config.final_lr
    return floor + 0.5 * (config.lr - floor) * (1 + math.cos(math.pi * progress))


class Ema:
    """Running average of a model's floating-point state; holds a copy of it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts at the model's present state."""
        self.decay = decay
        self.updates = 0
        self.shadow = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model; early on faster, so that the random start is forgotten."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                averaged.append(self.shadow[key])
                current.append(value)
            else:
                self.shadow[key].copy_(value)
        torch._foreach_lerp_(averaged, current, 1 - decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Averages take their parameter's memory layout: the fused update walks raw memory, so a channels-last weight beside a
    contiguous average would be updated with the wrong numbers, silently.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        like = parameters[int(number)]
        if value.shape == like.shape:
            value = torch.empty_like(like).copy_(value)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
