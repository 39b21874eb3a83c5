"""Figures of one training step: our `train_step` against open_clip's `train_one_epoch`, equal weights and batches."""

import contextlib
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_kit import Row, compare, cpu, take_turns
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.preprocess import normalise
from vlp.models import locking
from vlp.recipe import Recipe, validate
from vlp.run import Run, prepare
from vlp.step import train_step

PEER = ("open_clip train_one_epoch", version("open_clip_torch"))
RATE = 1e-5
"""Where a warm-up would be: at 1e-4 from random weights a rounded bit grows to a tenth of the loss within 12 steps."""


def recipe(shards: Path, model: dict[str, Any], batch: int, precision: str) -> Recipe:
    """The recipe of a plain CLIP run with the peer's settings."""
    return validate({
        "data": {"train": str(shards), "batch_size": batch, "cache_mb": 0},
        "model": model,
        "optim": {"lr": RATE, "schedule": "constant", "warmup": 0, "weight_decay": 0.2, "grad_clip": None},
        "run": {"steps": 1_000_000, "precision": precision, "threads": 1},
    })  # fmt: skip


class Ours:
    """Our trainer's step."""

    def __init__(self, settings: Recipe, batches: list[Batch], start: dict[str, Tensor]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.run: Run = prepare(settings, Path(folder))
        self.run.model.load_state_dict(start)
        locking.set_training(self.run.model)
        self.batches, self.losses = batches, list[float]()

    def __call__(self) -> None:
        """One step per batch."""
        self.losses += [train_step(self.run, batch)["loss"] for batch in self.batches]


class Peers:
    """open_clip's training loop, over batches as its own loader gives them."""

    def __init__(self, settings: Recipe, batches: list[Batch], model: nn.Module, precision: str) -> None:
        from open_clip import ClipLoss

        self.model, self.losses = model, list[float]()
        pairs = [(normalise(batch.pixels, settings.data.image), batch.tokens) for batch in batches]
        loader = _Loader(pairs)
        self.data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _: None)}
        self.args = SimpleNamespace(
            device="cpu", precision=precision, distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=None,
            log_every_n_steps=1 << 40, batch_size=len(batches[0].keys), world_size=1, rank=0, horovod=False,
            wandb=False,
        )  # fmt: skip
        self.optimizer = peer_optimizer(model)
        plain = ClipLoss(cache_labels=True)

        def loss(**features: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = plain(**features)
            self.losses.append(float(found["contrastive_loss"].detach()))
            return found

        self.loss = loss

    def __call__(self) -> None:
        """One step per batch."""
        from open_clip_train.train import train_one_epoch

        with contextlib.redirect_stdout(None):
            train_one_epoch(self.model, self.data, self.loss, 0, self.optimizer, None, None, None, self.args)


class _Loader:
    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs, self.num_batches = pairs, len(pairs) + 1  # so that the last step is not logged either
        self.num_samples = sum(len(images) for images, _ in pairs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.pairs)


def peer_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """As open_clip_train.main builds it."""
    named = list(model.named_parameters())
    plain = [p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale")) for name, p in named]
    groups = [
        {"params": [p for (_, p), yes in zip(named, plain, strict=True) if yes], "weight_decay": 0.0},
        {"params": [p for (_, p), yes in zip(named, plain, strict=True) if not yes], "weight_decay": 0.2},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)


def step_rows(shards: Path, name: str, batch: int, steps: int, rounds: int) -> list[Row]:
    """Our bf16 step against the peer's in bf16 and in float32, and both with half of the patches dropped."""
    import open_clip

    torch.set_num_threads(1)
    settings = recipe(shards, {"name": name}, batch, "amp_bf16")
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(settings, Path(folder))
    start = {key: value.clone() for key, value in run.model.state_dict().items()}
    batches = [one for one, _ in zip(run.loader, range(steps), strict=False)]
    del run

    def peer(precision: str, **change: Any) -> Peers:
        model = open_clip.create_model(name, precision=precision, output_dict=True, **change)
        model.load_state_dict(start)
        return Peers(settings, batches, model, precision)

    plain = recipe(shards, {"name": name}, batch, "fp32")
    sides: dict[str, Ours | Peers] = {"ours": Ours(settings, batches, start), "ours_fp32": Ours(plain, batches, start)}
    sides |= {"amp": peer("amp_bf16"), "fp32": peer("fp32")}

    def turn(key: str) -> None:
        # the peer in float32 as it runs by default
        torch.set_float32_matmul_precision("highest" if key == "fp32" else "medium")
        sides[key]()

    taken = take_turns({key: cpu(partial(turn, key)) for key in sides}, rounds)
    curves = {key: side.losses for key, side in sides.items()}
    rows = []
    for row, own, peers, goal, most in (
        ("step_amp", "ours", "amp", ">= 1.35", 0.02),
        ("step_fp32", "ours", "fp32", ">= 4", 0.02),
        ("step_fp32_same", "ours_fp32", "fp32", ">= 1.35", 1e-3),
    ):
        apart = max(abs(a - b) for a, b in zip(curves[own], curves[peers], strict=True))
        words = "ours in float32 too" if own == "ours_fp32" else "ours in bfloat16"
        note = f"{name}, batch {batch}, one core, {words}; {len(curves[own])} losses, at most {apart:.1g} apart"
        rows.append(compare(row, PEER, taken[own], taken[peers], goal, apart < most, note))
    sides.clear()
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["patch_dropout"] = 0.5
    dropped = recipe(shards, {"config": config}, batch, "amp_bf16")
    half, other = Ours(dropped, batches, start), peer("amp_bf16", force_patch_dropout=0.5)
    taken = take_turns({"ours": cpu(half), "peer": cpu(other)}, rounds)
    drift = abs(sum(half.losses) - sum(other.losses)) / len(half.losses)
    note = f"half of the patches dropped at random on both sides; mean losses {drift:.3f} apart"
    return [*rows, compare("step_patch_dropout", PEER, taken["ours"], taken["peer"], ">= 1.35", drift < 0.1, note)]
