"""Losses of detector fine-tuning: values by hand, empty pictures, and what ranks share."""

import math

import pytest
import torch

from vlp.detection.losses import BACKGROUND, IGNORED, centre_loss, class_logits, class_loss, side_loss
from vlp.detection.targets import NONE, Targets


def targets_of(boxes: list[int], ltrb: list[list[float]], centre: list[float], inside: list[bool]) -> Targets:
    """One picture."""
    return Targets(torch.tensor([boxes]), torch.tensor([ltrb]), torch.tensor([centre]), torch.tensor([inside]))


TWO = targets_of([0, NONE, 0], [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], [1.0, 0.0, 0.5], [True, False, True])


def test_side_loss_by_hand() -> None:
    """The first point says its box, the third one twice as wide: IoU 1 and 4/8. Weighted by centreness 1 and 0.5:
    (1 * 0 + 0.5 * 0.5) / 1.5 = 1/6. What the second says does not matter."""
    said = torch.tensor([[[1.0, 1, 1, 1], [7, 7, 7, 7], [2, 1, 2, 1]]], requires_grad=True)
    loss = side_loss(said, TWO, "linear")
    assert loss.item() == pytest.approx(1 / 6)
    loss.backward()
    assert said.grad is not None
    assert said.grad[0, 1].eq(0).all()


def test_centre_loss_by_hand() -> None:
    """Logits 0 say one half: log 2 each, times the squared differences 1/4, 1/4 and 0, over two points: log 2 / 4.

    Without what lies outside of all boxes: log 2 / 8.
    """
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = centre_loss(logits, TWO, everywhere=True)
    assert loss.item() == pytest.approx(math.log(2) / 4, rel=1e-4)
    assert centre_loss(logits, TWO, everywhere=False).item() == pytest.approx(math.log(2) / 8, rel=1e-4)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


def test_class_loss_by_hand() -> None:
    """Two classes and a background on the axes, scale 2, regions on the axes: every right answer costs
    log(1 + 2 e^-2) = c. One region of class 1 seen right, one background seen as class 0 (c + 2), one ignored:
    (c + 0.9 (c + 2)) / 1.9."""
    eye = torch.eye(3)
    regions = torch.stack([eye[1], 5 * eye[0], eye[2]])[None]
    logits = class_logits(regions, eye[:2], 3 * eye[2], torch.tensor(2.0))
    assert logits.tolist() == [[[0, 2, 0], [2, 0, 0], [0, 0, 2]]]
    right = math.log(1 + 2 * math.exp(-2))
    found = class_loss(logits, torch.tensor([[1, BACKGROUND, IGNORED]]))
    assert found.item() == pytest.approx((right + 0.9 * (right + 2)) / 1.9)


def test_nothing_to_learn_is_zero_with_zero_gradients() -> None:
    """Pictures without boxes, and regions that are all ignored."""
    nothing = targets_of([NONE], [[0, 0, 0, 0]], [0.0], [False])
    sides, logits = torch.ones(1, 1, 4, requires_grad=True), torch.zeros(1, 2, 3, requires_grad=True)
    loss = side_loss(sides, nothing, "linear") + class_loss(logits, torch.tensor([[IGNORED, IGNORED]]))
    assert loss.item() == 0
    loss.backward()
    for tensor in (sides, logits):
        assert tensor.grad is not None
        assert tensor.grad.eq(0).all()
