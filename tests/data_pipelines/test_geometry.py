"""Boxes follow the pixels: through the preprocessing, back again, and through every augmentation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.geometry import placement
from data_pipelines.preprocess import ImageConfig, fit

sides = st.integers(24, 200)
modes = st.sampled_from(["shortest", "longest", "squash"])


@st.composite
def pictures_with_boxes(draw: st.DrawFn) -> tuple[int, int, tuple[int, int, int, int]]:
    """(height, width, box in whole pixels of at least 6 a side)."""
    height, width = draw(sides), draw(sides)
    x0, y0 = draw(st.integers(0, width - 6)), draw(st.integers(0, height - 6))
    return height, width, (x0, y0, draw(st.integers(x0 + 6, width)), draw(st.integers(y0 + 6, height)))


@given(pictures_with_boxes(), modes, st.integers(16, 96))
def test_a_box_lies_where_its_pixels_lie(
    drawn: tuple[int, int, tuple[int, int, int, int]], mode: str, size: int
) -> None:
    height, width, (x0, y0, x1, y1) = drawn
    config = ImageConfig.model_validate({"size": size, "resize": mode, "interpolation": "bilinear", "ground": 0})
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    picture[:, y0:y1, x0:x1] = 255
    coverage = fit(picture, (height, width), config)[0].float() / 255
    box = placement((height, width), config).to_input([(x0, y0, x1, y1)])[0] * size
    left, top, right, bottom = box.clip(0, size)
    if min(right - left, bottom - top) < 3:
        return  # too little is left to measure edges by
    # along the middle of the box the row's sum is its visible width, and the first half-covered pixel its left edge
    row, column = coverage[int((top + bottom) / 2)], coverage[:, int((left + right) / 2)]
    for line, first, last in ((row, left, right), (column, top, bottom)):
        inside = torch.nonzero(line > 0.5)[:, 0]
        assert abs(float(inside[0]) - first) <= 1.0
        assert abs(float(inside[-1]) + 1 - last) <= 1.0


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    modes,
    st.integers(1, 1024),
    st.lists(st.floats(-1, 2), min_size=4, max_size=4),
)
def test_there_and_back(height: int, width: int, mode: str, size: int, fractions: list[float]) -> None:
    config = ImageConfig.model_validate({"size": size, "resize": mode})
    place = placement((height, width), config)
    box = np.array(fractions) * [width, height, width, height]
    assert place.to_original(place.to_input(box))[0] == pytest.approx(box, abs=1e-6)


def test_placements_by_hand() -> None:
    # 200 x 100 to 50: shortest doubles the picture's width to 100, of which the middle 50 begin at 25
    tall = placement((100, 200), ImageConfig(size=50))
    assert (tall.scale_x, tall.scale_y, tall.left, tall.top) == (0.5, 0.5, 25, 0)
    assert tall.to_input([(50, 0, 150, 100)]).tolist() == [[0.0, 0.0, 1.0, 1.0]]
    # longest: 50 x 25, with 12 rows of ground above (25 // 2) and 13 below
    padded = placement((100, 200), ImageConfig(size=50, resize="longest"))
    assert (padded.scale_x, padded.scale_y, padded.left, padded.top) == (0.25, 0.25, 0, -12)
    assert padded.to_input([(0, 0, 200, 100)]).tolist() == [[0.0, 0.24, 1.0, 0.74]]
    assert placement((100, 200), ImageConfig(size=50, resize="squash")).to_input([(0, 50, 100, 100)]).tolist() == [
        [0.0, 0.5, 0.5, 1.0]
    ]
    assert tall.to_input([]).shape == (0, 4)
