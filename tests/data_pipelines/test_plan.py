"""The order of samples is arithmetic: complete, seeded, independent of ranks."""

import numpy as np
import pytest

from data_pipelines.errors import ConfigError
from data_pipelines.plan import Plan, rank_slice


@pytest.mark.parametrize(
    ("sizes", "batch", "window"), [((5, 3, 4), 4, 2), ((1,), 1, 1), ((7, 0, 9, 2), 5, 16), ((100,), 7, 3)]
)
def test_every_epoch_holds_every_sample_once(sizes: tuple[int, ...], batch: int, window: int) -> None:
    plan = Plan(sizes, batch, seed=3, window=window, drop_last=False)
    for epoch in range(3):
        steps = range(epoch * plan.steps, (epoch + 1) * plan.steps)
        ids = np.concatenate([plan.batch(step) for step in steps])
        assert sorted(ids.tolist()) == list(range(sum(sizes)))


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


def test_unshuffled_plan_keeps_stored_order() -> None:
    plan = Plan((3, 4), 3, shuffle=False, drop_last=False)
    assert [plan.batch(step).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_share_a_global_batch_without_gap_or_overlap(world: int) -> None:
    ids = Plan((40,), 10, seed=5).batch(1)
    parts = [ids[rank_slice(ids, rank, world)] for rank in range(world)]
    assert np.concatenate(parts).tolist() == ids.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_random_numbers_of_a_step_do_not_depend_on_anything_else() -> None:
    plan = Plan((40,), 10, seed=5)
    assert plan.generator(3, 1).random() == Plan((40,), 10, seed=5).generator(3, 1).random()
    assert plan.generator(3, 1).random() != plan.generator(3, 2).random()
    assert plan.generator(3, 1).random() != plan.generator(4, 1).random()


@pytest.mark.parametrize(
    ("sizes", "batch", "word"), [((), 4, "no sample"), ((3,), 4, "smaller|less"), ((3,), 0, "at least 1")]
)
def test_impossible_plans_are_refused(sizes: tuple[int, ...], batch: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Plan(sizes, batch)
