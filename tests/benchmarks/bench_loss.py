"""Figures of the contrastive loss, forward and backward, against open_clip's; part of `make bench-train`.

One thread, by its processor time; all variants take turns in one process. Both sides get the same features, text close
to its picture, so that the loss lies where it does in training. Memory is what a fresh process adds at its peak.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_kit import Row, compare, cpu, take_turns

from vlp.objectives import clip
from vlp.objectives._kernel import Precision
from vlp.objectives.base import Features
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
from open_clip.loss import ClipLoss  # noqa: E402

PEER = ("open_clip ClipLoss", version("open_clip_torch"))
VARIANTS: dict[str, tuple[str, Precision | None]] = {
    "ours": ("medium", "fp32"),
    "ours, slow products": ("highest", "fp32"),
    "ours bf16": ("highest", "bf16"),
    "peer": ("highest", None),
    "peer, fast products": ("medium", None),
}
"""Name -> float32 products ('medium' takes oneDNN's route on CPUs) and precision of our tiles, None for the peer."""
ROWS = {
    "loss-fp32": ("ours", "peer", ">= 2.3", "float32, ours with the fast float32 products"),
    "loss-bf16": ("ours bf16", "peer", ">= 4.0", "ours with bfloat16 tiles, peer in float32"),
    "loss-fp32-same": ("ours", "peer, fast products", ">= 1.4", "float32, both with the fast products"),
    "loss-fp32-slow": ("ours, slow products", "peer", ">= 1.4", "float32, neither with the fast products"),
    "loss-bf16-fast": ("ours bf16", "peer, fast products", ">= 2.3", "bfloat16 tiles, peer with the fast products"),
}
PEAKS = 2
"""Measurements of memory, which hardly varies."""
MEMORY = {"loss-memory-fp32": "ours", "loss-memory-bf16": "ours bf16"}


def inputs(batch: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors of pictures and texts, and the scale at which CLIP starts; leaves that want gradients."""
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, batch, width, generator=generator)
    text = F.normalize(image + 2.0 * noise, dim=1)
    return F.normalize(image, dim=1).requires_grad_(), text.requires_grad_(), torch.tensor(1 / 0.07, requires_grad=True)


def step(name: str, leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """Loss and gradients by one variant; the gradients are left in the leaves."""
    route, precision = VARIANTS[name]
    torch.set_float32_matmul_precision(route)
    for leaf in leaves:
        leaf.grad = None
    image, text, scale = leaves
    if precision is None:
        loss = ClipLoss()(image, text, scale)
    else:
        config = clip.Config(precision=precision)
        loss = clip.clip_loss(Features(image, text), scale, config)[0]
    loss.backward()
    return float(loss.detach())


def outcome(name: str, leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[float]:
    """Loss, norm of the features' gradients, gradient of the scale."""
    loss = step(name, leaves)
    image, text, scale = (leaf.grad for leaf in leaves)
    assert image is not None
    assert text is not None
    assert scale is not None
    return [loss, float(torch.stack([image.norm(), text.norm()]).norm()), float(scale)]


def equal(found: list[float], expected: list[float], precision: Precision) -> bool:
    """Whether two outcomes agree: to 1e-5 in float32, to 2e-3 in bfloat16."""
    limit = 2e-3 if precision == "bf16" else 1e-5
    return all(abs(a - b) <= limit * abs(b) for a, b in zip(found, expected, strict=True))


def peak(name: str, batch: int, width: int) -> float:
    """MB that one step adds at its peak to what this process holds; the first small step has loaded all code."""
    step(name, inputs(2048, width))
    leaves = inputs(batch, width)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _memory("VmRSS")
    step(name, leaves)
    return (_memory("VmHWM") - before) / 1024


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))


def fresh_peak(name: str, batch: int, width: int) -> float:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, "--batch", str(batch), "--width", str(width)]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def loss_rows(batch: int = 8192, width: int = 512, rounds: int = 5) -> list[Row]:
    """All rows."""
    torch.set_num_threads(1)
    leaves = inputs(batch, width)
    outcomes = {name: outcome(name, leaves) for name in VARIANTS}
    runs: dict[str, Callable[[], float]] = {name: cpu(partial(step, name, leaves)) for name in VARIANTS}
    taken = take_turns(runs, rounds)
    size = f"B={batch:,}, D={width}, one thread"
    rows = []
    for name, (ours, theirs, goal, words) in ROWS.items():
        same = equal(outcomes[ours], outcomes[theirs], "bf16" if ours == "ours bf16" else "fp32")
        (loss, norm, _), (peer_loss, peer_norm, _) = outcomes[ours], outcomes[theirs]
        note = (
            f"{size}, {words}; {min(taken[ours]):.2f} s, peer {min(taken[theirs]):.2f} s; "
            f"loss {loss:.6f} / {peer_loss:.6f}, gradient norm {norm:.6f} / {peer_norm:.6f}"
        )
        rows.append(compare(name, PEER, taken[ours], taken[theirs], goal, same, note))
    theirs_mb = [fresh_peak("peer", batch, width) for _ in range(PEAKS)]
    for name, ours in MEMORY.items():
        ours_mb = [fresh_peak(ours, batch, width) for _ in range(PEAKS)]
        note = f"{size}, {ours}: memory added at the peak, {min(ours_mb):.0f} MB, peer {min(theirs_mb):.0f} MB"
        same = equal(outcomes[ours], outcomes["peer"], "bf16" if ours == "ours bf16" else "fp32")
        rows.append(compare(name, PEER, ours_mb, theirs_mb, "<= 0.25", same, note))
    return rows


def main() -> None:
    """Answer for `fresh_peak`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--peak", choices=list(VARIANTS), required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(peak(options.peak, options.batch, options.width)))


if __name__ == "__main__":
    main()
