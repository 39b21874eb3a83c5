"""Boxes: overlaps by hand, losses, NMS against the definition written as loops."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlp.detection.boxes import area, clip, iou, iou_loss, is_valid, nms, nms_batch, paired_iou

EDGE = st.integers(0, 9)
CASE = st.lists(st.tuples(EDGE, EDGE, EDGE, EDGE, st.integers(0, 4), st.integers(0, 2)), max_size=40)


def boxes_of(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def slow_iou(a: Tensor, b: Tensor) -> np.float32:
    """One pair, from the definition."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.tolist(), b.tolist()
    shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    sides = [max(0.0, x1 - x0) * max(0.0, y1 - y0) for x0, y0, x1, y1 in ((ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1))]
    union = sum(sides) - shared
    found: np.float32 = np.float32(shared) / np.float32(union) if union > 0 else np.float32(0)
    return found


def slow_nms(boxes: Tensor, scores: Tensor, threshold: float, groups: Tensor | None, keep: int | None) -> list[int]:
    """Greedy suppression as in the papers: one box after the other."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i)):
        rivals = [j for j in kept if groups is None or groups[i] == groups[j]]
        if all(slow_iou(boxes[i], boxes[j]) <= np.float32(threshold) for j in rivals):
            kept.append(i)
    return kept[:keep]


def test_iou_by_hand() -> None:
    """2 x 2 boxes shifted by one: 2 shared of 6; a quarter inside: 1 of 4; apart, or touching at an edge: 0."""
    first = boxes_of((0, 0, 2, 2))
    others = boxes_of((0, 0, 2, 2), (1, 0, 3, 2), (0, 0, 1, 1), (2, 0, 4, 2), (5, 5, 6, 6))
    torch.testing.assert_close(iou(first, others), torch.tensor([[1.0, 1 / 3, 0.25, 0.0, 0.0]]))


def test_boxes_without_an_area_overlap_nothing() -> None:
    """A line, a point and a box turned inside out have area 0, so their IoU is 0 with all, themselves included."""
    flat = boxes_of((1, 1, 1, 5), (2, 2, 2, 2), (4, 4, 1, 1))
    assert area(flat).tolist() == [0.0, 0.0, 0.0]
    assert iou(flat, torch.cat([flat, boxes_of((0, 0, 9, 9))])).eq(0).all()
    assert is_valid(torch.cat([flat, boxes_of((0, 0, 9, 9), (0, 0, float("nan"), 1))])).tolist() == [
        False, False, False, True, False,
    ]  # fmt: skip
    assert nms(flat.repeat(2, 1), torch.ones(6), 0.5).tolist() == [0, 1, 2, 3, 4, 5]


def test_losses_by_hand() -> None:
    """Shifted by one: IoU 1/3, hull 3 x 2, union 6, so GIoU = IoU. Apart by 1: hull 3 x 1, union 2: GIoU = -1/3."""
    boxes, targets = boxes_of((0, 0, 2, 2), (0, 0, 1, 1)), boxes_of((1, 0, 3, 2), (2, 0, 3, 1))
    torch.testing.assert_close(iou_loss(boxes, targets, "linear"), torch.tensor([2 / 3, 1.0]))
    torch.testing.assert_close(iou_loss(boxes, targets, "giou"), torch.tensor([2 / 3, 4 / 3]))
    torch.testing.assert_close(iou_loss(boxes, targets, "log"), torch.tensor([np.log(3), np.log(1e6)]).float())


@pytest.mark.parametrize("kind", ["linear", "log", "giou"])
def test_gradients_are_finite_and_pull_towards_the_target(kind: str) -> None:
    """Also for equal boxes, boxes apart, and boxes without an area."""
    boxes = boxes_of((0, 0, 2, 2), (0, 0, 1, 1), (3, 3, 3, 3), (1, 1, 4, 4)).requires_grad_()
    targets = boxes_of((0, 0, 3, 3), (2, 0, 3, 1), (3, 3, 3, 3), (1, 1, 4, 4))
    iou_loss(boxes, targets, kind).sum().backward()  # type: ignore[arg-type]
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()
    assert (boxes.grad[0, 2:] < 0).all(), "growing right and down brings the first box nearer"


def test_clipping() -> None:
    clipped = clip(boxes_of((-1, 2, 12, 30), (3, 4, 5, 6), (-5, -5, -1, -1)), width=10, height=20)
    assert clipped.tolist() == [[0, 2, 10, 20], [3, 4, 5, 6], [0, 0, 0, 0]]
    assert clip(boxes_of((-0.5, 0.25, 1.5, 0.75))).tolist() == [[0, 0.25, 1, 0.75]]


@settings(max_examples=300, deadline=None)
@given(CASE, st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]), st.booleans(), st.sampled_from([None, 1, 5]))
def test_nms_equals_the_loops(case: list[tuple[int, ...]], threshold: float, grouped: bool, keep: int | None) -> None:
    """Whole coordinates and five scores: ties of scores, equal boxes, boxes without area and IoUs at the threshold."""
    rows = torch.tensor(case, dtype=torch.float32).view(-1, 6)
    boxes, scores, groups = rows[:, :4], rows[:, 4], rows[:, 5].long() if grouped else None
    assert nms(boxes, scores, threshold, groups, keep).tolist() == slow_nms(boxes, scores, threshold, groups, keep)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 3, 300]))
def test_many_pictures_equal_one_at_a_time(seed: int, keep: int | None) -> None:
    """More than one block of boxes, some places empty, chains of boxes that beat one another."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(3, 280, 2, generator=generator) * torch.tensor([20.0, 2.0])
    boxes = torch.cat([corners, corners + torch.rand(3, 280, 2, generator=generator) * 3], dim=2)
    scores = torch.rand(3, 280, generator=generator)
    valid = torch.rand(3, 280, generator=generator) > torch.tensor([0.0, 0.5, 1.0])[:, None]
    groups = torch.randint(0, 2, (3, 280), generator=generator)
    index, kept = nms_batch(boxes, scores, 0.4, groups, valid, keep)
    for row in range(3):
        ids = valid[row].nonzero()[:, 0]
        found = slow_nms(boxes[row][ids], scores[row][ids], 0.4, groups[row][ids], keep)
        assert index[row][kept[row]].tolist() == ids[found].tolist()


