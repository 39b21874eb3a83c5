"""Maps of every kind of tower, the pyramid on them, and the heads."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_pipelines.errors import ConfigError
from vlp.detection.heads import DenseHead, RegionHead
from vlp.detection.maps import as_type, inside, maps_of
from vlp.detection.pyramid import Pyramid
from vlp.models import ModelConfig, build_model, instantiate
from vlp.testing import MICRO

CNN = {"timm_pool": "avg", "timm_proj": "linear"}
KINDS: dict[str, dict[str, Any]] = {
    "open_clip ViT": {**MICRO["vision_cfg"], "image_size": 64},
    "open_clip ResNet": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64},
    "resnet": {"timm_model_name": "test_resnet", "image_size": 64, **CNN},
    "efficientnet": {"timm_model_name": "tf_efficientnet_lite0", "image_size": 64, **CNN},
    "convnext": {"timm_model_name": "test_convnext", "image_size": 64, **CNN},
    "ViT": {"timm_model_name": "test_vit", "image_size": 64, "timm_pool": "", "timm_proj": "linear"},
    "EVA": {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 56, "timm_pool": "", "timm_proj": "linear"},
}
SHAPES = {
    "open_clip ViT": [(32, 8)],
    "open_clip ResNet": [(64, 16), (128, 8), (256, 4), (512, 2)],
    "resnet": [(32, 16), (48, 8), (192, 4), (96, 2)],
    "efficientnet": [(24, 16), (40, 8), (112, 4), (320, 2)],
    "convnext": [(24, 16), (32, 8), (48, 4), (64, 2)],
    "ViT": [(64, 4)],
    "EVA": [(192, 4)],
}
"""Channels and side of the maps, finest first, of pictures of 64 px (EVA: 56)."""


def model_of(kind: str) -> tuple[nn.Module, int]:
    vision = KINDS[kind]
    torch.manual_seed(0)
    model, _ = build_model(ModelConfig(config={**MICRO, "vision_cfg": dict(vision)}), vision["image_size"], 12, 320)
    return model.eval(), vision["image_size"]


@pytest.mark.parametrize("kind", KINDS)
def test_maps_have_their_shapes_and_the_embedding_is_the_towers(kind: str) -> None:
    model, size = model_of(kind)
    tower, pixels = maps_of(model), torch.randn(2, 3, size, size)
    found = tower(pixels)
    assert [tuple(level.shape) for level in found.levels] == [(2, c, side, side) for c, side in SHAPES[kind]]
    assert tower.channels == tuple(channels for channels, _ in SHAPES[kind])
    assert tower.strides == tuple(size // side for _, side in SHAPES[kind])
    assert torch.equal(found.embedding_BD, model.encode_image(pixels))  # type: ignore[operator]
    assert found.dense_BDHW is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "EVA"])
def test_dense_features_come_from_the_same_pass(kind: str) -> None:
    from vlp.detection.dense import dense_features

    model, size = model_of(kind)
    pixels = torch.randn(2, 3, size, size)
    found = maps_of(model)(pixels, dense=True).dense_BDHW
    assert found is not None
    torch.testing.assert_close(found, dense_features(model, pixels), rtol=1e-4, atol=1e-5)
    if "timm_pool" in KINDS[kind] and KINDS[kind]["timm_pool"] == "avg" and kind != "convnext":
        mean_BD = found.mean(dim=(2, 3))
        torch.testing.assert_close(mean_BD, model.encode_image(pixels), rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_a_places_map_is_where_the_picture_is() -> None:
    """A bright spot in the lower left of the picture changes the lower left of every map most."""
    model, size = model_of("open_clip ResNet")
    dark, bright = torch.zeros(2, 1, 3, size, size)
    bright[..., size * 3 // 4 :, : size // 4] = 3.0
    for before, after in zip(maps_of(model)(dark).levels, maps_of(model)(bright).levels, strict=True):
        change = (after - before).abs().sum(dim=1)[0]
        half = len(change) // 2
        assert change[half:, :half].sum() == max(
            part.sum() for rows in change.chunk(2) for part in rows.chunk(2, dim=1)
        )


def test_a_tower_without_maps_is_refused() -> None:
    class Bare(nn.Module):
        visual = nn.Linear(2, 2)

    with pytest.raises(ConfigError, match="the image tower Linear does not give"):
        maps_of(Bare())


def test_the_towers_own_forward_comes_back_after_an_error() -> None:
    tower = nn.Linear(2, 2)

    def fails(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        inside(tower, fails, torch.zeros(1, 2))
    assert torch.equal(tower(torch.zeros(1, 2))[0], tower.bias)
    assert inside(tower, lambda x: x + 1, torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]


def test_maps_meet_weights_in_their_type_unless_autocast_is_on() -> None:
    weight, low = torch.zeros(1), torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    assert as_type(low, weight).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert as_type(low, weight).dtype == torch.bfloat16
    assert as_type(low.to("meta"), weight).dtype == torch.float32


@pytest.mark.parametrize(
    ("strides", "sides", "levels", "expected"),
    [
        ((16,), (4,), (2, 3, 4, 5), (16, 8, 4, 2)),
        ((8,), (8,), (3, 4), (8, 4)),
        ((4, 8, 16, 32), (16, 8, 4, 2), (2, 3, 4, 5), (16, 8, 4, 2)),
        ((4, 8, 16, 32), (16, 8, 4, 2), (3, 4, 5, 6), (8, 4, 2, 1)),
        ((8, 16, 32), (8, 4, 2), (2, 3), (16, 8)),
        ((8, 16, 32), (5, 3, 2), (3, 4, 5), (5, 3, 2)),
        ((16,), (1,), (4, 5, 6), (1, 1, 1)),
        ((14,), (5,), (3, 4, 5), (10, 5, 3)),
    ],
)
def test_every_level_has_its_size(
    strides: tuple[int, ...], sides: tuple[int, ...], levels: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    channels = [8 * (number + 1) for number in range(len(strides))]
    pyramid = Pyramid(channels, strides, 12, levels)
    found = pyramid([torch.randn(2, c, side, side) for c, side in zip(channels, sides, strict=True)])
    assert [tuple(level.shape) for level in found] == [(2, 12, side, side) for side in expected]
    torch.stack([level.square().sum() for level in found]).sum().backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


def test_coarse_maps_reach_fine_levels_of_a_cnn_and_not_the_other_way() -> None:
    pyramid = Pyramid((4, 4), (8, 16), 6, (3, 4))
    maps = [torch.randn(1, 4, 4, 4), torch.randn(1, 4, 2, 2)]
    before = pyramid(maps)
    coarse = pyramid([maps[0], maps[1] + 1])
    fine = pyramid([maps[0] + 1, maps[1]])
    assert not torch.allclose(coarse[0], before[0])
    assert torch.equal(fine[1], before[1])


def test_levels_must_follow_each_other() -> None:
    with pytest.raises(ConfigError, match=r"levels=\[3, 5\]"):
        Pyramid((4,), (16,), 8, (3, 5))
    with pytest.raises(ConfigError, match="too narrow"):
        Pyramid((2,), (32,), 8, (2, 3))


def test_the_region_head_by_hand() -> None:
    """One channel, one bin, hidden weight 2 and bias -1, output weights 3 and -3: relu(2 x - 1) times 3 and -3.

    x = 1 gives 3, -3; x = 0 gives nothing. Regions do not see each other.
    """
    head = RegionHead(width=1, size=1, embed=2, convs=0, hidden=1)
    with torch.no_grad():
        head.hidden.weight.fill_(2.0)
        head.hidden.bias.fill_(-1.0)
        head.out.weight.copy_(torch.tensor([[3.0], [-3.0]]))
        head.out.bias.zero_()
    found = head(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1))
    assert found.tolist() == [[[3.0, -3.0], [0.0, 0.0]]]
    assert RegionHead(4, 3, 5, convs=2, hidden=6)(torch.randn(2, 0, 4, 3, 3)).shape == (2, 0, 5)


def test_the_dense_head_starts_with_little_hope_and_shares_its_weights() -> None:
    """Centreness begins at 0.01 on average, distances are positive, and one weight serves both levels."""
    torch.manual_seed(0)
    head = DenseHead(width=8, convs=1, levels=2)
    maps = [torch.randn(3, 8, 4, 5), torch.randn(3, 8, 2, 3)]
    found = head(maps)
    assert [tuple(centre.shape) for centre, _ in found] == [(3, 4, 5), (3, 2, 3)]
    assert [tuple(sides.shape) for _, sides in found] == [(3, 4, 4, 5), (3, 4, 2, 3)]
    assert all(0.005 < float(centre.detach().sigmoid().mean()) < 0.02 for centre, _ in found)
    assert all((sides > 0).all() for _, sides in found)
    again = head([maps[0], maps[0]])
    assert torch.equal(again[0][0], again[1][0])
    with torch.no_grad():
        head.scales.copy_(torch.tensor([1.0, 2.0]))
    first, second = (sides.log() for _, sides in head([maps[0], maps[0]]))
    torch.testing.assert_close(second, 2 * first)
    huge = DenseHead(width=1, convs=0, levels=1)
    huge.sides.weight.data.fill_(1e6)
    assert torch.isfinite(huge([torch.ones(1, 1, 1, 1)])[0][1]).all()


def test_mixed_types_work_under_bf16() -> None:
    torch.manual_seed(0)
    pyramid, head = Pyramid((4, 6), (8, 16), 8, (3, 4)), RegionHead(8, 2, 5, 1, 7)
    maps = [torch.randn(1, 4, 4, 4), torch.randn(1, 6, 2, 2)]
    exact = head(F.adaptive_avg_pool2d(pyramid(maps)[0], 2)[:, None])
    low = [level.bfloat16() for level in maps]
    found = head(F.adaptive_avg_pool2d(pyramid(low)[0], 2)[:, None])
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(F.adaptive_avg_pool2d(pyramid(low)[0], 2)[:, None])
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)


def test_the_plain_model_is_not_changed_by_its_map_tower() -> None:
    model = instantiate(MICRO)
    before = {name: id(value) for name, value in model.get_submodule("visual").__dict__.items()}
    maps_of(model)(torch.zeros(1, 3, 16, 16))
    assert {name: id(value) for name, value in model.get_submodule("visual").__dict__.items()} == before
