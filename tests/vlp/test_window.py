"""Attention in windows and shifted-window learning against naive versions, and as the tower's own where neutral."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.errors import ConfigError
from vlp.detection.maps import maps_of
from vlp.detection.window import WindowConfig, is_global, run_vit, vit_of
from vlp.models import instantiate
from vlp.testing import MICRO

LAYERS = 3
VIT = {**MICRO, "vision_cfg": {**MICRO["vision_cfg"], "image_size": 64, "layers": LAYERS}}
"""8 x 8 patches, a class token."""


def timm_vit(name: str = "test_vit", size: int = 64, **arguments: object) -> nn.Module:
    vision = {"timm_model_name": name, "image_size": size, "timm_pool": "", "timm_proj": "linear"}
    return instantiate({**MICRO, "vision_cfg": {**vision, "timm_model_args": {"img_size": size, **arguments}}})


def towers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {
        "open_clip": instantiate(VIT),
        "timm": timm_vit(depth=3, patch_size=8),
        "registers": timm_vit("test_vit", depth=3, patch_size=8, reg_tokens=2),
        "any size": timm_vit(depth=3, patch_size=8, dynamic_img_size=True),
    }
    return {name: model.eval() for name, model in found.items()}


def parts(model: nn.Module) -> Any:
    vit = vit_of(model.get_submodule("visual"))
    assert vit is not None
    return vit


def naive(vit: Any, pixels_BCHW: Tensor, window: WindowConfig, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """Picture by picture, window by window, place by place; BHWD of the patches in their own places."""
    results = []
    for pixels in pixels_BCHW:
        grid = vit.patches(pixels[None])
        rows, columns = grid.shape[1:3]
        moved = torch.empty_like(grid)
        for y in range(rows):
            for x in range(columns):
                moved[:, (y + shift[0]) % rows, (x + shift[1]) % columns] = grid[:, y, x]
        tokens = vit.start(moved)[0]
        prefix, patches = tokens[: vit.prefix], tokens[vit.prefix :].view(rows, columns, -1)
        for number, block in enumerate(vit.blocks):
            count = 1 if is_global(number, len(vit.blocks), window.global_layers) else window.windows
            down, right = rows // count, columns // count
            after, copies = torch.empty_like(patches), []
            for i in range(count):
                for j in range(count):
                    ys, xs = slice(i * down, (i + 1) * down), slice(j * right, (j + 1) * right)
                    seen = torch.cat([prefix, patches[ys, xs].reshape(down * right, -1)])
                    out = block(seen[None])[0]
                    copies.append(out[: vit.prefix])
                    after[ys, xs] = out[vit.prefix :].view(down, right, -1)
            prefix, patches = torch.stack(copies).mean(dim=0), after
        back = torch.empty_like(patches)
        for y in range(rows):
            for x in range(columns):
                back[y, x] = patches[(y + shift[0]) % rows, (x + shift[1]) % columns]
        results.append(back)
    return torch.stack(results)


@pytest.mark.parametrize("name", ["open_clip", "timm", "registers", "any size"])
def test_neutral_settings_are_the_tower_bit_for_bit(name: str) -> None:
    model, pixels = towers()[name], torch.randn(2, 3, 64, 64)
    expected = model.encode_image(pixels)  # type: ignore[operator]
    tower = maps_of(model)
    assert torch.equal(tower(pixels).embedding_BD, expected)
    assert torch.equal(tower(pixels, WindowConfig(windows=1)).embedding_BD, expected)
    everywhere = WindowConfig(windows=2, global_layers=LAYERS)
    assert torch.equal(tower(pixels, everywhere).embedding_BD, expected)


@pytest.mark.parametrize("name", ["open_clip", "timm", "registers", "any size"])
@pytest.mark.parametrize(("windows", "layers"), [(2, 1), (4, 2)])
def test_windows_equal_the_naive_version(name: str, windows: int, layers: int) -> None:
    vit, pixels = parts(towers()[name]), torch.randn(2, 3, 64, 64)
    config = WindowConfig(windows=windows, global_layers=layers)
    found = run_vit(vit, pixels, config).after_BLD[:, vit.prefix :].unflatten(1, (8, 8))
    torch.testing.assert_close(found, naive(vit, pixels, config), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["open_clip", "timm", "registers", "any size"])
def test_shifted_windows_equal_two_naive_passes(name: str) -> None:
    """Windows of 4 x 4 tokens: half of one is 2; rows move by -2, columns by +2; the mean of both passes, in place."""
    vit, pixels = parts(towers()[name]), torch.randn(2, 3, 64, 64)
    config = WindowConfig(windows=2, global_layers=1, shift=True)
    found = run_vit(vit, pixels, config).after_BLD[:, vit.prefix :].unflatten(1, (8, 8))
    both = naive(vit, pixels, config), naive(vit, pixels, config, (-2, 2))
    torch.testing.assert_close(found, (both[0] + both[1]) / 2, rtol=1e-4, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3, "the passes differ, or nothing was tested"


def test_positions_stay_where_they_are() -> None:
    """Patches of zeros hold positions alone, which a roll does not move: both passes are one."""
    model = towers()["open_clip"]
    pixels = torch.zeros(1, 3, 64, 64)
    plain = maps_of(model)(pixels, WindowConfig(windows=2, global_layers=1))
    shifted = maps_of(model)(pixels, WindowConfig(windows=2, global_layers=1, shift=True))
    assert plain.embedding_BD.abs().max() > 1e-3
    torch.testing.assert_close(shifted.embedding_BD, plain.embedding_BD)


def test_gradients_flow_and_checkpointing_changes_nothing() -> None:
    config = WindowConfig(windows=2, global_layers=1, shift=True)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = instantiate(VIT)
        model.set_grad_checkpointing(checkpointed)  # type: ignore[operator]
        torch.manual_seed(1)
        maps_of(model)(torch.randn(2, 3, 64, 64), config).levels[0].square().sum().backward()
        grads.append(
            {name: p.grad for name, p in model.get_submodule("visual").named_parameters() if p.grad is not None}
        )
    assert len(grads[0]) > 10
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-4, atol=1e-5)


def test_global_layers_are_evenly_spaced() -> None:
    """ViTDet's: of 12 layers with 4 global ones numbers 2, 5, 8, 11; of 24 numbers 5, 11, 17, 23; one is the last."""
    for layers, count, expected in ((12, 4, [2, 5, 8, 11]), (24, 4, [5, 11, 17, 23]), (12, 1, [11]), (3, 2, [0, 2])):
        assert [layer for layer in range(layers) if is_global(layer, layers, count)] == expected


