"""Local densities: by hand on a line of points, and against a slow search."""

import math

import pytest
import torch
import torch.nn.functional as F

from vlp.backdoor.density import MEASURES, Neighbours, densities, dimensionality, near, refer


def arc(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane."""
    angle_N = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angle_N.cos(), angle_N.sin()], dim=1)


def test_neighbours_equal_a_slow_search_and_leave_out_the_sample_itself() -> None:
    all_ND = F.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    number_R = torch.arange(0, 60, 3)
    reference = refer(all_ND[number_R], number_R, 4)
    found = near(all_ND, torch.arange(60), reference)
    for row in range(60):
        slow = sorted((float((all_ND[row] - all_ND[n]).norm()), n) for n in number_R.tolist() if n != row)[:4]
        assert found.distance_NK[row].tolist() == pytest.approx([distance for distance, _ in slow], abs=1e-3)
        assert number_R[found.row_NK[row]].tolist() == [n for _, n in slow]


def test_dimensionality_by_hand() -> None:
    """Distances 1, 2, 4: the mean logarithm of the ratios to 4 is (-2 - 1 - 0) ln 2 / 3 = -ln 2, so 1 / ln 2."""
    assert dimensionality(torch.tensor([[1.0, 2.0, 4.0]])).item() == pytest.approx(1 / math.log(2))


def test_measures_by_hand() -> None:
    """Own reach 6; two neighbours of reach 2 and 3 and dimensionality 1 and 2.

    SLOF = (6/2 + 6/3) / 2 = 2.5. DAO = (3^1 + 2^2) / 2 = 3.5, of which the logarithm is given.
    """
    reference = refer(arc(0, 1, 2, 3), torch.arange(4), 2)
    reference.reach_R[:2] = torch.tensor([2.0, 3.0])
    reference.dimension_R[:2] = torch.tensor([1.0, 2.0])
    found = Neighbours(torch.tensor([[5.0, 6.0]]), torch.tensor([[0, 1]]))
    values = {name: measure(found, reference).item() for name, measure in MEASURES.items()}
    assert values == pytest.approx({"k-distance": 6.0, "slof": 2.5, "dao": math.log(3.5)}, rel=1e-5)


def test_a_small_group_far_off_is_found_although_its_members_are_near_each_other() -> None:
    """200 directions on an arc and a knot of 12 beyond it: all measures rank the knot above 95 % of the others."""
    bulk = arc(*torch.linspace(0, 90, 200).tolist())
    all_ND = torch.cat([bulk, arc(*torch.linspace(150, 150.5, 12).tolist())])
    chooser = torch.Generator().manual_seed(0)
    number_R = torch.randperm(212, generator=chooser)[:100].sort().values
    found = densities([(all_ND, torch.arange(212))], refer(all_ND[number_R], number_R, 16), MEASURES)
    for name in ("k-distance", "slof"):
        assert found[name][200:].min() > found[name][:200].quantile(0.95), name
