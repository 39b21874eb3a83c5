"""Samplers: who shares a batch with whom, by labels or clusters, without giving up any property of the plan."""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines.errors import ConfigError
from data_pipelines.loader import DataConfig, Loader
from data_pipelines.plan import Part, Plan, rank_slice
from data_pipelines.sampler import Numbers, Places, Sampler, SamplerConfig
from data_pipelines.sidecar import CLUSTERS, write_sidecar
from data_pipelines.tokens import Tokenizer, learn_tokenizer

Labels = Sequence[Sequence[int]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn_tokenizer(["red apple", "face", "tool", "animal"], vocab_size=400, context_length=16)


def random_labels(sizes: Sequence[int], classes: int, most: int = 1, seed: int = 0) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        [rng.choice(classes, rng.integers(most + 1) if most > 1 else 1, replace=False).tolist() for _ in range(size)]
        for size in sizes
    ]


def make_plan(
    labels: Sequence[Labels],
    name: str,
    k: int = 2,
    batch: int = 8,
    window: int = 16,
    partitions: int = 1,
    seed: int = 3,
) -> Plan:
    config = SamplerConfig.model_validate({"name": name, "k": k})
    sampler = Sampler(config, lambda shard: Numbers.of(labels[shard]), 64)
    return Plan([len(rows) for rows in labels], batch, 3, window, partitions, sampler=sampler)


def runs_of(plan: Plan, labels: Sequence[Labels], step: int, k: int) -> list[list[set[int]]]:
    """The label sets of every k rows of a step."""
    flat = [set(row) for rows in labels for row in rows]
    ids = plan.batch(step).tolist()
    return [[flat[i] for i in ids[at : at + k]] for at in range(0, len(ids), k)]


@pytest.mark.parametrize(("window", "partitions", "k"), [(16, 1, 2), (2, 1, 2), (1, 2, 4), (3, 4, 2), (16, 4, 2)])
@pytest.mark.parametrize("most", [1, 3])
def test_a_paired_epoch_holds_every_sample_once(window: int, partitions: int, k: int, most: int) -> None:
    labels = random_labels((13, 7, 29, 31), 5, most)
    plan = make_plan(labels, "label_paired", k, 16, window, partitions)
    for epoch in range(3):
        ids = np.concatenate([plan.batch(epoch * plan.steps + step) for step in range(plan.steps)])
        assert len(set(ids.tolist())) == len(ids) == plan.steps * 16


def test_pairs_share_a_label_and_a_batch() -> None:
    """Three classes of 20, 14 and 6: all even, so every sample finds a partner, in runs of two rows of a batch."""
    labels = [[[0]] * 20, [[1]] * 14 + [[2]] * 6]
    plan = make_plan(labels, "label_paired")
    for step in range(3 * plan.steps):
        assert all(set.intersection(*run) for run in runs_of(plan, labels, step, 2))


def test_odd_ones_are_few_and_unlabelled_samples_stay() -> None:
    """Seven samples of class 0, eight of class 1, five without: 3 + 4 pairs of 10 runs, six samples left over."""
    labels = [[[0]] * 7 + [[1]] * 8 + [[]] * 5]
    plan = make_plan(labels, "label_paired", batch=20)
    runs = runs_of(plan, labels, 0, 2)
    assert sum(bool(set.intersection(*run)) for run in runs) == 7
    assert sorted(plan.batch(0).tolist()) == list(range(20))


def test_larger_runs_fill_up_with_smaller_groups() -> None:
    """k = 4, classes of 6 and 2: one run of four, then two pairs in one run; nobody is alone."""
    labels = [[[0]] * 6 + [[1]] * 2]
    runs = runs_of(make_plan(labels, "label_paired", 4), labels, 0, 4)
    assert sorted(sorted(next(iter(found)) for found in run) for run in runs) == [[0, 0, 0, 0], [0, 0, 1, 1]]


