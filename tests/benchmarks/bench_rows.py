"""Figures of raw reading and of the tokenizer: both sides in one process, taking turns."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from bench_kit import Row, compare, cpu, missing, take_turns, wall

from data_pipelines.plan import Plan
from data_pipelines.shard_set import ShardSet
from data_pipelines.tokens import Tokenizer, clip_tokenizer
from vlp.torchvision_guard import ensure_torchvision

WEBDATASET = ("webdataset", version("webdataset"))
OPEN_CLIP = ("open_clip tokenizer", version("open_clip_torch"))


Raw = tuple[str, bytes, bytes, bytes]
"""Key, picture, json and text of a sample, as stored."""


def our_samples(folder: Path, shuffled: bool) -> Iterator[Raw]:
    """All samples, shards opened anew: as stored, or in the order of training, which resumes exactly at every step."""
    samples = ShardSet(folder)
    batch = max(number for number in range(1, 65) if len(samples) % number == 0)  # so that an epoch holds them all
    plan = Plan(samples.sizes, batch, seed=0)
    ids = (number for step in range(plan.steps) for number in plan.batch(step)) if shuffled else range(len(samples))
    for number in ids:
        shard, row = samples.original(int(number))
        members = samples.shards[shard].raw(row)
        yield samples.shards[shard].key(row), bytes(members["image"]), bytes(members["json"]), bytes(members["txt"])


def peer_samples(folder: Path, shuffled: bool) -> Iterator[Raw]:
    """The same by webdataset; shuffled as its users do it, by shards and in a buffer."""
    import webdataset

    urls = sorted(map(str, folder.glob("*.tar")))
    stored = webdataset.WebDataset(urls, shardshuffle=len(urls) if shuffled else False, seed=0)
    for sample in stored.shuffle(1000) if shuffled else stored:
        yield sample["__key__"], sample["jpg"], sample["json"], sample["txt"]


def read_row(name: str, shards: Path, goal: str, rounds: int, shuffled: bool) -> Row:
    """Time of webdataset over ours, both in stored order or both shuffled."""
    ours, peer = (partial(read, shards, shuffled) for read in (our_samples, peer_samples))
    expected = sorted(peer())
    equal = sorted(ours()) == expected
    taken = take_turns({"ours": cpu(lambda: deque(ours(), 0)), "peer": cpu(lambda: deque(peer(), 0))}, rounds)
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
