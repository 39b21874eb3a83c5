"""The order of samples is arithmetic: complete, seeded, independent of ranks, cheap for any size."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import ConfigError
from data_pipelines.plan import CYCLE, Part, Plan, rank_slice


def epoch_ids(plan: Plan, epoch: int = 0) -> list[int]:
    ids: list[int] = np.concatenate([plan.batch(epoch * plan.steps + step) for step in range(plan.steps)]).tolist()
    return ids


@pytest.mark.parametrize(
    ("sizes", "batch", "window", "partitions"),
    [((5, 3, 4), 4, 2, 1), ((1,), 1, 1, 1), ((7, 0, 9, 2), 6, 16, 3), ((100,), 10, 3, 5), ((30, 1, 29), 6, 2, 2)],
)
def test_every_epoch_holds_every_sample_once(sizes: tuple[int, ...], batch: int, window: int, partitions: int) -> None:
    assert sum(sizes) % batch == 0, "so that nothing is left over"
    plan = Plan(sizes, batch, seed=3, window=window, partitions=partitions)
    assert all(sorted(epoch_ids(plan, epoch)) == list(range(sum(sizes))) for epoch in range(3))


def test_an_incomplete_last_batch_is_left_out_and_nothing_twice() -> None:
    plan = Plan((7, 9, 7), 4, partitions=2)
    assert plan.steps == 5
    assert len(set(epoch_ids(plan))) == 20


def test_order_depends_on_seed_and_epoch_only() -> None:
    plan = Plan((50, 50), 10, seed=1)
    again = Plan((50, 50), 10, seed=1)
    assert [plan.batch(step).tolist() for step in (0, 7, 23)] == [again.batch(step).tolist() for step in (0, 7, 23)]
    assert plan.batch(0).tolist() != Plan((50, 50), 10, seed=2).batch(0).tolist()
    assert plan.batch(0).tolist() != plan.batch(plan.steps).tolist()


def test_samples_mix_inside_a_window_of_shards_only() -> None:
    plan = Plan((10,) * 8, 10, seed=0, window=2)
    shards = [set((plan.batch(step) // 10).tolist()) for step in range(plan.steps)]
    assert all(len(found) <= 2 for found in shards)
    assert any(len(found) == 2 for found in shards), "windows of two shards should mix them"
    assert [plan.shards(step) for step in range(plan.steps)] == [sorted(found) for found in shards]


def test_ranks_read_only_the_shards_of_their_partitions() -> None:
    plan = Plan((10,) * 16, 8, seed=4, window=1, partitions=4)
    mine = [{s for step in range(plan.steps) for s in plan.shards(step, rank_slice(8, rank, 4))} for rank in range(4)]
    assert all(len(found) == 4 for found in mine)
    assert set.union(*mine) == set(range(16))


@pytest.mark.parametrize("partitions", [1, 2, 5])
@pytest.mark.parametrize("world", [1, 2, 5, 10])
def test_ranks_share_a_global_batch_without_gap_or_overlap(world: int, partitions: int) -> None:
    plan = Plan((40, 13), 10, seed=5, partitions=partitions)
    for step in (0, 3, 7, 12):
        parts = [plan.batch(step, rank_slice(10, rank, world)) for rank in range(world)]
        assert np.concatenate(parts).tolist() == plan.batch(step).tolist()
        assert {len(part) for part in parts} == {10 // world}, "equal steps and equal batches on every rank"


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.batch_size=32.*3 ranks"):
        rank_slice(32, 0, 3)


def test_random_numbers_of_a_step_do_not_depend_on_anything_else() -> None:
    plan = Plan((40,), 10, seed=5)
    assert plan.generator(3, 1).random() == Plan((40,), 10, seed=5).generator(3, 1).random()
    assert plan.generator(3, 1).random() != plan.generator(3, 2).random()
    assert plan.generator(3, 1).random() != plan.generator(4, 1).random()


def test_a_substitute_comes_from_the_window_of_the_lost_sample() -> None:
    plan = Plan((10,) * 8, 8, seed=2, window=1, partitions=2)
    for row in range(8):
        lost = plan.batch(3)[row] // 10
        found = {plan.substitute(3, row, attempt) for attempt in range(40)}
        assert len(found) > 5
        assert {sample // 10 for sample in found} == {lost}


@pytest.mark.parametrize("partitions", [1, 4])
def test_a_mixture_keeps_its_weights_and_uses_every_sample_equally_often(partitions: int) -> None:
    sizes = (40, 20, 12, 8)
    parts = [Part(2, 3.0), Part(1, 1.0), Part(1, 0.5)]
    plan = Plan(sizes, 16, 1, 16, partitions, parts)
    bounds = np.cumsum([0, 60, 12, 8])
    counts = np.zeros((3, 80), dtype=int)
    for step in range(200):
        ids = plan.batch(step)
        shares = np.histogram(ids, bounds)[0] / 16
        assert np.abs(shares - np.array([3, 1, 0.5]) / 4.5).max() < (partitions + 0.5) / 16, "even spread"
        for part in range(3):
            inside = ids[(ids >= bounds[part]) & (ids < bounds[part + 1])]
            np.add.at(counts[part], inside, 1)
    totals = counts.sum(axis=1)
    np.testing.assert_allclose(totals / totals.sum(), np.array([3, 1, 0.5]) / 4.5, atol=2e-3)
    for part in range(3):
        times = counts[part, bounds[part] : bounds[part + 1]]
        assert times.min() >= 1
        assert times.max() - times.min() <= partitions + 1, "epochs of each part are complete"
    assert np.array_equal(plan.batch(5000), Plan(sizes, 16, 1, 16, partitions, parts).batch(5000))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, 0.1 / CYCLE)])
def test_impossible_weights_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        Plan((10, 10), 4, parts=[Part(1, weight) for weight in weights])


def test_texts_of_similar_length_share_a_batch_and_none_is_lost() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, (4, 64))
    settings = {"seed": 3, "window": 2, "lengths": lambda shard: lengths[shard]}
    plain, grouped = Plan((64,) * 4, 16, **settings), Plan((64,) * 4, 16, group=8, **settings)  # type: ignore[arg-type]
    assert sorted(epoch_ids(grouped)) == sorted(epoch_ids(plain))

    def spread(plan: Plan) -> float:
        return float(np.mean([np.ptp(lengths.ravel()[plan.batch(step)]) for step in range(plan.steps)]))

    assert spread(grouped) < spread(plain) / 4
    medians = [np.median(lengths.ravel()[grouped.batch(step)]) for step in range(8)]
    assert medians != sorted(medians), "batches of a window come in a drawn order"


@pytest.mark.parametrize(
    ("sizes", "batch", "partitions", "word"),
    [((), 4, 1, "no sample"), ((3,), 4, 1, "use less"), ((3,), 0, 1, "at least 1"), ((9,), 8, 3, "divide")],
)
def test_impossible_plans_are_refused(sizes: tuple[int, ...], batch: int, partitions: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Plan(sizes, batch, partitions=partitions)


PLAN_BIG = """
import sys
from pathlib import Path
from data_pipelines.plan import Plan, rank_slice
from data_pipelines.records import load_manifest
plan = Plan([shard.samples for shard in load_manifest(Path(sys.argv[1])).shards], 4096, seed=1, partitions=8)
ids = [plan.batch(step, rank_slice(4096, 3, 8)) for step in range(0, plan.steps, max(1, plan.steps // 40))]
assert len(set(ids[-1].tolist())) == 512
status = Path("/proc/self/status").read_text()
peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
print(plan.samples, peak, "torch" in sys.modules)
"""


@pytest.mark.parametrize(("shards", "limit_mb"), [(100, 200), (40_000, 300)])
def test_millions_of_samples_are_planned_in_little_memory(tmp_path: Path, shards: int, limit_mb: int) -> None:
    """1 million samples in 100 shards, 400 million in 40,000; peak memory of the whole process."""
    infos = [{"name": f"{n:05}.tar", "samples": 10_000, "bytes": 1, "sha256": f"{n:064x}"} for n in range(shards)]
    manifest = {
        "kind": "folder", "source_digest": "", "records": shards * 10_000, "samples": shards * 10_000, "failures": {},
        "sources": {}, "licences": {}, "options": {}, "shards": infos,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run([sys.executable, "-c", PLAN_BIG, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    samples, kilobytes, torch = done.stdout.split()
    assert int(samples) == shards * 10_000
    assert int(kilobytes) < limit_mb * 1000
    assert torch == "False"


SET_BIG = """
import sys
from pathlib import Path
from data_pipelines.plan import Plan, rank_slice
from data_pipelines.shard_set import ShardSet
shards = ShardSet(sys.argv[1])
plan = Plan(shards.sizes, 4096, seed=1, partitions=8)
ids = [plan.batch(step, rank_slice(4096, 3, 8)) for step in range(0, plan.steps, 2000)]
assert all(len({shards.original(number) for number in row.tolist()}) == 512 for row in ids)
status = Path("/proc/self/status").read_text()
peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
print(len(shards), peak, "torch" in sys.modules)
"""


@pytest.mark.slow
def test_400_million_samples_on_disk_are_numbered_in_little_memory(tmp_path: Path) -> None:
    """The whole reading side of one rank, before it opens a shard; the 40,000 files are sparse."""
    infos = [{"name": f"{n:05}.tar", "samples": 10_000, "bytes": 10**9, "sha256": f"{n:064x}"} for n in range(40_000)]
    for info in infos:
        with (tmp_path / str(info["name"])).open("wb") as handle:
            handle.truncate(10**9)
    manifest = {
        "kind": "folder", "source_digest": "", "records": 4 * 10**8, "samples": 4 * 10**8, "failures": {},
        "sources": {}, "licences": {}, "options": {}, "shards": infos,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run([sys.executable, "-c", SET_BIG, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    samples, kilobytes, torch = done.stdout.split()
    assert int(samples) == 4 * 10**8
    assert int(kilobytes) < 300_000
    assert torch == "False"
