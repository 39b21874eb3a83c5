"""MLP projectors on an encoder's features, and the features themselves: a tower's output before its own projection.

Suffixes: B samples, D width of the shared embedding, F width of a tower before its projection.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.errors import ConfigError
from vlp import distributed

PLACES = {
    "image": (("visual", "proj"), ("visual.head", "proj"), ("visual.head", "mlp")),
    "text": (("text", "text_projection"), ("text", "proj"), ("", "text_projection")),
}
"""Where open_clip's models keep the projection of a tower: path of a module, attribute."""


class BatchNorm(nn.BatchNorm1d):
    """Batch norm by the statistics of the present batch alone; a single sample is its own mean."""

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__(width, affine=affine, track_running_stats=False)

    def forward(self, input: Tensor) -> Tensor:
        """BF to BF."""
        if len(input) > 1:
            return super().forward(input)
        return input * 0.0 + self.bias if self.affine else input * 0.0


def mlp(widths: Sequence[int], bias: bool = True, last: nn.Module | None = None) -> nn.Sequential:
    """Linear layers of these widths with batch norm and ReLU between them, and `last` behind.

    `bias`: of the layers before a batch norm of ours, which makes it superfluous; some papers keep it.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=bias), BatchNorm(after), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=bias or last is None))
    return nn.Sequential(*layers, *([last] if last is not None else []))


class Tower:
    """One tower of an open_clip model, its projection apart.

    A tower whose projection cannot be set aside, as in the attention pooling of open_clip's ResNets, or that has none
    gives its embedding as features.
    """

    def __init__(self, model: nn.Module, side: str) -> None:
        """`side`: image or text. Raises ConfigError for a model whose ranks hold parts of it."""
        parts = dict(model.named_modules())
        found = ((parts[path], name) for path, name in PLACES[side] if hasattr(parts.get(path), name))
        self._holder: Any
        self._holder, self._name = next(found, (None, ""))
        projection = self._projection
        tensors = [projection] if isinstance(projection, Tensor) else _parameters(projection)
        if distributed.any_sharded(tensors):
            raise ConfigError("run.strategy='fsdp': this objective takes a tower apart, which needs run.strategy='ddp'")
        self.width = tensors[0].shape[0 if isinstance(projection, Tensor) else 1] if tensors else None
        """F; None: that of the embedding."""

    @property
    def _projection(self) -> Tensor | nn.Module | None:
        return getattr(self._holder, self._name) if self._holder is not None else None

    def features(self, encode: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        """BF: what `encode`, an encoder's method that runs this tower, gives without the projection."""
        with self._set_aside():
            return encode(inputs, normalize=False)

    def project(self, features_BF: Tensor) -> Tensor:
        """BD, not normalised."""
        projection = self._projection
        if projection is None:
            return features_BF
        projected: Tensor = features_BF @ projection if isinstance(projection, Tensor) else projection(features_BF)
        return projected

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        projection = self._projection
        if self._holder is None or projection is None:
            yield
            return
        bare = isinstance(projection, Tensor) or self._name == "text_projection"  # open_clip then asks for None
        setattr(self._holder, self._name, None if bare else nn.Identity())
        try:
            yield
        finally:
            setattr(self._holder, self._name, projection)


def _parameters(module: nn.Module | None) -> list[Tensor]:
    return list(module.parameters()) if module is not None else []


@torch.no_grad()
def follow(copy: nn.Module, model: nn.Module, momentum: float) -> None:
    """Move the parameters of a momentum copy towards the model's: `momentum` of the old value stays."""
    current = [parameter.to(own.dtype) for own, parameter in zip(copy.parameters(), model.parameters(), strict=True)]
    torch._foreach_lerp_(list(copy.parameters()), current, 1.0 - momentum)
