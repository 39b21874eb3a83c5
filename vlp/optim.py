"""Optimiser, learning-rate schedule, layer-wise rates, and the running average of weights (EMA)."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from vlp import distributed
from vlp.torchvision_guard import ensure_torchvision

BLOCKS = re.compile(r"\b(?:resblocks|blocks|layers?|stages|layer(?=\d))\.?(\d+)")
"""Numbered parts of a tower in the names of open_clip, timm and Hugging Face, outermost first."""
BELOW = (
    "conv1",
    "bn1",
    "visual.conv",
    "visual.bn",
    "stem",
    "patch_embed",
    "embedding",
    "pos_embed",
    "cls_token",
    "reg_token",
    "ln_pre",
    "norm_pre",
)
"""Names of what lies below the first block; open_clip's ResNets have three convolutions there."""
UNDECAYED = ("embedding", "pos_embed", "cls_token", "reg_token")
"""Names of tables and tokens, which have two dimensions or more but are no matrices."""
NOT_RESUMED = ("adahessian", "bnb", "fused", "kron")
"""Beginnings of timm's names that are refused: second derivatives, GPU packages of others whose state we cannot try,
and lists in the state."""


class OptimConfig(StrictModel):
    """How weights are updated."""

    name: str = "adamw"
    """`adamw` is torch's, fused; any other name is one of timm's optimisers, such as lion, lamb, adopt, muon, sgd; some
    of them cannot be resumed and are refused."""
    options: dict[str, Any] = {}
    """Further arguments of that optimiser."""
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.1
    """On matrices and convolutions; never on biases, norms, scales, embedding tables, positions and tokens."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each block of a tower learns at this multiple of the rate of the block above it; 1 = all alike."""
    warmup: int = Field(50, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant", "wsd", "rsqrt"] = "cosine"
    """After the warm-up. wsd: constant, then down in a line. rsqrt: with the root of the steps, then down in a line."""
    cooldown: float = Field(0.2, ge=0, le=1)
    """wsd and rsqrt: share of the run in which the rate goes down in a line."""
    final_lr: float = Field(0.0, ge=0, le=1)
    """Share of `lr` (rsqrt: of the rate before the cooldown) left at the end; not for `constant`."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; None switches clipping off."""
    accumulate: int = Field(1, ge=1)
    """Parts in which a batch goes through the towers; the loss is that of the whole batch, exactly."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of the weight average that is evaluated and exported; 0 switches it off."""
    max_logit_scale: float = Field(100.0, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "OptimConfig":
        without = {"cosine": ("cooldown",), "constant": ("cooldown", "final_lr")}.get(self.schedule, ())
        for key in without:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ConfigError(f"optim.{key}={getattr(self, key)} has no effect with optim.schedule={self.schedule}")
        return self


def build_optimizer(model: nn.Module, objective: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over all parameters of model and objective; those that are frozen have no gradient and stay.

    Groups carry `lr_scale`, their multiple of the learning rate. Raises ConfigError for an unknown name or option.
    """
    groups = parameter_groups(model, objective, config)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, **config.options}
    try:
        if config.name == "adamw":
            return torch.optim.AdamW(groups, **({"fused": True} | settings))
        if config.name not in (known := names()):
            state = "cannot be saved and resumed" if config.name.startswith(NOT_RESUMED) else "is unknown"
            raise ConfigError(f"optim.name: {config.name!r} {state}; known: {', '.join(known)}")
        from timm import optim

        made: torch.optim.Optimizer = optim.create_optimizer_v2(groups, opt=config.name, **settings)  # type: ignore[attr-defined]
        return made
    except (TypeError, ImportError, AssertionError, IndexError) as error:
        raise ConfigError(f"optim.name={config.name}, optim.options={config.options}: {error}") from error


def names() -> list[str]:
    """All optimisers, adamw first: those whose state is saved and read back bit for bit."""
    ensure_torchvision()
    from timm import optim

    found = [str(name) for name in optim.list_optimizers()]  # type: ignore[attr-defined]
    return ["adamw", *(name for name in found if name != "adamw" and not name.startswith(NOT_RESUMED))]


def parameter_groups(model: nn.Module, objective: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters by weight decay and rate; an objective may say by `rate_scale(name)` how fast the model learns."""
    rate = getattr(objective, "rate_scale", lambda name: 1.0)
    scales = layer_scales((name for name, _ in model.named_parameters()), config.layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module in (model, objective):
        for name, parameter in module.named_parameters():
            decay = config.weight_decay if parameter.ndim >= 2 and not _has(name, UNDECAYED) else 0.0
            scale = scales[name] * rate(name) if module is model else 1.0
            groups.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": part, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        for part in distributed.kinds(parameters)
    ]


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Parameter name -> its multiple of the rate: `decay` to the number of blocks above it in its own tower.

    Projections, final norms and the logit scale count as the top, embeddings and stems as one below the first block.
    """
    names = list(names)
    places = {name: tuple(map(int, BLOCKS.findall(name))) for name in names}
    scales = {}
    for image in (True, False):
        tower = [name for name in names if name.startswith("visual.") == image]
        blocks = sorted({places[name] for name in tower if places[name]})
        for name in tower:
            below = not places[name] and _has(name, BELOW) and not _has(name, ("attnpool", "attn_pool"))
            depth = len(blocks) + 1 if below else len(blocks) - blocks.index(places[name]) if places[name] else 0
            scales[name] = decay**depth
    return scales


def _has(name: str, words: Iterable[str]) -> bool:
    return any(word in name for word in words)


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Rate of update number `step` (0-based) out of `total`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup) / max(1, total - config.warmup))
    if config.schedule == "cosine":
        floor = config.lr * config.final_lr
        return floor + 0.5 * (config.lr - floor) * (1 + math.cos(math.pi * progress))
    rate = config.lr
    if config.schedule == "rsqrt":
        span = max(1, config.warmup)
        rate *= math.sqrt(span / (span + step - config.warmup))
    left = (total - step) / max(1.0, config.cooldown * total)
    return rate if left >= 1 else rate * (config.final_lr + (1 - config.final_lr) * max(0.0, left))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of every group, times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


class Ema:
    """Running average of a model's floating-point state; holds a copy of it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts at the model's present state; in float32, for in bfloat16 the small moves round away."""
        self.decay = decay
        self.updates = 0
        self.shadow = {
            key: value.detach().to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
            for key, value in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model; early on faster, so that the random start is forgotten."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                averaged.append(distributed.local(self.shadow[key]))
                current.append(distributed.local(value).float())
            else:
                self.shadow[key].copy_(value)
        torch._foreach_lerp_(averaged, current, 1 - decay)


def numbers_of(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What an optimiser holds beside the tensors of its parameters, for JSON: `<parameter>` -> its plain numbers, and
    what its group counts. By parameter, for the groups differ with the ranks and the strategy."""
    ours = {"params", "lr_scale", *optimizer.defaults}
    found: dict[str, Any] = {}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named.items():
        state = {k: v for k, v in optimizer.state.get(parameter, {}).items() if not isinstance(v, Tensor)}
        counts = {k: v for k, v in groups[id(parameter)].items() if k not in ours}
        if state or counts:
            tensors = {k: {"tensor": v.tolist()} for k, v in counts.items() if isinstance(v, Tensor)}
            found[name] = {"state": state, "group": counts | tensors}
    return found


def load_numbers(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], numbers: Mapping[str, Any]
) -> None:
    """Put back what `numbers_of` gave, after the tensors."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, item in numbers.items():
        optimizer.state[named[name]].update(item["state"])
        for key, value in item["group"].items():
            groups[id(named[name])][key] = torch.tensor(value["tensor"]) if isinstance(value, dict) else value
