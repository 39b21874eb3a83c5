"""make_loader(cfg): an endless iterator of training batches whose position is one integer."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from typing import Any, TypedDict

import torch
from torch import Tensor

from data_pipelines.ahead import ahead
from data_pipelines.augment import traced
from data_pipelines.batch import Batch
from data_pipelines.boxes import ENOUGH, box_fields
from data_pipelines.captions import pad_ids
from data_pipelines.data_config import FREE
from data_pipelines.data_config import DataConfig as DataConfig
from data_pipelines.errors import BadSample, ConfigError, PipelineError
from data_pipelines.files import sha256_file
from data_pipelines.keep import load_weights
from data_pipelines.labels import check_sidecar, cluster_fields, label_fields, numbers_of_shard
from data_pipelines.ledger import Ledger
from data_pipelines.plan import Plan, rank_slice
from data_pipelines.remote import DiskCache
from data_pipelines.sampler import Sampler
from data_pipelines.shard_set import ShardSet
from data_pipelines.sidecar import CLUSTERS, load_sidecar
from data_pipelines.stream import Decoded, decode
from data_pipelines.texts import draw_texts
from data_pipelines.tokens import Tokenizer

PICTURES, VIEWS = 12, 13
"""Purposes of the random numbers of a step; others are in texts.py and plan.py."""
FURTHER = 32
"""Purposes from here on belong to further views and texts: FURTHER x their number is added."""
FETCHERS = 2
"""Remote shards fetched at a time."""
KNOWN = 48
"""Captions and labels of a sample that the false-negative mask knows; further ones are left out."""


class LoaderState(TypedDict):
    """Everything a resume needs; all of it is compared, only `step` is taken over."""

    step: int
    seed: int
    batch_size: int
    partitions: int
    data: str
    """Digest of the manifests."""
    settings: dict[str, Any]
    """Options that decide what a batch holds; files by their sha256."""


def open_set(config: DataConfig) -> ShardSet:
    """The samples of a recipe's training data."""
    cache = DiskCache(limit=int(config.disk_cache_gb * 2**30), options=config.fetch)
    return ShardSet(config.train, config.sources, config.keep, cache, config.pipe)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The samples of one step on this rank and the texts chosen for each."""

    ids: list[int]
    """Sample ids; where a sample was unusable, that of its substitute."""
    rows: range
    """Positions in the global batch; they select the samples' random numbers."""
    samples: list[Decoded]
    texts: list[str]
    extra_texts: list[list[str]]
    known: Tensor
    """B x KNOWN numbers of all phrases of a sample."""
    chosen: Tensor
    """B x (max_labels + 1) numbers of the phrases in its text."""