def test_samples_of_several_labels_are_paired_by_any_of_them() -> None:
    labels = random_labels((400,), 12, most=3)
    plan = make_plan(labels, "label_paired", batch=40)
    runs = [run for step in range(plan.steps) for run in runs_of(plan, labels, step, 2)]
    known = sum(all(run) for run in runs)
    assert sum(bool(set.intersection(*run)) for run in runs) > 0.95 * known


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("name", ["label_paired", "class_balanced"])
def test_pairs_survive_windows_and_partitions_of_odd_sizes(name: str, most: int) -> None:
    """Windows begin in the middle of a run and partitions in the middle of a window: at most k - 1 rows at each such
    end are without partner."""
    labels = random_labels((101, 57, 83, 90, 66, 71), 3, most, seed=1)
    plan = make_plan(labels, name, 2, 12, window=2, partitions=3)
    runs = [run for step in range(plan.steps) for run in runs_of(plan, labels, step, 2) if all(run)]
    broken = sum(not set.intersection(*run) for run in runs)
    assert broken <= 2 * 3 + 3 + 6, "windows, partitions and the odd ones of each class"


def test_balanced_classes_come_equally_often_in_every_batch() -> None:
    """Classes of 91, 8 and 1 samples: a batch of 12 holds four of each, in pairs."""
    labels = [[[0]] * 91 + [[1]] * 8 + [[2]]]
    plan = make_plan(labels, "class_balanced", batch=12)
    for step in range(plan.steps):
        runs = runs_of(plan, labels, step, 2)
        assert Counter(min(run[0]) for run in runs) == {0: 2, 1: 2, 2: 2}
        assert all(run[0] == run[1] for run in runs)
    seen = Counter(sample for step in range(plan.steps) for sample in plan.batch(step).tolist())
    rare = [seen[sample] for sample in range(91, 99)]
    assert max(rare) - min(rare) <= 1, "the members of a class take turns"
    assert max(seen[sample] for sample in range(91)) == 1
    assert seen[99] == 32


def test_frequent_classes_show_other_members_in_other_epochs() -> None:
    labels = [[[0]] * 60 + [[1]] * 4]
    plan = make_plan(labels, "class_balanced", batch=16)
    epochs = [{i for s in range(4) for i in plan.batch(4 * epoch + s).tolist() if i < 60} for epoch in range(8)]
    assert all(len(epoch) == 32 for epoch in epochs)
    assert len(set.union(*epochs)) > 55


def test_samples_without_a_class_keep_their_share() -> None:
    labels = [[[0]] * 40 + [[1]] * 10 + [[]] * 50]
    plan = make_plan(labels, "class_balanced", batch=20)
    seen = Counter(sample for step in range(plan.steps) for sample in plan.batch(step).tolist())
    assert sum(seen[sample] for sample in range(50, 100)) == 50
    assert max(seen[sample] for sample in range(50, 100)) == 1
    empty = make_plan([[[]] * 30], "class_balanced", batch=10)
    assert sorted(np.concatenate([empty.batch(step) for step in range(3)]).tolist()) == list(range(30))


def test_a_run_of_a_small_class_repeats_and_a_large_one_never() -> None:
    labels = [[[0]] * 11 + [[1]] * 3]
    plan = make_plan(labels, "class_balanced", k=4, batch=8)
    for step in range(20):
        ids = plan.batch(step).reshape(-1, 4)
        assert all(len(set(run.tolist())) == (4 if run[0] < 11 else 3) for run in ids)


