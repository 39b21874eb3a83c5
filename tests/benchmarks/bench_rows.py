"""Figures of raw reading and of the tokenizer: both sides in one process, taking turns."""

import random
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from bench_kit import Row, compare, cpu, missing, take_turns, wall

from data_pipelines.reader import open_shards
from data_pipelines.tokens import Tokenizer, clip_tokenizer
from vlp.torchvision_guard import ensure_torchvision

WEBDATASET = ("webdataset", version("webdataset"))
OPEN_CLIP = ("open_clip tokenizer", version("open_clip_torch"))


def our_samples(shards: Path, shuffled: bool) -> Iterator[tuple[str, bytes, str]]:
    """(key, picture, first caption) of all samples, shards opened anew; `shuffled` in an order over all of them."""
    opened = open_shards(shards)
    places = [(shard, row) for shard in opened for row in range(len(shard))]
    if shuffled:
        random.Random(0).shuffle(places)
    for shard, row in places:
        sample = shard.read(row)
        yield sample.key, sample.image, sample.captions[0]


def peer_samples(shards: Path) -> Iterator[tuple[str, bytes, str]]:
    """The same by webdataset, which knows the stored order only."""
    import webdataset

    urls = sorted(map(str, shards.glob("*.tar")))
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        yield sample["__key__"], sample["jpg"], sample["txt"].decode().splitlines()[0]


def read_row(name: str, shards: Path, goal: str, rounds: int, shuffled: bool) -> Row:
    """Time of webdataset in stored order over ours, in the same or in random order."""

    def ours() -> int:
        return sum(len(picture) for _, picture, _ in our_samples(shards, shuffled))

    def peer() -> int:
        return sum(len(picture) for _, picture, _ in peer_samples(shards))

    expected = sorted(peer_samples(shards))
    equal = sorted(our_samples(shards, shuffled)) == expected
    taken = take_turns({"ours": cpu(ours), "peer": cpu(peer)}, rounds)
    rates = [len(expected) / min(taken[side]) for side in ("ours", "peer")]
    note = f"{rates[0]:,.0f} samples/s with opening, peer {rates[1]:,.0f}"
    return compare(name, WEBDATASET, taken["ours"], taken["peer"], goal, equal, note)


def plain_tokenizer() -> Tokenizer:
    """CLIP's, without the accelerator."""
    tokenizer = clip_tokenizer()
    tokenizer._accelerator = None
    return tokenizer


def tokens_row(
    name: str, texts: Sequence[str], goal: str, rounds: int, accelerated: bool, on_the_wall: bool = False
) -> Row:
    """Time of open_clip's tokenizer over ours, both with the words they have met before."""
    ensure_torchvision()
    import open_clip

    ours = clip_tokenizer() if accelerated else plain_tokenizer()
    if accelerated and ours._accelerator is None:
        return missing(name, OPEN_CLIP, goal, "instant-clip-tokenizer is not installed")
    peer = open_clip.get_tokenizer("ViT-B-32")
    equal = bool((ours(texts) == peer(list(texts))).all())
    clock: Callable[[Callable[[], object]], Callable[[], float]] = wall if on_the_wall else cpu
    taken = take_turns({"ours": clock(lambda: ours(texts)), "peer": clock(lambda: peer(list(texts)))}, rounds)
    foreign = sum(not text.isascii() for text in texts) / len(texts)
    note = f"{len(texts):,} captions, {foreign:.0%} not ASCII, {len(texts) / min(taken['ours']):,.0f}/s"
    return compare(name, OPEN_CLIP, taken["ours"], taken["peer"], goal, equal, note)
