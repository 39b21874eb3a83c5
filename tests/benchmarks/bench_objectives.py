"""Every objective's step against plain CLIP's, at 1,024 pairs and a width of 512; part of `make bench-train`.

A step is forward and backward of towers and loss. Where a method needs further views or texts, plain CLIP contrasts as
many; where it needs a momentum copy or a teacher, plain CLIP's towers run as often without gradient. The towers are
small, so that what a loss costs shows more than beside larger ones. One thread, by its processor time, taking turns.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from bench_kit import Row, compare, cpu, take_turns
from torch import Tensor

from data_pipelines.batch import Batch
from vlp.models import ModelConfig, build_model, resolve_config
from vlp.models.lean import LeanModel
from vlp.objectives.base import Dims, Features, load, names
from vlp.objectives.clip import Config, clip_loss
from vlp.testing import attached, full_batch, network_input

PEER = ("plain CLIP", version("vlp"))
GOAL = "<= 1.3"
PASSES = {"cacr": (2, 1), "groco": (2, 1), "inmodal": (2, 2), "pair_gate": (2, 1), "strong_baseline": (3, 3)}
"""Pictures and texts of a sample that a method trains on; one each where not said."""
WATCHED = {"distill": (1, 1), "soft_multilabel": (1, 0)}
"""Those that a teacher or a momentum copy encodes besides, without gradient."""
OPTIONS: dict[str, dict[str, Any]] = {"strong_baseline": {"hidden": 512, "dim": 128}}
"""The paper's projectors, 4,096 wide, would be many times larger than these towers."""
ALONE = frozenset({"clip", "dense_distill", "detection_finetune", "detection_pretrain"})
"""CLIP itself, and what learns places and boxes with heads that plain CLIP has no counterpart of; what these cost is in
`vlp train --dry-run`."""
CLASSES, CLUSTERS = 100, 1000
SIZE = 32


def towers(name: str, width: int) -> Any:
    """The starter model with embeddings of this width; with a decoder for captions where the objective writes them."""
    config = resolve_config(ModelConfig(name="starter-coca" if name == "coca" else "starter-small"))
    config["embed_dim"] = width
    for part in ("text_cfg", "multimodal_cfg") if name == "coca" else ():  # a decoder is as wide as the embedding
        config[part]["width"] = width
    model, _ = build_model(ModelConfig(config=config), SIZE, 12, 320)
    return model


def batch_of(name: str, count: int) -> Batch:
    """Random pictures of 32 px and texts of 12 words, labels and clusters; as many views and texts as `name` takes."""
    images, texts = PASSES.get(name, (2 if name == "soft_multilabel" else 1, 1))
    small = full_batch(count)
    numbers = torch.arange(count)

    def larger(pixels_BCHW: Tensor) -> Tensor:
        return F.interpolate(pixels_BCHW, SIZE)

    return replace(
        small,
        pixels=larger(small.pixels),
        views=tuple(map(larger, small.views or ()))[: images - 1],
        extra_tokens=(small.extra_tokens or ())[: texts - 1],
        label_ids=numbers % CLASSES,
        multi_labels=torch.rand(count, CLASSES, generator=torch.Generator().manual_seed(0)).lt(0.05).to(torch.uint8),
        cluster_ids=torch.stack([numbers, numbers * 7 + 1, numbers * 31 + 2], dim=1) % CLUSTERS,
    )


class Step:
    """Forward and backward of one objective, on a model of its own."""

    def __init__(self, name: str, batch: Batch, width: int) -> None:
        torch.manual_seed(0)
        model = towers(name, width)
        dims = Dims(width, math.log(1 / 0.07), CLASSES, CLUSTERS)
        module, config = load({"name": name, **OPTIONS.get(name, {})})
        self.objective = attached(module.build(config, dims), model).train()
        self.model = LeanModel(model.train())
        self.pixels, self.batch = network_input(batch)

    def __call__(self) -> float:
        """The loss; gradients are made anew."""
        self.model.zero_grad()
        self.objective.zero_grad()
        features = self.objective.encode(self.model, self.pixels, self.batch)
        loss: Tensor = self.objective(features, self.model.logit_scale.exp()).loss
        loss.backward()
        return float(loss.detach())


class Plain:
    """The same of CLIP over several pictures and texts of a sample."""

    def __init__(self, name: str, batch: Batch, width: int) -> None:
        torch.manual_seed(0)
        self.model = LeanModel(towers(name, width).train())
        self.pixels, self.batch = network_input(batch)
        images, texts = PASSES.get(name, (1, 1))
        self.pictures = [self.pixels, *(self.batch.views or ())][:images]
        self.texts = [self.batch.tokens, *(self.batch.extra_tokens or ())][:texts]
        self.watched = WATCHED.get(name, (0, 0))

    def __call__(self) -> float:
        """The loss; gradients are made anew."""
        self.model.zero_grad()
        images = [self.model.encode_image(pixels, normalize=True) for pixels in self.pictures]
        texts = [self.model.encode_text(tokens, normalize=True) for tokens in self.texts]
        pairs = [Features(image_BD, texts[at % len(texts)]) for at, image_BD in enumerate(images)]
        with torch.no_grad():
            for _ in range(self.watched[0]):
                self.model.encode_image(self.pixels, normalize=True)
            for _ in range(self.watched[1]):
                self.model.encode_text(self.batch.tokens, normalize=True)
        scale = self.model.logit_scale.exp()
        loss = torch.stack([clip_loss(pair, scale, Config())[0] for pair in pairs]).mean()
        loss.backward()
        return float(loss.detach())


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread and the trainer's route of float32 products; afterwards as before, for whatever runs next."""
    threads, route = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(route)


def objective_row(name: str, count: int, width: int, rounds: int) -> Row:
    """Time of a step over that of plain CLIP's."""
    batch = batch_of(name, count)
    ours, plain = Step(name, batch, width), Plain(name, batch, width)
    with single_thread():
        taken = take_turns({"ours": cpu(ours), "plain": cpu(plain)}, rounds)
    images, texts = PASSES.get(name, (1, 1))
    watched = " and ".join(
        f"{n} {kind}" for n, kind in zip(WATCHED.get(name, ()), ("picture", "text"), strict=False) if n
    )
    note = f"{count} samples, {images} x image tower, {texts} x text tower on both sides"
    note += f", {watched} without gradient" if watched else ""
    return compare(f"objective-{name}", PEER, taken["ours"], taken["plain"], GOAL, math.isfinite(ours()), note)


def objective_rows(count: int = 1024, width: int = 512, rounds: int = 5) -> list[Row]:
    """A row for every objective that contrasts whole pictures and texts."""
    return [objective_row(name, count, width, rounds) for name in names() if name not in ALONE]
