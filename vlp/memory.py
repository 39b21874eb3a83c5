"""Memory that training will need, told without computing anything: weights, their optimiser, and kept activations.

Activations are what the forward pass saves for the backward pass, seen on tensors without data, in the very types of
autocast. Left out: the batch itself, the loss's matrix, what one operation needs for itself, and what the allocator
wastes; a third more than the sum is a sensible plan.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlp import distributed
from vlp.models import trunk_of
from vlp.run import Run, extra_parts

GB = 1e9


def estimate(run: Run) -> dict[str, float]:
    """GB of one rank by what it is for, and their sum; parts that FSDP shares out are divided by `run.processes`."""
    recipe = run.recipe
    ranks = max(recipe.run.processes, distributed.world_size())
    modules = nn.ModuleList([run.model, run.objective])
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in modules.parameters()]
    trained = sum(count * size for count, size, learns in sizes if learns)
    found = {
        "weights": sum(count * size for count, size, _ in sizes),
        "gradients": trained,
        "optimizer": 2 * trained,  # two averages, as AdamW keeps; others keep fewer
        "average": _state_bytes(run.model) + _state_bytes(extra_parts(run.objective)) if run.ema else 0,
    }
    if recipe.run.strategy == "fsdp":
        found = {name: value // ranks for name, value in found.items()}
    share = -(-recipe.data.batch_size // ranks // recipe.optim.accumulate)
    found["activations"] = activations(run, share)
    found["sum"] = sum(found.values())
    return {name: round(value / GB, 3) for name, value in found.items()}


def _state_bytes(module: nn.Module) -> int:
    return sum(4 * value.numel() for value in module.state_dict().values())


def activations(run: Run, samples: int) -> int:
    """Bytes that one forward pass of so many samples keeps for the backward pass."""
    recipe, model = run.recipe, run.model
    side, channels = recipe.data.image.size, recipe.data.image.channels
    amp = recipe.run.precision == "amp_bf16"
    dtype = torch.bfloat16 if recipe.run.precision == "bf16" else torch.float32
    pictures = getattr(run.objective, "picture_pass", lambda model, pixels: model.encode_image(pixels))

    def forward(count: int) -> object:
        context: Any = torch.autocast(run.device.type, torch.bfloat16) if amp else nullcontext()
        with context:
            pixels = torch.empty(count, channels, side, side, dtype=dtype, device=run.device)
            return pictures(model, pixels), _text(model, count, recipe.tokenizer.context_length, run.device)

    was_training = model.training
    model.train()
    try:
        return saved_bytes(forward, samples, model, run.objective)
    finally:
        model.train(was_training)


def _text(model: Any, count: int, length: int, device: torch.device) -> object:
    tower: Any = getattr(model, "text", model)
    tokens = torch.zeros(count, length, dtype=torch.int64, device=device)
    trunk = trunk_of(tower)
    if trunk is not None:  # Hugging Face's; its padding mask asks for values, which these tensors have not
        return trunk(input_ids=tokens)
    return model.encode_text(tokens)


def saved_bytes(forward: Callable[[int], object], samples: int, *modules: nn.Module) -> int:
    """Bytes that `forward(samples)` keeps, by those of one sample and of two; parameters do not count."""
    one, two = (_saved(forward, count, modules) for count in (1, 2))
    return one + (samples - 1) * (two - one)


def _saved(forward: Callable[[int], object], count: int, modules: tuple[nn.Module, ...]) -> int:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        own = [value for module in modules for value in (*module.parameters(), *module.buffers())]
        # some operations save a parameter itself, some its stand-in; held until the end, for a stand-in that is dropped
        # is made anew, in another place, when its parameter is used again
        own += [mode.from_tensor(value) for value in own]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results = forward(count)
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
        del results
    known = {value.untyped_storage()._cdata for value in own}
    return sum(size for place, size in storages.items() if place not in known)
