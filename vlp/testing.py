"""Small real models and real gloo ranks, for our tests and for users' own."""

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import Empty
from typing import Any

import torch

from data_pipelines.batch import Batch
from data_pipelines.preprocess import ImageConfig
from data_pipelines.testing import draw
from data_pipelines.tokens import learn_tokenizer
from vlp.bundle import Bundle
from vlp.models import ModelDict, instantiate

WORDS = (
    "red circle",
    "green square",
    "blue triangle",
    "yellow ring",
    "a photo of a cat",
    "pepper and salt",
    "tall tree",
)

MICRO: ModelDict = {
    "embed_dim": 16,
    "init_logit_scale": 2.6592,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 320, "width": 32, "heads": 2, "layers": 1},
}

MICRO_COCA: ModelDict = {
    **MICRO,
    "vision_cfg": {
        **MICRO["vision_cfg"], "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {**MICRO["text_cfg"], "width": 16, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 12, "vocab_size": 320, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip
"""The same with a caption decoder."""

MICRO_BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 320, "max_position_embeddings": 16,
}  # fmt: skip
"""config.json of a Hugging Face text tower of the same size."""


def micro_bundle(seed: int = 0) -> Bundle:
    """A CLIP of a few thousand parameters with fixed initial weights and a learned vocabulary."""
    tokenizer = learn_tokenizer(WORDS, vocab_size=320, context_length=12)
    config = {**MICRO, "text_cfg": {**MICRO["text_cfg"], "vocab_size": tokenizer.vocab_size}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = instantiate(config)
    return Bundle("micro", model.eval(), config, ImageConfig(size=16), tokenizer)


def picture(seed: int = 0, size: tuple[int, int] = (40, 32), form: str = "JPEG") -> bytes:
    """A small encoded picture that depends on the seed alone."""
    return draw(size, format=form, seed=seed)


def full_batch(count: int = 6, seed: int = 0) -> Batch:
    """Random samples for `MICRO` with every field an objective may need; labels and captions partly shared."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(count)

    def pixels() -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)

    def tokens() -> torch.Tensor:
        return torch.randint(1, 96, (count, 12), generator=generator)

    return Batch(
        keys=tuple(map(str, range(count))),
        pixels=pixels(),
        tokens=tokens(),
        views=(pixels(), pixels()),
        extra_tokens=(tokens(), tokens()),
        phrase_ids=torch.stack([numbers % 5, numbers % 3 + 100], dim=1),
        text_phrase_ids=numbers[:, None] % 4 + 100,
        label_ids=numbers % 4 - 1,
        multi_labels=torch.stack([numbers % 4 == 1, numbers % 4 == 2, numbers % 3 == 0], dim=1).to(torch.uint8),
        cluster_ids=torch.stack([numbers % 5, (numbers + 1) % 5, torch.full((count,), -1)], dim=1),
        boxes=torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.4, 0.0, 1.0, 0.5], [0, 0, 0, 0]]).repeat(count, 1, 1),
        box_mask=torch.stack([numbers % 4 < 3, numbers % 2 == 0, numbers < 0], dim=1),
        box_labels=torch.stack([numbers % 2, numbers % 3 - 1, torch.full((count,), -1)], dim=1),
        weight=0.5 + torch.rand(count, generator=generator),
    )


FULL_CLASSES, FULL_CLUSTERS = 3, 5
"""Classes and clusters that the labels of `full_batch` number."""
FULL_BOX_LABELS = WORDS[:2]
"""Labels that its boxes number."""


def network_input(batch: Batch) -> tuple[torch.Tensor, Batch]:
    """Pictures from 0 to 1 and the batch with its further views alike: the arguments of an objective's `encode`."""
    views = batch.views and tuple(view.float() / 255 for view in batch.views)
    return batch.pixels.float() / 255, replace(batch, views=views)


MICRO_PARTS: dict[str, Any] = {
    "levels": [2, 3], "width": 8, "roi_size": 2, "convs": 1, "hidden": 16, "dense_convs": 1,
}  # fmt: skip
"""Sizes of a detector's parts."""
MICRO_OPTIONS: dict[str, dict[str, Any]] = {
    "strong_baseline": {"hidden": 16, "dim": 8},
    "detection_pretrain": {"boxes": 3, "parts": MICRO_PARTS},
    "detection_finetune": {"proposals": 4, "parts": MICRO_PARTS},
    "dense_distill": {"labels": list(WORDS[:4]), "templates": "plain"},
}
"""Options that make the modules of an objective as small as these models; papers' sizes hold millions of weights."""


def micro_detector(stage: str = "finetune", seed: int = 0, **config: Any) -> Bundle:
    """A micro model with fresh parts that claim to be fine-tuned on two of its words, its dense head stirred a bit."""
    from vlp.detection.model import PartsConfig, make_parts

    bundle = micro_bundle(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = make_parts(PartsConfig(**{**MICRO_PARTS, **config}), bundle.model, 16)
        torch.nn.init.normal_(parts.dense.centre.weight, std=1.0)
        torch.nn.init.normal_(parts.dense.sides.weight, std=0.5)
    changed = {"stage": stage, "base_labels": WORDS[:2] if stage == "finetune" else ()}
    parts.info = parts.info.model_copy(update=changed)
    bundle.parts["detection"] = parts.eval()
    return bundle


def micro_model(objective: str) -> torch.nn.Module:
    """What an objective is tried on, its weights drawn anew: MICRO, with a decoder where the objective asks for one."""
    return instantiate(MICRO_COCA if objective == "coca" else MICRO)


def attached(objective: Any, model: torch.nn.Module) -> Any:
    """An objective that has seen its model, as the trainer does before the first step."""
    if hasattr(objective, "attach"):
        objective.attach(model)
    return objective


def run_ranks(function: Callable[..., Any], world: int, arguments: Sequence[Any] = ()) -> list[Any]:
    """Run `function(rank, *arguments)` on `world` real gloo processes; their results in rank order.

    Raises RuntimeError with the traceback of the first rank that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("forkserver")  # imports are paid once, not by every rank
    context.set_forkserver_preload(["vlp.distributed", "vlp.models"])
    queue = context.Queue()
    processes = [
        context.Process(target=_rank, args=(function, rank, world, port, queue, tuple(arguments)))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world:
            try:
                rank, result, error = queue.get(timeout=1)
            except Empty:
                if any(process.exitcode for process in processes):
                    raise RuntimeError(f"ranks ended with {[process.exitcode for process in processes]}") from None
                continue
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            results[rank] = result
    finally:
        for process in processes:
            if len(results) < world:
                process.terminate()
            process.join()
    return [results[rank] for rank in range(world)]


def _rank(
    function: Callable[..., Any], rank: int, world: int, port: int, queue: Any, arguments: tuple[Any, ...]
) -> None:
    from vlp.distributed import leave, set_up

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        set_up()
        queue.put((rank, function(rank, *arguments), ""))
    except Exception:  # noqa: BLE001 - reported by the parent, with its traceback
        queue.put((rank, None, traceback.format_exc()))
    finally:
        leave()