@pytest.mark.parametrize("name", ["label_paired", "class_balanced"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_sampled_batch_without_gap_or_overlap(name: str, world: int) -> None:
    labels = random_labels((40, 13, 25), 6, 2)
    plan, again = (make_plan(labels, name, 2, 8, partitions=2) for _ in range(2))
    for step in (11, 0, 7, 3):
        parts = [again.batch(step, rank_slice(8, rank, world)) for rank in range(world)]
        assert np.concatenate(parts).tolist() == plan.batch(step).tolist()


def test_places_count_from_the_beginning_of_their_partition() -> None:
    """A window of 10 that begins 3 places into a partition, with another one beginning at 5, in runs of two: the first
    partition's runs are at 1 and 3, those of the second at 5 and 7."""
    places = Places.cut(10, [-3, 5], 2)
    assert places.runs.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert places.single.tolist() == [0, 9]
    assert Places.cut(1, [0], 2).runs.shape == (0, 2)


def test_impossible_samplers_are_refused() -> None:
    with pytest.raises(ConfigError, match="k=1: label_paired needs at least 2"):
        SamplerConfig(name="label_paired", k=1)
    with pytest.raises(ConfigError, match="k=3 must divide the 8 rows"):
        make_plan([[[0]] * 20], "label_paired", k=3)
    sampler = Sampler(SamplerConfig(name="label_paired"), lambda shard: Numbers.of([[0]] * 8), 4)
    with pytest.raises(ConfigError, match="not a mixture"):
        Plan((8, 8), 4, parts=[Part(1), Part(1)], sampler=sampler)
    with pytest.raises(ConfigError, match=r"data\.sampler and data\.group_by_length=4"):
        Plan((8, 8), 4, sampler=sampler, lengths=lambda shard: np.zeros(8, np.int64), group=4)


def load(folder: Path, tokenizer: Tokenizer, **changes: object) -> Loader:
    settings = {"train": folder, "batch_size": 32, "image": {"size": 16, "resize": "longest"}}
    return Loader(DataConfig.model_validate({**settings, **changes}), tokenizer, seed=0)


def test_batches_of_real_shards_are_paired_by_what_they_show(starter_shards: Path, tokenizer: Tokenizer) -> None:
    folder = starter_shards / "val"
    first = [sample.labels[0] for sample in load(folder, tokenizer).draw(0).samples]
    names = tuple(sorted(set(first)))
    loader = load(folder, tokenizer, labels={"names": names}, sampler={"name": "label_paired"})
    ids = [batch.require("label_ids", "test").view(-1, 2) for batch in itertools.islice(loader, loader.plan.steps)]
    alike = [bool(pair[0] == pair[1]) for pairs in ids for pair in pairs if (pair >= 0).all()]
    assert np.mean(alike) > 0.9
    assert loader.classes == len(names)
    several = load(folder, tokenizer, labels={"names": names, "multi": True}, sampler={"name": "label_paired"})
    rows = [batch.require("multi_labels", "test").view(16, 2, -1) for batch in itertools.islice(several, 3)]
    assert np.mean([bool((pair[0] & pair[1]).any()) for pairs in rows for pair in pairs if pair.any(1).all()]) > 0.9


def test_a_sampler_by_clusters_reads_the_sidecar(starter_shards: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = starter_shards / "val"
    plain = load(folder, tokenizer)
    keys = [str(key) for shard in range(len(plain.shards.shards)) for key in plain.shards.column(shard, "key")]
    table = pa.table({"key": keys, CLUSTERS: [[number % 7] for number in range(len(keys))]})
    write_sidecar(tmp_path / "c.parquet", [table], {"clusters": 9})
    changes = {"clusters": tmp_path / "c.parquet", "sampler": {"name": "class_balanced", "by": "clusters", "k": 4}}
    loader = load(folder, tokenizer, **changes)
    batch = next(iter(loader))
    found = batch.require("cluster_ids", "test").view(-1, 4)
    assert (found == found[:, :1]).all()
    assert set(found[:, 0].tolist()) == set(range(7))
    assert loader.clusters == 9
    with pytest.raises(ConfigError, match="sampler.name: checkpoint class_balanced, now None"):
        load(folder, tokenizer, clusters=tmp_path / "c.parquet").load_state_dict(loader.state_dict())
    with pytest.raises(ConfigError, match=r"data\.sampler\.by=labels needs data\.labels"):
        load(folder, tokenizer, sampler={"name": "label_paired"})
