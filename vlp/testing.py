"""Small real models and pictures, and real gloo ranks, for tests and for users' own tests."""

import io
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from data_pipelines.preprocess import ImageConfig
from data_pipelines.tokens import learn_tokenizer
from vlp.bundle import Bundle
from vlp.models import ModelDict, instantiate

WORDS = ("red circle", "green square", "blue triangle", "yellow ring", "a photo of a cat", "pepper and salt", "tall tree")

MICRO: ModelDict = {
    "embed_dim": 16,
    "init_logit_scale": 2.6592,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 96, "width": 32, "heads": 2, "layers": 1},
}


def micro_bundle(seed: int = 0) -> Bundle:
    """A CLIP of a few thousand parameters with fixed initial weights and a learned vocabulary."""
    tokenizer = learn_tokenizer(WORDS, vocab_size=96, context_length=12)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = instantiate({**MICRO, "text_cfg": {**MICRO["text_cfg"], "vocab_size": tokenizer.vocab_size}})
    config = {**MICRO, "text_cfg": {**MICRO["text_cfg"], "vocab_size": tokenizer.vocab_size}}
    return Bundle("micro", model.eval(), config, ImageConfig(size=16), tokenizer)


def picture(seed: int = 0, size: tuple[int, int] = (40, 32), form: str = "JPEG") -> bytes:
    """A small encoded picture with smooth content that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (size[1], size[0]), mode="bicubic").clamp(0, 1)[0]
    pixels = (fine * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, quality=95)
    return stream.getvalue()


def run_ranks(function: Callable[..., Any], world: int, arguments: Sequence[Any] = ()) -> list[Any]:
    """Run `function(rank, *arguments)` on `world` real gloo processes and return their results in rank order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(function, rank, world, port, queue, tuple(arguments))) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"ranks ended with exit codes {[process.exitcode for process in processes]}")
    results = dict(queue.get() for _ in range(world))
    return [results[rank] for rank in range(world)]


def _rank(
    function: Callable[..., Any], rank: int, world: int, port: int, queue: Any, arguments: tuple[Any, ...]
) -> None:
    from vlp.distributed import leave, set_up

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    set_up()
    try:
        result = function(rank, *arguments)
    finally:
        leave()
    queue.put((rank, result))
