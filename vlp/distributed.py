"""The only importer of torch.distributed. Everything here is a no-op in a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vlp.objectives.base import Features

T = TypeVar("T")


def set_up() -> tuple[int, int]:
    """(rank, world size); joins the process group when torchrun's variables ask for one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return rank(), world_size()


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def left_at_the_end() -> Iterator[None]:
    """Leave the process group however the block ends: a failed run must not leave the next one half a group."""
    try:
        yield
    finally:
        leave()


def env_rank() -> int:
    """Number of this process as its launcher gave it, before the group is joined."""
    return int(os.environ.get("RANK", "0"))


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def any_rank(flags: tuple[bool, ...], device: torch.device) -> list[bool]:
    """For each flag, whether it is set on at least one rank; all ranks must ask."""
    if world_size() == 1:
        return list(flags)
    answer = torch.tensor([int(flag) for flag in flags], device=device)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return [bool(flag) for flag in answer.tolist()]


def from_all_ranks(value: T) -> list[T]:
    """Every rank's value (pickled), in rank order; all ranks must ask."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def share(pieces: int) -> range:
    """This rank's run of the numbers 0..pieces-1; runs differ by one at most."""
    return range(pieces * rank() // world_size(), pieces * (rank() + 1) // world_size())


def gather_rows(rows: Tensor | None) -> Tensor:
    """Rows of all ranks in rank order, on the CPU, without gradient; all ranks must ask.

    Ranks may hold different numbers of rows, and None stands for none; at least one rank holds some.
    """
    if world_size() == 1:
        assert rows is not None, "no rank has a row"
        return rows.cpu()
    kinds = from_all_ranks(None if rows is None else (tuple(rows.shape), rows.dtype))
    shape, dtype = next(kind for kind in kinds if kind is not None)
    counts = [kind[0][0] if kind is not None else 0 for kind in kinds]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    padded = torch.zeros((max(counts), *shape[1:]), dtype=dtype, device=device)
    if rows is not None:
        padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])


def gather_features(features: Features) -> Features:
    """Features of all ranks in rank order; the gradient reaches each rank's own.

    Every rank then computes the same global loss, so its own slice already receives the whole gradient and nothing has
    to travel back. The factor of the world size makes up for the mean that `average_gradients` takes: N ranks equal
    one process on the whole batch. Ranks must hold equally many samples.
    """
    if world_size() == 1:
        return features
    return features.map(_gather)


def _gather(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    if tensor.requires_grad:
        own = tensor.view_as(tensor)
        own.register_hook(lambda gradient: gradient * world_size())
        parts[rank()] = own
    return torch.cat(parts)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Mean of the gradients over the ranks, in place; one exchange per data type, for each costs a round trip."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in same])
        dist.all_reduce(flat)
        flat /= world_size()
        parts = flat.split([gradient.numel() for gradient in same])
        torch._foreach_copy_(same, [part.view(gradient.shape) for part, gradient in zip(parts, same, strict=True)])
