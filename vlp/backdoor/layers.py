"""Pictures that come to their embedding on another way than trusted ones: the guard's scores, as a sign of a scan.

Suffix: N pictures.
"""

from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.errors import ConfigError
from data_pipelines.images import MAX_PIXELS
from data_pipelines.ledger import Ledger
from data_pipelines.reader import Sample
from data_pipelines.shard_set import ShardSet
from data_pipelines.stream import Decoded, cut, decode, decoded_blocks
from vlp.backdoor.guard import Guard, fit_guard
from vlp.bundle import Bundle
from vlp.curate.pictures import Advance
from vlp.embed import weights_digest
from vlp.infer import BATCH, encode_pixels

THREADS = 2


def strangeness(path: Path, bundle: Bundle, trusted: Path, data: Path, advance: Advance) -> dict[str, float]:
    """Key -> score of every picture of `data` by a guard of the bundle from `path`, fitted on pictures of `trusted`.

    Never more than a block is held. Raises ConfigError where trusted pictures are too few, or those of `data`.
    """
    if trusted.resolve() == data.resolve():
        raise ConfigError(f"--trusted {trusted}: these are the shards to scan: name clean pictures other than those")
    info, profile = fit_guard(bundle, weights_digest(path), trusted, "fast")
    guard, ledger, shards = Guard(info, profile, bundle), Ledger(), ShardSet(data)

    def read(sample: Sample) -> Decoded:
        return decode(sample, bundle.image, MAX_PIXELS, captions=False)

    found: dict[str, float] = {}
    try:
        for block in decoded_blocks(shards, cut(len(shards), BATCH), read, ledger, THREADS):
            if block:
                score_N = _scores(guard, bundle, block)
                found |= {sample.key: score for sample, score in zip(block, score_N.tolist(), strict=True)}
            advance(len(block))
        ledger.check()
        return found
    finally:
        guard.close()


def _scores(guard: Guard, bundle: Bundle, block: list[Decoded]) -> Tensor:
    pixels_NCHW = torch.stack([sample.pixels for sample in block])
    return guard.scored(lambda: encode_pixels(bundle, pixels_NCHW).cpu())[1]