def test_no_boxes_and_no_pictures() -> None:
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
    index, kept = nms_batch(torch.zeros(0, 7, 4), torch.zeros(0, 7), 0.5)
    assert index.shape == kept.shape
    assert len(index) == 0
    index, kept = nms_batch(torch.zeros(2, 3, 4), torch.zeros(2, 3), 0.5, valid_BN=torch.zeros(2, 3, dtype=torch.bool))
    assert not kept.any()


def test_what_cannot_be_ordered_is_refused() -> None:
    boxes, scores = boxes_of((0, 0, 1, 1), (0, 0, 1, 1)), torch.tensor([1.0, float("nan")])
    with pytest.raises(ValueError, match="not finite"):
        nms(boxes, scores, 0.5)
    valid = torch.tensor([[True, False]])
    assert nms_batch(boxes[None], scores[None], 0.5, valid_BN=valid)[0].tolist() == [[0]]


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_ten_thousand_boxes_take_seconds(spread: float) -> None:
    """Crowded, so that few stay, and scattered, so that nearly all do: the loops would take minutes."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(10_000, 2, generator=generator) * spread
    boxes = torch.cat([corners, corners + 0.3 * torch.rand(10_000, 2, generator=generator)], dim=1)
    scores = torch.rand(10_000, generator=generator)
    begun = time.perf_counter()
    kept = nms(boxes, scores, 0.5)
    assert time.perf_counter() - begun < 20
    assert scores[kept].diff().le(0).all()
    assert iou(boxes[kept[:500]], boxes[kept[:500]]).fill_diagonal_(0).max() <= 0.5
    assert len(kept) > (9_000 if spread > 1 else 100)


def test_paired_is_the_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(5, 4, generator=generator).cumsum(dim=1) for _ in range(2))
    torch.testing.assert_close(paired_iou(first, second), iou(first, second).diagonal())
