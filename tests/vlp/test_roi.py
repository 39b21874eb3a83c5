"""RoIAlign against a loop over its definition, against torchvision's own arithmetic, and by hand."""

import pytest
import torch
from torch import Tensor

from vlp.detection import roi
from vlp.detection.roi import roi_align, roi_mean


def slow_sample(map_HW: Tensor, y: float, x: float) -> Tensor:
    """One bilinear sample, as in Detectron's kernel: nothing beyond one place outside, clamped within it."""
    height, width = map_HW.shape
    if y < -1 or y > height or x < -1 or x > width:
        return map_HW.new_zeros(())
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = int(y), int(x)
    if top >= height - 1:
        top, y = height - 1, float(height - 1)
    if left >= width - 1:
        left, x = width - 1, float(width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    upper = (1 - across) * map_HW[top, left] + across * map_HW[top, right]
    lower = (1 - across) * map_HW[bottom, left] + across * map_HW[bottom, right]
    return (1 - down) * upper + down * lower


def slow_roi_align(map_BCHW: Tensor, boxes_BM4: Tensor, size: int, samples: int) -> Tensor:
    """Straight from the definition, sample by sample."""
    batch, channels, height, width = map_BCHW.shape
    out = map_BCHW.new_zeros(batch, boxes_BM4.shape[1], channels, size, size)
    for b in range(batch):
        for m, box in enumerate(boxes_BM4[b].tolist()):
            left, top = box[0] * width - 0.5, box[1] * height - 0.5
            bin_x, bin_y = (box[2] - box[0]) * width / size, (box[3] - box[1]) * height / size
            for c in range(channels):
                for i in range(size):
                    for j in range(size):
                        total = map_BCHW.new_zeros(())
                        for u in range(samples):
                            for v in range(samples):
                                y = top + (i + (u + 0.5) / samples) * bin_y
                                x = left + (j + (v + 0.5) / samples) * bin_x
                                total = total + slow_sample(map_BCHW[b, c], y, x)
                        out[b, m, c, i, j] = total / samples**2
    return out


BOXES = torch.tensor([
    [[0.0, 0.0, 1.0, 1.0], [0.13, 0.21, 0.77, 0.64], [-0.4, -0.3, 0.4, 0.3]],
    [[0.5, 0.5, 0.5, 0.5], [0.7, 0.6, 1.6, 1.4], [2.0, 2.0, 3.0, 3.0]],
])  # fmt: skip
"""The whole picture, an odd one, one beyond the upper left; a point, one beyond the lower right, one far outside."""


@pytest.mark.parametrize("places", [0, roi.DENSE_PLACES])
@pytest.mark.parametrize(("size", "samples", "shape"), [(3, 2, (5, 7)), (2, 1, (1, 1)), (1, 3, (4, 2)), (7, 2, (3, 3))])
def test_equals_the_slow_definition_with_gradients(
    places: int, size: int, samples: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of computing it: weights written out, and sample by sample."""
    monkeypatch.setattr(roi, "DENSE_PLACES", places)
    torch.manual_seed(0)
    grads = []
    values = torch.randn(2, 3, *shape)
    weight = torch.randn(2, 3, 3, size, size)
    for function in (roi_align, slow_roi_align):
        map_BCHW = values.clone().requires_grad_()
        found = function(map_BCHW, BOXES, size, samples)
        (found * weight).sum().backward()
        assert map_BCHW.grad is not None
        grads.append((found.detach(), map_BCHW.grad))
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_one_bin_by_hand() -> None:
    """A 2 x 2 map of 1, 2 / 3, 4 and the whole picture as one bin with one sample: its middle, the mean 2.5.

    The left half's middle lies at x = 0.25 * 2 - 0.5 = 0: the mean of the left column, 2. With four samples in the
    whole picture each falls on a place: 2.5 again. The far corner, of no extent, reads the last place: 4.
    """
    map_BCHW = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]]])
    assert roi_align(map_BCHW, boxes, size=1, samples=1).flatten().tolist() == [2.5, 2.0, 4.0]
    assert roi_align(map_BCHW, boxes, size=1, samples=2).flatten()[0] == 2.5
    assert roi_align(map_BCHW, boxes[:, :1], size=2, samples=1).flatten().tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("size", [1, 7, 14])
def test_the_mean_is_that_of_all_bins(size: int) -> None:
    map_BCHW = torch.randn(2, 4, 6, 5)
    expected = roi_align(map_BCHW, BOXES, size).mean(dim=(-2, -1))
    torch.testing.assert_close(roi_mean(map_BCHW, BOXES, size), expected, rtol=1e-5, atol=1e-6)


def test_a_large_map_gives_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    map_BCHW = torch.randn(2, 3, 40, 33)
    assert map_BCHW.shape[2] * map_BCHW.shape[3] > roi.DENSE_PLACES
    by_samples = roi_align(map_BCHW, BOXES)
    monkeypatch.setattr(roi, "DENSE_PLACES", 10**6)
    torch.testing.assert_close(by_samples, roi_align(map_BCHW, BOXES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [4, 40])
def test_gradients_reach_the_boxes(side: int) -> None:
    """On a ramp along x the mean of a box is its middle's x: half of it hangs on either side, times the slope, 1."""
    ramp = torch.arange(side).float().expand(1, 1, side, side) / side
    boxes = torch.tensor([[[0.3, 0.3, 0.6, 0.7]]], requires_grad=True)
    roi_align(ramp, boxes, size=2).mean().backward()
    assert boxes.grad is not None
    torch.testing.assert_close(boxes.grad.flatten(), torch.tensor([0.5, 0.0, 0.5, 0.0]), rtol=1e-4, atol=1e-5)


def test_no_boxes_and_no_pictures() -> None:
    for count, boxes, side in ((2, 0, 4), (0, 3, 4), (2, 0, 40), (0, 3, 40)):
        map_BCHW = torch.randn(count, 5, side, side, requires_grad=True)
        found = roi_align(map_BCHW, torch.zeros(count, boxes, 4), size=3)
        assert found.shape == (count, boxes, 5, 3, 3)
        found.sum().backward()
        assert roi_mean(map_BCHW, torch.zeros(count, boxes, 4)).shape == (count, boxes, 5)


@pytest.mark.parametrize("side", [8, 40])
def test_bfloat16_maps_stay_bfloat16(side: int) -> None:
    map_BCHW = torch.randn(1, 3, side, side)
    low = roi_align(map_BCHW.bfloat16(), BOXES[:1])
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), roi_align(map_BCHW, BOXES[:1]), rtol=0.02, atol=0.03)


def test_equals_torchvision() -> None:
    """Its kernel in Python, which needs no compiled operators; unlike the compiled one it knows no rule for samples
    beyond the map, so that boxes that leave the picture are left out."""
    from vlp.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    from torchvision.ops.roi_align import _roi_align

    height, width = 9, 9
    map_BCHW = torch.randn(2, 3, height, width)
    numbers = torch.arange(2.0).repeat_interleave(3)[:, None]
    rows = torch.cat([numbers, BOXES.flatten(0, 1) * width], dim=1)
    plain = getattr(_roi_align, "__wrapped__", _roi_align)
    expected = plain(map_BCHW, rows, 1.0, 7, 7, 2, True)
    within = [0, 1, 3]
    found = roi_align(map_BCHW, BOXES).flatten(0, 1)
    torch.testing.assert_close(found[within], expected[within], rtol=1e-4, atol=1e-5)
