"""One update: batch -> towers -> objective -> gradients -> optimiser, exact however the batch is cut into parts."""

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_pipelines.batch import Batch
from data_pipelines.errors import PipelineError
from data_pipelines.preprocess import normalise
from vlp import distributed
from vlp.models import locking
from vlp.objectives.base import Features, LossOutput
from vlp.optim import learning_rate, set_rate
from vlp.phases import phase
from vlp.run import Run, extra_parts

log = logging.getLogger(__name__)


def train_step(run: Run, batch: Batch) -> dict[str, float]:
    """One update. A step whose loss or gradient is not finite, or whose loss leaps up, changes no weight.

    Raises PipelineError when too many steps in a row were refused and the recipe says to stop.
    """
    optim = run.recipe.optim
    run.optimizer.zero_grad(set_to_none=True)
    with phase("to_device"):
        moved = batch.to(run.device)
    statistics = running_statistics(run.model)
    before = [value.clone() for value in statistics]
    output = backward(run, moved)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    with phase("gather"):
        distributed.average_gradients(parameters)
    norm = float(distributed.clip_grad_norm(parameters, optim.grad_clip or float("inf")))
    loss = float(output.loss.detach())
    reason = run.guard.check(loss, norm)
    rate = learning_rate(run.step, run.total, optim)
    if reason:
        _put_back(statistics, before)
        _refuse(run, batch, reason, loss)
    else:
        distributed.average(statistics)  # so that all ranks evaluate, save and go on with the same model
        with phase("optimizer"):
            set_rate(run.optimizer, rate)
            run.optimizer.step()
            _clamp_scale(run)
            if run.ema is not None:
                run.ema.update(run.model)
            if run.ema_parts is not None:
                run.ema_parts.update(extra_parts(run.objective))
            if hasattr(run.objective, "after_step"):
                run.objective.after_step(run.model)
    run.step += 1
    if locking.apply(run.model, run.recipe.model, run.step / run.total):
        locking.set_training(run.model)
    parts = {name: float(value) for name, value in output.parts.items()}
    scale = math.exp(float(run.model.logit_scale.detach()))  # type: ignore[operator]
    counts = {"refused_steps": run.guard.refused} if run.guard.refused else {}
    return {"loss": loss, **parts, "lr": rate, "grad_norm": norm, "logit_scale": scale, **counts}


def backward(run: Run, batch: Batch) -> LossOutput:
    """Gradients of the whole batch's loss in every parameter; the loss.

    With `optim.accumulate`, the features of all parts are computed first without their graphs, the loss and its
    gradient in the features on all of them, and then part by part the towers' gradients (GradCache, Gao et al. 2021,
    arXiv 2101.06983): the memory of one part, the result of the whole. Batch norms of a tower normalise by the samples
    of one part of one rank; their running statistics are the means over parts and ranks.
    """
    parts = batch.split(run.recipe.optim.accumulate)
    if len(parts) == 1:
        output = compute_loss(run, batch)
        with phase("backward"):
            output.loss.backward()
        return output
    statistics = running_statistics(run.model)
    before = [value.clone() for value in statistics]
    with torch.no_grad():
        features = [encode(run, part, number) for number, part in enumerate(parts)]
    _put_back(statistics, before)  # every part counts once, below
    leaves = Features.cat(features).map(_leaf)
    output = loss_of(run, leaves)
    output.loss.backward()
    first = 0
    for number, part in enumerate(parts):
        rows = slice(first, first + len(part.keys))
        first = rows.stop
        pairs = zip(encode(run, part, number).tensors(), leaves.tensors(), strict=True)
        wanted = [(own, leaf.grad[rows]) for own, leaf in pairs if own.requires_grad and leaf.grad is not None]
        with phase("backward"):
            torch.autograd.backward([own for own, _ in wanted], [gradient for _, gradient in wanted])
    return output


def _leaf(features: Tensor) -> Tensor:
    return features.detach().requires_grad_(features.is_floating_point())


def compute_loss(run: Run, batch: Batch) -> LossOutput:
    """Both towers and the loss over all ranks' features in float32."""
    return loss_of(run, encode(run, batch))


def encode(run: Run, batch: Batch, part: int = 0) -> Features:
    """What the objective needs of a batch or its `part`; drop-outs depend on seed, step, rank and part alone."""
    seed = np.random.SeedSequence([run.recipe.run.seed, run.step, distributed.rank(), part])
    torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    if batch.image_features is not None:
        pixels = batch.image_features
    else:
        pixels = _network_input(run, batch.pixels)
        if batch.views is not None:
            batch = replace(batch, views=tuple(_network_input(run, view) for view in batch.views))
    amp = run.recipe.run.precision == "amp_bf16"
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=amp):
        features: Features = run.objective.encode(run.encoder, pixels, batch)
    return features


def _network_input(run: Run, pixels_BCHW: Tensor) -> Tensor:
    """Normalised, in the memory layout and type that the model takes."""
    pixels_BCHW = normalise(pixels_BCHW, run.recipe.data.image)
    if run.recipe.run.channels_last:
        pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
    return pixels_BCHW.bfloat16() if run.recipe.run.precision == "bf16" else pixels_BCHW


def loss_of(run: Run, features: Features) -> LossOutput:
    """The loss over the batch of all ranks, from this rank's features."""
    scale: Tensor = run.model.logit_scale.float().exp()  # type: ignore[operator]
    with phase("loss"):
        output: LossOutput = run.objective(features, scale)
    return output


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances that training steps move."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    found = (value for norm in norms for value in (norm.running_mean, norm.running_var))
    return [value for value in found if value is not None]


def _put_back(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _clamp_scale(run: Run) -> None:
    run.model.logit_scale.clamp_(0.0, math.log(run.recipe.optim.max_logit_scale))  # type: ignore[operator]


def _refuse(run: Run, batch: Batch, reason: str, loss: float) -> None:
    """Leave the weights as they are, and write down which samples it was."""
    keys = [key for part in distributed.from_all_ranks(batch.keys) for key in part]
    row: dict[str, Any] = {"step": run.step + 1, "reason": reason, "loss": str(loss), "keys": keys}
    if distributed.rank() == 0:
        run.log.append("refused.jsonl", row)
    log.warning("step %d refused: %s (loss %g); weights unchanged, keys in refused.jsonl", run.step + 1, reason, loss)
    limit = run.recipe.run.max_bad_steps
    if run.guard.in_a_row >= limit and run.recipe.run.on_bad_steps == "stop":
        raise PipelineError(
            f"{limit} steps in a row refused up to step {run.step + 1} ({reason}), see {run.log.folder}/refused.jsonl: "
            "lower optim.lr, use run.precision=fp32, or let it go back by run.on_bad_steps=rollback"
        )
