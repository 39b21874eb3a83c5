"""Model FLOPs utilisation: the arithmetic a step must do, over what the device could do in the same time.

Convention of PaLM (arXiv 2204.02311, appendix B): forward and backward cost three times the forward pass, of which
matrix products, attention and convolutions count (one multiply-add = 2 FLOPs); what is computed a second time under
activation checkpointing does not. A frozen trunk costs its forward pass only, the loss and the optimiser nothing.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipelines.batch import Batch
from vlp.models import trunk_of
from vlp.models.text import can_trim

TRAINED, FROZEN = 3, 1
"""Passes that a tower costs, in forward passes."""

TERAFLOPS: dict[str, tuple[float, float, float]] = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "GH200": (989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "A100": (311.9, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165.0, 82.5, 10.3),
    "A10G": (70.0, 35.0, 31.5),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.1, 183.0, 91.6),
    "L40": (181.1, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "T4": (65.1, 8.1, 8.1),
    "V100-PCIE": (112.0, 14.0, 14.0),
    "V100": (125.0, 15.7, 15.7),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
    "RTX A6000": (154.8, 77.4, 38.7),
}
"""GPU -> dense TFLOP/s of (16 bit with 32-bit sums, TF32, FP32), from NVIDIA's data sheets and architecture papers.

SXM figures unless the name says otherwise. T4 and V100 have no bfloat16 (the 16-bit figure is float16's) and no TF32.
"""


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device can do at best."""

    flops: float
    """Per second."""
    source: str
    """`data sheet` or `measured`."""


class StepFlops:
    """FLOPs of training on one sample, counted once per picture side and text length."""

    def __init__(self, model: nn.Module, channels: int = 3) -> None:
        """Copies the model without its weights; training is not touched. `channels`: of its pictures."""
        self._channels = channels
        self._model = copy.deepcopy(model).to("meta").eval()
        self._passes = {name: FROZEN if _frozen(getattr(model, name, None)) else TRAINED for name in ("visual", "text")}
        self._model.requires_grad_(
            False
        )  # torch's counter fails on parameters that are expanded, as in attention pools
        self._known: dict[tuple[str, int], int] = {}
        self.more: Callable[[nn.Module, int, int, int], int] | None = None
        """What an objective computes beside one pass of both towers: (the model on `meta`, side, channels, passes that
        its image tower costs) -> FLOPs of a sample, forward and backward."""

    def sample(self, side: int, length: int) -> int:
        """One picture of this side, pixels, and one text of this many tokens: forward and backward.

        `length` is what the tower computes: with trimmed text the tokens that are left, else the context length.
        """
        return self._tower("visual", side) + self._tower("text", length) + self._more(side)

    def sample_of(self, batch: Batch) -> int:
        """The same for the mean sample of a batch, whose texts are trimmed where the tower allows it.

        In steps of eight tokens, because every length is counted anew, and that takes a while.
        """
        length = batch.tokens.shape[1]
        if can_trim(getattr(self._model, "text", self._model)):
            length = min(length, 8 * math.ceil((float(batch.tokens.argmax(dim=1).float().mean()) + 1) / 8))
        return self.sample(batch.pixels.shape[-1], length)

    def _tower(self, name: str, size: int) -> int:
        if (name, size) not in self._known:
            forward = self._image if name == "visual" else self._text
            self._known[name, size] = self._passes[name] * count(lambda: forward(size))
        return self._known[name, size]

    def _more(self, side: int) -> int:
        if self.more is None:
            return 0
        if ("more", side) not in self._known:
            self._known["more", side] = self.more(self._model, side, self._channels, self._passes["visual"])
        return self._known["more", side]

    def _image(self, side: int) -> None:
        self._model.encode_image(torch.empty(1, self._channels, side, side, device="meta"))  # type: ignore[operator]

    def _text(self, length: int) -> None:
        tower: Any = getattr(self._model, "text", self._model)
        trunk = trunk_of(tower)
        if trunk is not None:  # Hugging Face's; its padding mask asks for values, which `meta` has not
            trunk(input_ids=torch.zeros(1, length, dtype=torch.int64, device="meta"))
            return
        trim = can_trim(tower)
        length = length if trim else int(self._model.context_length)  # type: ignore[arg-type]
        mask, places = tower.attn_mask, tower.positional_embedding
        if trim:
            tower.attn_mask, tower.positional_embedding = mask[:length, :length], nn.Parameter(places[:length])
        self._model.encode_text(torch.zeros(1, length, dtype=torch.int64, device="meta"))  # type: ignore[operator]
        tower.attn_mask, tower.positional_embedding = mask, places


def _frozen(tower: nn.Module | None) -> bool:
    """Whether nothing of a tower is trained but, at most, the projection behind another library's trunk."""
    part = (trunk_of(tower) or tower) if tower is not None else None
    return part is not None and not any(parameter.requires_grad for parameter in part.parameters())


@torch.no_grad()
def count(run: Callable[[], object]) -> int:
    """FLOPs of what `run` computes, on tensors of any device, the one without data (`meta`) included."""
    # the fused attention kernels are not all known to the counter; the plain products are, and cost the same
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def mfu(samples_per_second: float, sample_flops: float, peak: Peak) -> float:
    """Share 0..1 of one device's peak; `samples_per_second` of that device alone."""
    return samples_per_second * sample_flops / peak.flops


@lru_cache(maxsize=8)
def device_peak(device: torch.device, precision: str) -> Peak:
    """Peak of a device for `run.precision`: from the table for known GPUs, else from matrix products, in half a second.

    The measured one depends on the present number of threads and float32 matmul precision.
    """
    if device.type == "cuda":
        listed = listed_peak(torch.cuda.get_device_name(device), precision, torch.get_float32_matmul_precision())
        if listed is not None:
            return Peak(listed * 1e12, "data sheet")
    return Peak(_measure(device, torch.float32 if precision == "fp32" else torch.bfloat16), "measured")


def listed_peak(name: str, precision: str, matmul: str = "highest") -> float | None:
    """TFLOP/s of the GPU that calls itself `name`; the longest entry within it counts. None for an unknown one.

    `matmul`: torch.get_float32_matmul_precision(); below `highest`, fp32 runs as TF32 where the GPU has it.
    """
    entries = [entry for entry in TERAFLOPS if f" {entry.lower()}" in f" {name.lower().replace('nvidia ', '')}"]
    if not entries:
        return None
    half, tf32, single = TERAFLOPS[max(entries, key=len)]
    if precision != "fp32":
        return half
    return single if matmul == "highest" else tf32


def _measure(device: torch.device, dtype: torch.dtype, side: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest of many products of two square matrices."""
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begun < seconds:
        best = min(best, _seconds(left, right, device))
    return 2 * side**3 / best


def _seconds(left: Tensor, right: Tensor, device: torch.device) -> float:
    begun = time.perf_counter()
    _ = left @ right
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
