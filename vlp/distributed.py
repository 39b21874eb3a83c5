"""The only importer of torch.distributed. Everything here is a no-op in a single process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Way = Literal["gather", "local", "ring"]
"""How a batch-wide loss is shared out. gather: every rank computes all of it. local: its own images against all texts.
ring: the same, but one rank's texts at a time."""


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


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on at least one rank; all ranks must ask."""
    if world_size() == 1:
        return flag
    answer = torch.tensor(int(flag), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def from_all_ranks(value: T) -> list[T]:
    """Every rank's value (pickled), in rank order; all ranks must ask."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def gather(tensor: Tensor) -> Tensor:
    """All ranks' tensors one after the other; the gradient reaches each rank's own.

    Every rank then computes the same global loss, so its own slice already receives the whole gradient and nothing has
    to travel back. The factor of the world size makes up for the mean that `average_gradients` takes: N ranks equal
    one process on the whole batch. Ranks must hold equally many samples.
    """
    if world_size() == 1:
        return tensor
    parts = _from_all(tensor.detach())
    if tensor.requires_grad:
        own = tensor.view_as(tensor)
        own.register_hook(lambda gradient: gradient * world_size())
        parts[rank()] = own
    return torch.cat(parts)


def _from_all(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def mean_over(way: Way, value: Tensor) -> Tensor:
    """Mean of all ranks' values; with way "gather", where every rank has computed the same, the value."""
    if way == "gather" or world_size() == 1:
        return value
    dist.all_reduce(value)
    return value / world_size()


def visit(
    way: Way, guests: tuple[Tensor, ...], meet: Callable[..., Tensor], merge: Callable[[Tensor], Tensor]
) -> Tensor:
    """Let every rank meet every rank's `guests`; what was found about this rank's own, over all ranks.

    `meet(own, *guests)`: what this rank finds about some rank's guests, a float32 tensor of one shape; `own`: they are
    this rank's. `merge`: makes one of several such tensors, stacked. Way "local" gathers all guests; "ring" hands them
    on from rank to rank, so that memory does not grow with the ranks. With "gather" the guests are everybody's already.
    """
    world, here = world_size(), rank()
    if way == "gather" or world == 1:
        return meet(True, *guests)
    if way == "local":
        everyone = list(zip(*(_from_all(tensor) for tensor in guests), strict=True))
        found = torch.stack([meet(owner == here, *everyone[owner]) for owner in range(world)])
        answers = torch.empty_like(found)
        dist.all_to_all_single(answers, found)
        return merge(answers)
    found = meet(True, *guests)
    for turn in range(1, world + 1):
        # their last move takes the findings home; the guests have been everywhere by then
        found, *moved = _hand_on((found, *guests) if turn < world else (found,))
        if turn < world:
            guests = tuple(moved)
            found = merge(torch.stack([found, meet(False, *guests)]))
    return found


def _hand_on(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Send them to the next rank and return those of the one before."""
    world, here = world_size(), rank()
    sent = [tensor.contiguous() for tensor in tensors]
    received = [torch.empty_like(tensor) for tensor in sent]
    sends = [dist.P2POp(dist.isend, tensor, (here + 1) % world) for tensor in sent]
    receives = [dist.P2POp(dist.irecv, tensor, (here - 1) % world) for tensor in received]
    for request in dist.batch_isend_irecv([*sends, *receives]):
        request.wait()
    return received


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
