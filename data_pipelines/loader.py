"""make_loader(cfg): an endless iterator of training batches whose position is one integer."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from data_pipelines.augment import AugmentConfig, augment
from data_pipelines.batch import Batch
from data_pipelines.captions import DRAWS, CaptionConfig, choose_phrases, compose, pad_ids
from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, ConfigError, PipelineError
from data_pipelines.images import MAX_PIXELS
from data_pipelines.plan import Ids, Plan, rank_slice
from data_pipelines.preprocess import ImageConfig
from data_pipelines.records import MANIFEST, manifest_digest
from data_pipelines.stream import Decoded, Ledger, ShardSet, decode
from data_pipelines.tokens import Tokenizer

CAPTIONS, PICTURES, VIEWS = 11, 12, 13
"""Purposes of the random numbers of a step."""
KNOWN = 48
"""Captions and labels of a sample that the false-negative mask knows; further ones are left out."""


class DataConfig(StrictModel):
    """Training data of a recipe."""

    train: Path
    """Folder of shards."""
    sources: dict[str, int] | None = None
    """Source -> how often each of its samples appears in an epoch; others are left out. Default: all once."""
    batch_size: int = 256
    """Global batch, over all ranks."""
    image: ImageConfig = ImageConfig()
    augment: AugmentConfig = AugmentConfig()
    captions: CaptionConfig = CaptionConfig()
    window: int = 16
    """Shards whose samples are mixed with each other."""
    threads: int = 2
    """Decoding threads per rank."""
    prefetch: int = 2
    """Batches made ahead."""
    cache_mb: int = 1024
    """Memory for decoded pictures, per rank; a data set that fits is decoded once."""
    cached_views: int = 4
    """With both trunks frozen: views of every picture whose features are computed once, the plain one included."""
    max_pixels: int = MAX_PIXELS
    max_bad_share: float = 0.01
    """The run stops when a larger share of the samples cannot be used."""


class LoaderState(TypedDict):
    """Everything a resume needs; all of it is compared, only `step` is taken over."""

    step: int
    seed: int
    batch_size: int
    data: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """The samples of one step on this rank and the text chosen for each."""

    ids: Ids
    """Sample ids of the whole global batch."""
    rows: list[int]
    """Positions of this rank's usable samples in `ids`; they select the samples' random numbers."""
    samples: list[Decoded]
    texts: list[str]
    known: Tensor
    """B x KNOWN numbers of all phrases of a sample."""
    chosen: Tensor
    """B x (max_labels + 1) numbers of the phrases in its text."""


class Loader:
    """Iterator of (this rank's part of) global batches. Holds the position and the cache of decoded pictures."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, seed: int, rank: int = 0, world: int = 1) -> None:
        """Opens the shards; reads no picture yet."""
        self.config, self.tokenizer, self.rank, self.world = config, tokenizer, rank, world
        self.shards = ShardSet([config.train], config.sources)
        self.plan = Plan(self.shards.sizes, config.batch_size, seed, window=config.window)
        self.ledger = Ledger(config.max_bad_share)
        self.step = 0
        self.side_at: Callable[[int], int] = lambda _: config.image.size
        """Side of the training pictures at a step; a trainer that grows them sets it before the first batch."""
        self._cache: dict[tuple[int, int], Decoded] = {}
        self._cached_bytes = 0

    def state_dict(self) -> LoaderState:
        """Position after the batches handed out so far."""
        return {
            "step": self.step,
            "seed": self.plan.seed,
            "batch_size": self.plan.batch_size,
            "data": data_digest(self.config.train),
        }

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue where `state` was taken. Raises ConfigError, showing the difference, when the data differs."""
        mine = self.state_dict()
        different = [
            f"{key}: checkpoint {state[key]}, now {mine[key]}"
            for key in ("seed", "batch_size", "data")
            if state[key] != mine[key]
        ]
        if different:
            raise ConfigError("cannot resume, the data is not the same: " + "; ".join(different))
        self.step = state["step"]

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(self.config.threads) as pool:
            for batch in _ahead(lambda: self._produce(pool, self.step), self.config.prefetch):
                self.step += 1
                yield batch

    def _produce(self, pool: ThreadPoolExecutor, step: int) -> Iterator[Batch]:
        while True:
            yield self.make_batch(step, pool)
            step += 1

    def make_batch(self, step: int, pool: ThreadPoolExecutor | None = None) -> Batch:
        """This rank's part of global step `step`."""
        drawn = self.draw(step, pool)
        pixels = augment(
            torch.stack([sample.pixels for sample in drawn.samples]),
            self.config.augment,
            self.plan.generator(step, PICTURES),
            total=len(drawn.ids),
            rows=drawn.rows,
            side=self.side_at(step),
        )
        return Batch(
            keys=tuple(sample.key for sample in drawn.samples),
            pixels=pixels,
            tokens=self.tokenizer(drawn.texts),
            phrase_ids=drawn.known,
            text_phrase_ids=drawn.chosen,
        )

    def draw(self, step: int, pool: ThreadPoolExecutor | None = None) -> Drawn:
        """Fetch the samples of a step and choose their captions. Raises PipelineError when too many are unusable."""
        ids = self.plan.batch(step)
        part = rank_slice(ids, self.rank, self.world)
        wanted = ids[part].tolist()
        found = list(pool.map(self.fetch, wanted) if pool else map(self.fetch, wanted))
        rows, samples = [], []
        for row, item in enumerate(found, start=part.start):
            if isinstance(item, BadSample):
                self.ledger.bad(item)
            else:
                self.ledger.good()
                rows.append(row)
                samples.append(item)
        if not samples:
            raise PipelineError(f"no sample of step {step} could be used: {dict(self.ledger.quarantined)}")
        draws = self.plan.generator(step, CAPTIONS).random((len(ids), DRAWS))[rows]
        captions = self.config.captions
        chosen = [choose_phrases(s.captions, s.labels, captions, d) for s, d in zip(samples, draws, strict=True)]
        return Drawn(
            ids=ids,
            rows=rows,
            samples=samples,
            texts=[compose(phrases, captions) for phrases in chosen],
            known=torch.from_numpy(pad_ids([(*sample.captions, *sample.labels) for sample in samples], KNOWN)),
            chosen=torch.from_numpy(pad_ids(chosen, captions.max_labels + 1)),
        )

    def fetch(self, sample_id: int) -> Decoded | BadSample:
        """One decoded sample, from the cache if it is there; the error instead if it cannot be used."""
        original = self.shards.original(sample_id)
        cached = self._cache.get(original)
        if cached is not None:
            return cached
        try:
            sample = decode(self.shards.read(sample_id), self.config.image, self.config.max_pixels)
        except BadSample as error:
            return error
        size = sample.pixels.numel()
        if self._cached_bytes + size <= self.config.cache_mb << 20:
            self._cache[original] = sample
            self._cached_bytes += size
        return sample


def make_loader(config: DataConfig, tokenizer: Tokenizer, seed: int, rank: int = 0, world: int = 1) -> Loader:
    """The loader of a recipe's training data."""
    return Loader(config, tokenizer, seed, rank, world)


def data_digest(folder: Path) -> str:
    """What identifies the data: the manifest's sha256, else names and sizes of the shards."""
    if (folder / MANIFEST).is_file():
        return manifest_digest(folder)
    return ",".join(f"{path.name}:{path.stat().st_size}" for path in sorted(folder.glob("*.tar")))


def _ahead(produce: Callable[[], Iterator[Batch]], depth: int) -> Iterator[Batch]:
    """Run a producer in a thread, `depth` items ahead; its errors surface here, and it ends when the consumer does."""
    items: queue.Queue[Batch | BaseException] = queue.Queue(depth)
    stop = threading.Event()

    def offer(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in produce():
                offer(item)
                if stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            offer(error)

    thread = threading.Thread(target=work, name="vlp-loader", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
