"""The only importer of torch.distributed. Everything here is a no-op in a single process."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipelines.errors import BundleError, ConfigError

T = TypeVar("T")
TABLE = 4096
"""Rows from which a parameter is taken for a table of tokens, of which a step touches few rows."""
Way = Literal["gather", "local", "ring"]
"""How a batch-wide loss is shared out. gather: every rank computes all of it. local: its own images against all texts.
ring: the same, but one rank's texts at a time."""
Strategy = Literal["ddp", "fsdp"]
"""ddp: every rank holds the whole model. fsdp: ranks share its towers out."""


def placed(name: str, gpus: int, local: int, ranks: int) -> str:
    """The device of rank `local` among the `ranks` of a machine with so many GPUs; `auto` is a GPU if there is one.

    Raises ConfigError for more ranks than GPUs: two on one GPU cannot talk to each other.
    """
    found = ("cuda" if gpus else "cpu") if name == "auto" else name
    if found != "cuda" or ranks == 1:
        return found
    if ranks > gpus:
        raise ConfigError(
            f"run.device={name}: {ranks} ranks on a machine with {gpus} GPUs: start fewer, or set run.device=cpu"
        )
    return f"cuda:{local}"


def pick_device(name: str) -> torch.device:
    """The device of this process; each of several ranks on a machine has a GPU of its own."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return torch.device(placed(name, gpus, int(os.environ.get("LOCAL_RANK", "0")), ranks))


def set_up(name: str = "auto") -> tuple[int, int]:
    """(rank, world size); joins the process group when torchrun's variables ask for one. `name`: as for pick_device."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        device = pick_device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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


def wrap(model: nn.Module, strategy: Strategy) -> None:
    """Prepare a model in place, before its optimiser is built; every rank must hold equal weights.

    ddp: nothing to do, `average_gradients` does it all. fsdp: towers become sharded (FSDP2), transformer blocks one by
    one; what lies outside modules that are called as such, the logit scale say, stays whole on every rank.
    """
    if strategy == "ddp" or world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # seconds to import, and few runs need it

    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    towers = [getattr(model, name, None) for name in ("visual", "text", "transformer", "token_embedding")]
    for tower in (tower for tower in towers if isinstance(tower, nn.Module)):
        tower.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other layout
        lists = [part for name, part in tower.named_modules() if name.endswith(("blocks", "layer", "layers"))]
        for part in (part for part in lists if isinstance(part, nn.ModuleList | nn.Sequential)):
            for block in part:
                fully_shard(block, mesh=mesh)
        fully_shard(tower, mesh=mesh)


def kinds(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The same parameters, whole ones and sharded ones apart: fused updates take no mixture."""
    parameters = list(parameters)
    parts = [[p for p in parameters if is_sharded(p) == sharded] for sharded in (False, True)]
    return [part for part in parts if part]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part only: a DTensor, told by its method because importing its class takes seconds."""
    return hasattr(tensor, "full_tensor")


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is; parameters of a module that is to be copied or taken apart."""
    return any(map(is_sharded, tensors))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all ranks must ask."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like` is."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    place: Any = like
    value = value.to(like.device)
    return distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)  # each rank cuts its own


def shard_rows(tensor: Tensor) -> Tensor:
    """A tensor that all ranks hold alike, cut by its rows: a DTensor of which each rank keeps `row_range`.

    Such parameters are averaged, clipped, saved and read back like those of a sharded model.
    """
    if world_size() == 1:
        return tensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(tensor.device.type, (world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def row_range(rows: int) -> range:
    """Which rows of a tensor `shard_rows` leaves to this rank; the last ranks may hold fewer, or none."""
    each = -(-rows // world_size())
    return range(min(rank() * each, rows), min((rank() + 1) * each, rows))


def full_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, of a state_dict or an average of one; all ranks must ask."""
    return {name: whole(tensor.detach()) for name, tensor in tensors.items()}


@torch.no_grad()
def load_full_state(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Put what `full_state` gave back into such tensors, in place, whatever the ranks and the strategy are now."""
    if tensors.keys() != values.keys():
        odd = sorted(tensors.keys() ^ values.keys())
        raise BundleError(f"the checkpoint holds other tensors than the model: {', '.join(odd[:5])}")
    for name, tensor in tensors.items():
        local(tensor).copy_(local(shard_like(values[name], tensor)))


def full_optimizer_state(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """`<parameter>.<entry>` -> whole tensor; all ranks must ask. Plain numbers are `optim.numbers_of`'s."""
    return {
        f"{name}.{entry}": whole(value)
        for name, parameter in named.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_full_optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> None:
    """Put back what `full_optimizer_state` gave.

    Averages take their parameter's memory layout: the fused update walks raw memory, so a channels-last weight beside a
    contiguous average would be updated with the wrong numbers, silently.
    """
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(ordered)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in values.items():
        name, _, entry = key.rpartition(".")
        like = named[name]
        if value.shape == like.shape and value.ndim:
            own = torch.empty_like(like, dtype=value.dtype).copy_(shard_like(value, like))
        else:
            own = value.clone()
        state.setdefault(numbers[id(like)], {})[entry] = own
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def average(tensors: Sequence[Tensor]) -> None:
    """Mean over the ranks, in place, of tensors of one data type."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    means = flat.split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view(tensor.shape))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Mean of the gradients over the ranks, in place; one exchange per data type, for each costs a round trip.

    Of a table with a row per token only the rows that some rank's texts touched travel: most are zero everywhere.
    Sharded parameters are left out: FSDP2 has averaged their gradients already.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p.grad)]
    rows = {id(g): _touched(g) for g in gradients if g.ndim == 2 and len(g) >= TABLE}
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        sent = [gradient[rows[id(gradient)]] if id(gradient) in rows else gradient for gradient in same]
        flat = torch.cat([part.flatten() for part in sent])
        dist.all_reduce(flat)
        flat /= world_size()
        means = flat.split([part.numel() for part in sent])
        torch._foreach_copy_(sent, [mean.view(part.shape) for mean, part in zip(means, sent, strict=True)])
        for gradient, part in zip(same, sent, strict=True):
            if part is not gradient:
                gradient[rows[id(gradient)]] = part


def _touched(table: Tensor) -> Tensor:
    """Numbers of the rows in which any rank's gradient is not zero."""
    some = ((table.amax(dim=1) != 0) | (table.amin(dim=1) != 0)).to(torch.uint8)  # ten times as fast as `any`
    dist.all_reduce(some, dist.ReduceOp.MAX)
    return some.nonzero()[:, 0]


def clip_grad_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Norm of all gradients, over all ranks' shards; gradients are scaled down to `limit` if it is larger, in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [local(gradient) for gradient in gradients if is_sharded(gradient)]
    if not shards:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    rest = [gradient for gradient in gradients if not is_sharded(gradient)]
    square = torch.nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    norm = (square + torch.nn.utils.get_total_norm(rest).square()).sqrt()
    torch._foreach_mul_([*shards, *rest], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