class Loader:
    """Iterator of (this rank's part of) global batches. Holds the position and the cache of decoded pictures."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, seed: int, rank: int = 0, world: int = 1) -> None:
        """Finds the shards; opens none that a manifest vouches for. Raises ConfigError, PipelineError."""
        self.config, self.tokenizer = config, tokenizer
        self.rows = rank_slice(config.batch_size, rank, world)
        self.shards = open_set(config)
        self._weights = load_weights(config.weights) if config.weights else None
        self._clusters = load_sidecar(config.clusters, CLUSTERS) if config.clusters else None
        self._labels = config.labels.table if config.labels else None
        for table, setting in ((self._clusters, "data.clusters"), (self._labels, "data.labels.sidecar")):
            if table is not None:
                check_sidecar(table, self.shards, setting)
        self.plan = Plan(
            self.shards.sizes,
            config.batch_size,
            seed,
            config.window,
            config.partitions,
            self.shards.parts,
            self.shards.text_lengths,
            config.group_by_length,
            self._sampler(),
        )
        self.ledger = Ledger(config.max_bad_share)
        self.step = 0
        self.side_at: Callable[[int], int] = lambda _: config.image.size
        """Side of the training pictures at a step; a trainer that grows them sets it before the first batch."""
        stored = {config.labels.column} if config.labels and not config.labels.sidecar else set()
        self._columns = frozenset({*config.captions.columns, *stored})
        self._drawn: dict[int, list[tuple[int, BadSample | None]]] = {}
        """Step -> (sample id, why it cannot be used), until the step is settled."""
        self._boxes: dict[int, Counter[str]] = {}
        """Step -> what became of its boxes, until the step is settled."""
        self._cache: dict[tuple[int, int], Decoded] = {}
        self._cached_bytes = 0

    @property
    def classes(self) -> int:
        """Classes that the label fields number; 0 without labels."""
        return self.config.labels.classes if self.config.labels else 0

    @property
    def clusters(self) -> int:
        """Clusters or entities that `cluster_ids` number; 0 without."""
        return self._clusters.clusters if self._clusters else 0

    @property
    def box_names(self) -> tuple[str, ...]:
        """Classes that `box_labels` number; empty without data.boxes.labels."""
        return self.config.boxes.names if self.config.boxes else ()

    def _sampler(self) -> Sampler | None:
        choice, labels = self.config.sampler, self.config.labels
        clusters = self._clusters if choice and choice.by == "clusters" else None
        numbers = partial(numbers_of_shard, self.shards, labels=labels, clusters=clusters)
        return Sampler(choice, numbers, 4 * self.config.window) if choice else None

    def state_dict(self) -> LoaderState:
        """Position after the batches handed out so far."""
        return {
            "step": self.step,
            "seed": self.plan.seed,
            "batch_size": self.plan.batch_size,
            "partitions": self.plan.partitions,
            "data": self.shards.digest,
            "settings": self._settings,
        }

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue where `state` was taken. Raises ConfigError, showing the difference, if batches would differ."""
        before, now = _flat(state), _flat(self.state_dict())
        different = [
            f"{key}: checkpoint {before.get(key)}, now {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if key != "step" and before.get(key) != now.get(key)
        ]
        if different:
            raise ConfigError("cannot resume, the data is not the same: " + "; ".join(different))
        self.step = state["step"]

    @cached_property
    def _settings(self) -> dict[str, Any]:
        config = self.config
        settings = config.model_dump(mode="json", exclude=FREE)
        if len(self.shards.parts) > 1:
            settings["mixture"] = [part.weight for part in self.shards.parts]
        for name, path in (("keep", config.keep), ("weights", config.weights), ("clusters", config.clusters)):
            settings[name] = sha256_file(path) if path else None
        if config.labels:
            sidecar = config.labels.sidecar
            settings["labels"]["sidecar"] = sha256_file(sidecar) if sidecar else None
            settings["labels"]["names"] = hashlib.sha256(
                repr(sorted(config.labels.numbers.items())).encode()
            ).hexdigest()
        if config.boxes:
            settings["boxes"]["labels"] = hashlib.sha256(repr(config.boxes.names).encode()).hexdigest()
        return settings

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(self.config.threads) as pool, ThreadPoolExecutor(FETCHERS) as fetchers:
            steps = self._announced(count(self.step), fetchers)
            for batch in ahead(lambda: (self.make_batch(step, pool) for step in steps), self.config.prefetch):
                self.settle(self.step)
                self.step += 1
                yield batch

    def batches(self, steps: Iterable[int]) -> Iterator[Batch]:
        """Stage: this rank's part of the given global steps."""
        for step in steps:
            batch = self.make_batch(step)
            self.settle(step)
            yield batch

    def settle(self, step: int) -> None:
        """Enter the samples of a step into the ledger: it was handed out. Batches made ahead are not, until then."""
        epoch = step // self.plan.steps
        for sample_id, error in self._drawn.pop(step):
            if error is None:
                self.ledger.good(self.shards.names[self.shards.original(sample_id)[0]], epoch)
            else:
                self.ledger.bad(error, self.shards.place(sample_id), epoch)
                self.ledger.substituted += 1
        self.ledger.boxes.update(self._boxes.pop(step, {}))
        if self.config.boxes and not self.ledger.boxes["given"] and self.ledger.seen >= min(ENOUGH, self.plan.samples):
            raise PipelineError(
                f"data.boxes: {self.ledger.seen} samples of {self.config.train} carry not one box: shard data with "
                "boxes (COCO annotations, a column of boxes), or leave data.boxes out"
            )

    def _announced(self, steps: Iterable[int], fetchers: ThreadPoolExecutor) -> Iterator[int]:
        """The steps, each after its remote shards and those of the next `read_ahead` steps were ordered."""
        remote = any(shard.fetch for shard in self.shards.shards)
        ordered = -1
        recent: set[int] = set()
        for step in steps:
            if remote:
                for ahead in range(max(step, ordered + 1), step + self.config.read_ahead + 1):
                    wanted = set(self.plan.shards(ahead, self.rows))
                    for number in sorted(wanted - recent):
                        if fetch := self.shards.shards[number].fetch:
                            fetchers.submit(fetch)
                    recent, ordered = wanted, ahead
            yield step

    def make_batch(self, step: int, pool: ThreadPoolExecutor | None = None) -> Batch:
        """This rank's part of global step `step`; `settle` accounts for it."""
        drawn = self.draw(step, pool)
        plain = torch.stack([sample.pixels for sample in drawn.samples])
        views, moves = zip(
            *(self._view(step, view, plain, drawn.rows) for view in range(self.config.views)), strict=True
        )
        boxes: dict[str, Tensor] = {}
        if self.config.boxes:
            boxes, self._boxes[step] = box_fields(drawn.samples, self.config.boxes, moves[0], views[0].shape[-1])
        return Batch(
            keys=tuple(sample.key for sample in drawn.samples),
            pixels=views[0],
            tokens=self.tokenizer(drawn.texts),
            views=views[1:] or None,
            extra_tokens=tuple(self.tokenizer(texts) for texts in drawn.extra_texts) or None,
            phrase_ids=drawn.known,
            text_phrase_ids=drawn.chosen,
            **self.fields(drawn),
            **boxes,
        )

    def _view(self, step: int, view: int, plain_BCHW: Tensor, rows: range) -> tuple[Tensor, Tensor | None]:
        """One augmented view, and where its pixels moved."""
        return traced(
            plain_BCHW,
            self.config.strong if view and self.config.strong else self.config.augment,
            self.plan.generator(step, PICTURES + FURTHER * view),
            total=self.config.batch_size,
            rows=rows,
            side=self.side_at(step),
        )

    def fields(self, drawn: Drawn) -> dict[str, Any]:
        """Labels, clusters, weights and parts of the mixture, as far as the configuration asks for them."""
        found: dict[str, Any] = {}
        if self.config.labels:
            found |= label_fields(drawn.samples, self.config.labels)
        if self._clusters is not None:
            found |= cluster_fields(drawn.samples, self._clusters)
        if self._weights is not None:
            found["weight"] = torch.tensor([self._weights.get(sample.key, 1.0) for sample in drawn.samples])
        if len(self.shards.parts) > 1:
            numbers = [self.shards.part(self.shards.original(sample_id)[0]) for sample_id in drawn.ids]
            found["source_ids"] = torch.tensor(numbers)
        return found

    def draw(self, step: int, pool: ThreadPoolExecutor | None = None) -> Drawn:
        """Fetch the samples of a step and choose their texts. Raises PipelineError when too many are unusable."""
        ids = self.plan.batch(step, self.rows).tolist()
        found = list(pool.map(self.fetch, ids) if pool else map(self.fetch, ids))
        self._drawn[step] = [
            (sample_id, item if isinstance(item, BadSample) else None)
            for sample_id, item in zip(ids, found, strict=True)
        ]
        samples = []
        for place, item in enumerate(found):
            if isinstance(item, BadSample):
                ids[place], item = self._substitute(step, self.rows.start + place)
            samples.append(item)
        rows = range(self.rows.start, self.rows.stop)
        first, *others = [
            draw_texts(
                samples,
                rows,
                self.config.batch_size,
                self.config.captions,
                lambda purpose, number=number: self.plan.generator(step, purpose + FURTHER * number),  # type: ignore[misc]
                further=number > 0,
            )
            for number in range(self.config.texts)
        ]
        return Drawn(
            ids=ids,
            rows=rows,
            samples=samples,
            texts=first.texts,
            extra_texts=[other.texts for other in others],
            known=torch.from_numpy(pad_ids(first.known, KNOWN)),
            chosen=torch.from_numpy(pad_ids(first.phrases, self.config.captions.max_labels + 1)),
        )

    def _substitute(self, step: int, row: int) -> tuple[int, Decoded]:
        """A usable sample for the place of an unusable one, so that all ranks hold equally many."""
        for attempt in range(self.ledger.max_in_a_row):
            sample_id = self.plan.substitute(step, row, attempt)
            item = self.fetch(sample_id)
            if isinstance(item, Decoded):
                return sample_id, item
        raise PipelineError(
            f"row {row} of step {step}: {self.ledger.max_in_a_row} samples in a row could not be used; "
            f"the last: {item}: mend the shards"
        )

    def fetch(self, sample_id: int) -> Decoded | BadSample:
        """One decoded sample, from the cache if it is there; the error instead if it cannot be used."""
        original = self.shards.original(sample_id)
        cached = self._cache.get(original)
        if cached is not None:
            return cached
        try:
            sample = decode(
                self.shards.read(sample_id),
                self.config.image,
                self.config.max_pixels,
                self._columns,
                boxes=self.config.boxes is not None,
            )
        except BadSample as error:
            return error
        if self._labels is not None:
            sample = replace(sample, labels=self._labels.find_texts(sample.key))
        size = sample.pixels.nbytes
        if self._cached_bytes + size <= self.config.cache_mb << 20:
            self._cache[original] = sample
            self._cached_bytes += size
        return sample


def make_loader(config: DataConfig, tokenizer: Tokenizer, seed: int, rank: int = 0, world: int = 1) -> Loader:
    """The loader of a recipe's training data."""
    return Loader(config, tokenizer, seed, rank, world)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}".removeprefix("settings.")] = value
    return flat
