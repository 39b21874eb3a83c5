"""Doubts about trusted pairs: the two signs on features made by hand, and a set with poisons through a real model."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp.backdoor.trusted import Ground, Seen, doubtful, doubts
from vlp.testing import micro_bundle


def pairs(layers: int = 4) -> Seen:
    """400 pairs of four classes, whose features tell the class in every layer. The first five are of class 0 by
    embedding and caption and of class 2 by features; the next five lie far off in the last layer."""
    chance = torch.Generator().manual_seed(0)
    class_N = torch.arange(400) % 4
    class_N[:5] = 0
    shown_N = class_N.clone()
    shown_N[:5] = 2
    axes_KD = torch.eye(4, 8)

    def around(where_ND: torch.Tensor, noise: float) -> torch.Tensor:
        return where_ND + noise * torch.randn(where_ND.shape, generator=chance)

    features = [around(4.0 * torch.eye(4, 12)[shown_N], 1.0) for _ in range(layers)]
    features[-1][5:10, 11] += 20.0
    image_ND = F.normalize(around(axes_KD[class_N], 0.05), dim=1)
    return Seen([f"{row}" for row in range(400)], image_ND, axes_KD[class_N], features)


def test_each_sign_finds_its_own_poisons() -> None:
    """The first ten by doubt are the planted ones; all ten are far off where they look, five say another thing."""
    seen = pairs()
    sign_2N = Ground(seen).signs(seen)
    assert set(sign_2N[0].topk(10).indices.tolist()) == set(range(10))
    assert set(sign_2N[1].topk(5).indices.tolist()) == set(range(5))
    assert set(doubts(sign_2N).topk(10).indices.tolist()) == set(range(10))


def test_a_pair_is_no_neighbour_of_its_own() -> None:
    """A caption that nobody else has is unlike all neighbours', though the pair lies in the sample itself."""
    seen = pairs()
    seen.text_ND[20] = torch.eye(8)[7]
    alone = Ground(seen).signs(seen)[1]
    assert alone[20] > alone[21:].max()


def test_doubts_by_hand() -> None:
    """1 to 100: 40 from the median, 50, to the upper tenth, 90, are 1.2816 spreads; what is below counts nothing."""
    sign_N = torch.arange(1.0, 101.0)
    found = doubts(torch.stack([sign_N, sign_N.roll(1)]))
    assert found[[49, 89, 9]].tolist() == pytest.approx([0.0, 1.2816 * (1 + 39 / 40), 0.0], abs=1e-4)


def test_a_share_of_a_real_set_is_left_out_the_planted_first(tmp_path: Path) -> None:
    """200 soft pictures with captions of their colour, three of them noise instead."""
    chance = np.random.default_rng(0)
    records = []
    for number in range(200):
        colour = number % 3
        pixels = np.full((24, 24, 3), 60, np.uint8) + chance.integers(0, 30, (24, 24, 3), dtype=np.uint8)
        pixels[..., colour] += 120
        if number in (30, 90, 150):
            pixels = chance.integers(0, 2, (24, 24, 3), dtype=np.uint8) * 255
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        records.append(Record(stream.getvalue(), (("red", "green", "blue")[colour],), "test", f"{number}.png"))
    write_shards(records, tmp_path / "s", WriteOptions(), kind="test", licences={}, progress=False)
    found = doubtful(micro_bundle(), tmp_path / "s")
    assert len(found) == 20
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert {"00000030", "00000090", "00000150"} <= set(found), list(found)
    assert doubtful(micro_bundle(), tmp_path / "s") == found
