"""Small things that tests of every floor need; shipped, so that tests need not import each other."""

import io

import numpy as np
from PIL import Image


def draw(size: tuple[int, int] = (40, 30), mode: str = "RGB", format: str = "PNG", seed: int = 0) -> bytes:
    """An encoded picture of soft noise, width x height; another `seed` gives another picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA").resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def run_shard(*arguments: str) -> None:
    """`vlp shard` with these arguments; something a fresh process can be told to run."""
    from data_pipelines.cli import shard

    shard(arguments)
