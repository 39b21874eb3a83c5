"""Which point answers for which box: small grids by hand, and the rule written as loops."""

import math

import pytest
import torch
from torch import Tensor

from vlp.detection.targets import NONE, REACH, assign_points, centreness, match_regions, points_of, to_boxes, to_ltrb

YES = torch.ones(1, 1, dtype=torch.bool)


def one_box(*sides: float) -> Tensor:
    return torch.tensor([[sides]])


def test_points_lie_in_the_middle_of_their_cells() -> None:
    """Two rows of four columns, then one cell: eight points row by row and one in the middle of the picture."""
    points = points_of([(2, 4), (1, 1)])
    assert points.centres_P2[:5].tolist() == [[0.125, 0.25], [0.375, 0.25], [0.625, 0.25], [0.875, 0.25], [0.125, 0.75]]
    assert points.centres_P2[8].tolist() == [0.5, 0.5]
    assert points.grid_P2[[0, 8]].tolist() == [[4, 2], [1, 1]]
    assert points.level_P.tolist() == [0] * 8 + [1]


def test_distances_by_hand_and_back() -> None:
    """On 4 x 4 cells the point of column 1, row 1 is at (0.375, 0.375); to (0.25, 0, 0.75, 1): half a cell to the left,
    1.5 up, 1.5 right, 2.5 down."""
    points = points_of([(4, 4)])
    box = one_box(0.25, 0.0, 0.75, 1.0)
    ltrb = to_ltrb(points, box)[0, 5, 0]
    assert ltrb.tolist() == [0.5, 1.5, 1.5, 2.5]
    every = to_ltrb(points, box)[:, :, 0]
    torch.testing.assert_close(to_boxes(points, every), box.expand(1, 16, 4))


def test_centreness_by_hand() -> None:
    """In the middle 1; a quarter of the way across, 1 to 3: sqrt(1/3); on both axes: 1/3; on a side 0."""
    rows = torch.tensor([[2.0, 2, 2, 2], [1, 2, 3, 2], [1, 1, 3, 3], [0, 2, 4, 2]])
    torch.testing.assert_close(centreness(rows), torch.tensor([1, math.sqrt(1 / 3), 1 / 3, 0]))


def test_assignment_by_hand() -> None:
    """4 x 4 cells, a box over the columns 1 and 2 and the rows 0 to 2: six points lie in it, its middle is at
    (2, 1.5) cells. Within one cell of it are the points of rows 1 (0 away) and of rows 0 and 2 (1 away)."""
    points = points_of([(4, 4)])
    box = one_box(0.25, 0.0, 0.75, 0.75)
    for radius, expected in ((None, [1, 2, 5, 6, 9, 10]), (1.0, [1, 2, 5, 6, 9, 10]), (0.6, [5, 6])):
        targets = assign_points(points, box, YES, radius)
        assert targets.box_BP[0].ge(0).nonzero()[:, 0].tolist() == expected
        assert targets.inside_BP[0].nonzero()[:, 0].tolist() == [1, 2, 5, 6, 9, 10]
    assert targets.ltrb_BP4[0, 5].tolist() == [0.5, 1.5, 1.5, 1.5]
    assert targets.centreness_BP[0, 5] == pytest.approx(math.sqrt(1 / 3))
    assert targets.ltrb_BP4[0, 0].tolist() == [0, 0, 0, 0]
    assert targets.centreness_BP[0, 0] == 0


def test_the_size_of_a_box_decides_its_level() -> None:
    """Levels of 64, 32 and 16 cells, a box of 14, 7 and 3.5 cells: from the points beside its middle 7.5 to the
    farthest side on the first level, which has it; points farther out, of more than REACH, leave it to the second. The
    whole picture reaches 32.5, 16.5 and 8.5 cells: the third level's alone, which has all that is large."""
    points = points_of([(64, 64), (32, 32), (16, 16)])
    small = assign_points(points, one_box(25 / 64, 25 / 64, 39 / 64, 39 / 64), YES, None)
    own = small.box_BP[0] == 0
    far = small.ltrb_BP4.amax(dim=-1)[0]
    assert points.level_P[own].unique().tolist() == [0, 1]
    assert far[own & (points.level_P == 0)].unique().tolist() == [7.5]
    assert far[own & (points.level_P == 1)].min() > REACH / 2
    whole = assign_points(points, one_box(0.0, 0.0, 1.0, 1.0), YES, None)
    assert points.level_P[whole.box_BP[0] == 0].unique().tolist() == [2]


