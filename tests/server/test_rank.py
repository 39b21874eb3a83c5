"""Fusing, combining and spreading hits, against values worked out by hand and a slow reference."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from server.index import Hit
from server.index.rank import Ranked, combine, fuse, spread


def unit(*numbers: float) -> NDArray[np.float32]:
    row = np.array(numbers, np.float32)
    found: NDArray[np.float32] = row / np.linalg.norm(row)
    return found


def test_queries_add_up_with_their_weights() -> None:
    """2 x (1, 0) - 1 x (0, 1) = (2, -1), of length sqrt(5)."""
    row = combine([unit(1, 0), unit(0, 1)], [2, -1])
    np.testing.assert_allclose(row, np.array([2, -1]) / np.sqrt(5), rtol=1e-6)
    np.testing.assert_array_equal(combine([unit(3, 4)], [0.001]), unit(3, 4))
    for weights in ([1, -1], [1e-9, -1e-9]):
        with pytest.raises(ValueError, match="cancel"):
            combine([unit(3, 4), unit(3, 4)], weights)


def test_fusion_by_hand() -> None:
    """near: a, b; words: b, c. With share 0.75: a = .75/61, b = .75/62 + .25/61, c = .25/62."""
    a, b, c = (Hit(n, s, {}, v) for n, s, v in ((1, 0.9, unit(1, 0)), (2, 0.8, unit(1, 1)), (3, 7.0, unit(0, 1))))
    worded = [Hit(2, 9.0, {}, b.vector), c]
    found = fuse([a, b], worded, unit(1, 0), 0.75)
    assert [item.hit.id for item in found] == [2, 1, 3]
    np.testing.assert_allclose([item.score for item in found], [0.75 / 62 + 0.25 / 61, 0.75 / 61, 0.25 / 62])
    np.testing.assert_allclose([item.cosine or 0.0 for item in found], [np.sqrt(0.5), 1, 0], atol=1e-6)
    assert [item.bm25 for item in found] == [9.0, None, 7.0]
    assert [item.hit.id for item in fuse([a, b], worded, unit(1, 0), 0.75, threshold=0.5)] == [2, 1]
    assert [item.hit.id for item in fuse([a, b], worded, unit(1, 0), 1.0)] == [1, 2]
    assert [item.hit.id for item in fuse([a, b], worded, unit(1, 0), 0.0)] == [2, 3]


def slow_spread(found: list[Ranked], limit: int, diversity: float) -> list[Any]:
    """The definition, one candidate at a time."""
    scores = [item.score for item in found]
    low, high = min(scores), max(scores)
    left, chosen = list(found), list[Ranked]()
    while left and len(chosen) < limit:

        def marginal(item: Ranked) -> float:
            relevance = (item.score - low) / (high - low) if high > low else 1.0
            rows = [other.hit.vector for other in chosen]
            near = max((float(np.dot(item.hit.vector, row)) for row in rows if row is not None), default=0.0)  # type: ignore[arg-type]
            return (1 - diversity) * relevance - diversity * near

        best = max(left, key=marginal)
        left.remove(best)
        chosen.append(best)
    return [item.hit.id for item in chosen]


@pytest.mark.parametrize("diversity", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_spreading_equals_the_definition(diversity: float) -> None:
    rng = np.random.default_rng(3)
    query = unit(*rng.standard_normal(8))
    rows = [unit(*(query + 0.7 * rng.standard_normal(8))) for _ in range(40)]
    hits = sorted((Hit(n, float(row @ query), {}, row) for n, row in enumerate(rows)), key=lambda hit: -hit.score)
    found = [Ranked(hit, hit.score, hit.score) for hit in hits]
    for limit in (1, 10, 99):
        chosen = [item.hit.id for item in spread(found, limit, diversity)]
        assert chosen == slow_spread(found, limit, diversity)
        assert len(set(chosen)) == min(limit, 40)
    if diversity == 0:
        assert chosen == [hit.id for hit in hits]
    assert spread([], 5, diversity) == []