def test_what_cannot_be_cut_is_refused() -> None:
    vit, pixels = parts(towers()["open_clip"]), torch.zeros(1, 3, 64, 64)
    with pytest.raises(ConfigError, match="windows=3: a grid of 8 x 8 tokens"):
        run_vit(vit, pixels, WindowConfig(windows=3, global_layers=1))
    with pytest.raises(ConfigError, match="global_layers=4: the tower has 3 layers"):
        run_vit(vit, pixels, WindowConfig())
    with pytest.raises(ConfigError, match="windows=8 leaves windows of one token"):
        run_vit(vit, pixels, WindowConfig(windows=8, global_layers=1, shift=True))
    for options in ({"windows": 1, "global_layers": 2}, {"windows": 1, "shift": True}):
        with pytest.raises(ConfigError, match="windows=1"):
            WindowConfig.model_validate(options)
    dropping = instantiate({**VIT, "vision_cfg": {**VIT["vision_cfg"], "patch_dropout": 0.5}})
    with pytest.raises(ConfigError, match=r"model\.patch_dropout"):
        run_vit(parts(dropping), pixels)


def test_windows_need_a_grid_of_tokens() -> None:
    model = instantiate({**MICRO, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}})
    with pytest.raises(ConfigError, match="windows=4: the image tower has no grid of tokens"):
        maps_of(model)(torch.zeros(1, 3, 64, 64), WindowConfig())