def test_of_several_boxes_the_smallest_counts() -> None:
    points = points_of([(4, 4)])
    boxes = torch.tensor([[[0.0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75], [0.25, 0.25, 0.75, 0.75]]])
    targets = assign_points(points, boxes, torch.ones(1, 3, dtype=torch.bool), None)
    assert targets.box_BP.view(4, 4).tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "sides", [(0.5, 0.1, 0.5, 0.9), (0.9, 0.9, 0.1, 0.1), (0.2, 0.2, float("nan"), 0.9), (1.5, 1.5, 2.0, 2.0)]
)
def test_no_point_answers_for_what_is_no_box(sides: tuple[float, ...]) -> None:
    """A line, a box turned inside out, one that is not a number, one outside of the picture."""
    targets = assign_points(points_of([(8, 8), (4, 4)]), one_box(*sides), YES)
    assert targets.box_BP.eq(NONE).all()
    assert not targets.inside_BP.any()
    assert targets.ltrb_BP4.eq(0).all()


def test_pictures_without_boxes() -> None:
    points = points_of([(4, 4), (2, 2)])
    masked = assign_points(points, one_box(0.0, 0.0, 1.0, 1.0), ~YES)
    empty = assign_points(points, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
    for targets in (masked, empty):
        assert targets.box_BP.eq(NONE).all()
        assert targets.ltrb_BP4.shape == (*targets.box_BP.shape, 4)
    assert match_regions(torch.rand(2, 3, 4), torch.zeros(2, 0, 4), torch.zeros(2, 0).bool()).eq(NONE).all()


def test_assignment_equals_the_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 6, 2, generator=generator)
    boxes = torch.cat([corners, corners + torch.rand(3, 6, 2, generator=generator) * 0.6], dim=2).clamp(max=1)
    mask = torch.rand(3, 6, generator=generator) > 0.3
    shapes = [(20, 24), (10, 12), (5, 6)]
    points = points_of(shapes)
    targets = assign_points(points, boxes, mask, 1.5)
    for b in range(3):
        p = 0
        for level, (rows, columns) in enumerate(shapes):
            for y in range(rows):
                for x in range(columns):
                    found = []
                    for m in range(6):
                        x0, y0, x1, y1 = (boxes[b, m] * torch.tensor([columns, rows, columns, rows])).tolist()
                        ltrb = (x + 0.5 - x0, y + 0.5 - y0, x1 - x - 0.5, y1 - y - 0.5)
                        low = 0 if level == 0 else REACH / 2
                        high = math.inf if level == 2 else REACH
                        near = max(abs(x + 0.5 - (x0 + x1) / 2), abs(y + 0.5 - (y0 + y1) / 2)) <= 1.5
                        if mask[b, m] and min(ltrb) > 0 and low < max(ltrb) <= high and near:
                            found.append(((boxes[b, m, 2:] - boxes[b, m, :2]).prod().item(), m))
                    assert targets.box_BP[b, p].item() == (min(found)[1] if found else NONE)
                    p += 1


def test_regions_take_the_box_they_overlap_most() -> None:
    """IoU with the boxes (0, 0, 1, 1) and (0, 0, 0.5, 1): 1 and 0.5; 0.5 and 1; 0.4 and 0; then the first is masked."""
    boxes = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 0.5, 1]]])
    regions = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 0.5, 1], [0.6, 0, 1, 1]]])
    both = torch.ones(1, 2, dtype=torch.bool)
    assert match_regions(regions, boxes, both).tolist() == [[0, 1, NONE]]
    assert match_regions(regions, boxes, both, 0.3).tolist() == [[0, 1, 0]]
    assert match_regions(regions, boxes, torch.tensor([[False, True]])).tolist() == [[1, 1, NONE]]
