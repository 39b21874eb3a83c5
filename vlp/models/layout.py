"""Memory layout of the weights."""

from typing import Any

import torch
from torch import Tensor, nn

NARROW = 16
"""Input channels from which on a strided convolution of single points is sound."""


def set_channels_last(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its convolutions' weights in channels_last.

    On CPUs torch 2.13 writes beyond its memory in the backward pass of convolutions of single points with a stride and
    3 to 15 channels in this layout (MobileCLIP's stem has one). They get their stride as a cut of what they are given,
    which is the same arithmetic.
    """
    for module in model.modules() if device.type == "cpu" else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.in_channels < NARROW:
            down, right = module.stride
            if (down, right) != (1, 1) and module.padding == (0, 0):
                module.stride = (1, 1)
                module.register_forward_pre_hook(_Cut(down, right))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class _Cut:
    """A stride ahead of a convolution; no closure, so that models can be copied and pickled."""

    def __init__(self, down: int, right: int) -> None:
        self.down, self.right = down, right

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        pixels_BCHW: Tensor = inputs[0]
        return (pixels_BCHW[..., :: self.down, :: self.right], *inputs[1:])
