"""What detection adds to a model: regions, levels, and how it is kept in bundles and runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_pipelines.errors import BundleError, ConfigError
from vlp.bundle import load_bundle, save_bundle
from vlp.detection.maps import maps_of
from vlp.detection.model import (
    INFO,
    NAME,
    WEIGHTS,
    DetectionParts,
    PartsConfig,
    assign,
    has_parts,
    load_parts,
    make_parts,
    parts_of,
)
from vlp.detection.roi import roi_align, roi_mean
from vlp.models import instantiate
from vlp.testing import MICRO, micro_bundle

SMALL = PartsConfig(levels=(2, 3), width=8, roi_size=2, convs=1, hidden=12, dense_convs=1)
BOXES = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.2, 0.1, 0.4, 0.3], [0.5, 0.5, 0.9, 0.7]]])


def small(**changes: Any) -> tuple[nn.Module, DetectionParts]:
    torch.manual_seed(0)
    model = instantiate(MICRO).eval()
    return model, make_parts(SMALL.model_copy(update=changes), model, 16)


def test_regions_are_embedded_on_every_level() -> None:
    """Each is the head's answer to what RoIAlign cuts out of that level, of length one; the mean is their mean's."""
    model, parts = small()
    pixels = torch.randn(1, 3, 16, 16)
    levels = parts.levels(maps_of(model), pixels)
    found = parts.embed(levels, BOXES)
    assert len(found) == 2
    for map_BCHW, regions in zip(levels.maps, found, strict=True):
        torch.testing.assert_close(regions, F.normalize(parts.region(roi_align(map_BCHW, BOXES, 2)), dim=-1))
    expected = F.normalize((found[0] + found[1]) / 2, dim=-1)
    torch.testing.assert_close(parts.embed_mean(levels, BOXES), expected)


def test_a_box_goes_to_the_coarsest_level_that_still_shows_it() -> None:
    """Maps of 16 and 4 places a side, heads of 2 x 2 bins: a box needs a share of 4 / 256 and 4 / 16 of the picture.

    The whole picture and a half of it suit the coarse map, a quarter in width and height (1 / 16) the fine one, and a
    speck neither, which takes the finest; so does one turned round, which has no area.
    """
    maps = [torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 4, 4)]
    boxes = torch.tensor(
        [[[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0.5, 0.75, 0.75], [0.1, 0.1, 0.11, 0.11], [0.5, 0.5, 0.1, 0.9]]]
    )
    assert assign(boxes, maps, 2).tolist() == [[1, 1, 0, 0, 0]]


@pytest.mark.parametrize("residual", [False, True])
def test_assigned_regions_are_those_of_their_levels(residual: bool) -> None:
    model, parts = small(residual=residual)
    nn.init.normal_(parts.get_parameter("region.out.weight"))
    boxes = torch.cat([BOXES, BOXES.flip(1)])
    levels = parts.levels(maps_of(model), torch.randn(2, 3, 16, 16))
    every = torch.stack(parts.embed(levels, boxes))
    own = assign(boxes, levels.maps, parts.config.roi_size)
    assert own.unique().tolist() == [0, 1], "both levels are asked for"
    expected = every.gather(0, own[None, ..., None].expand(1, -1, -1, every.shape[3]))[0]
    torch.testing.assert_close(parts.embed_assigned(levels, boxes), expected)


def test_gradients_through_assigned_regions() -> None:
    model, parts = small()
    levels = parts.levels(maps_of(model), torch.randn(1, 3, 16, 16))
    target = torch.randn(1, 3, 16)
    (parts.embed_assigned(levels, BOXES) * target).sum().backward()
    assert all(p.grad is not None for part in (parts.region, parts.pyramid) for p in part.parameters())


def test_a_residual_head_begins_with_the_towers_own_regions() -> None:
    """What is added starts at zero: every level gives RoIAlign's mean of the dense features, of length one."""
    model, parts = small(residual=True)
    pixels = torch.randn(1, 3, 16, 16)
    levels = parts.levels(maps_of(model), pixels)
    dense = maps_of(model)(pixels, dense=True).dense_BDHW
    assert dense is not None
    expected = F.normalize(roi_mean(dense, BOXES, 14), dim=-1)
    for regions in (*parts.embed(levels, BOXES), parts.embed_assigned(levels, BOXES)):
        torch.testing.assert_close(regions, expected)


@pytest.mark.parametrize("count", [0, 1])
def test_no_boxes(count: int) -> None:
    for residual in (False, True):
        model, parts = small(residual=residual)
        levels = parts.levels(maps_of(model), torch.randn(count, 3, 16, 16))
        boxes = torch.zeros(count, 0, 4)
        assert [tuple(regions.shape) for regions in parts.embed(levels, boxes)] == [(count, 0, 16)] * 2
        assert parts.embed_assigned(levels, boxes).shape == (count, 0, 16)
        assert parts.embed_mean(levels, boxes).shape == (count, 0, 16)


def saved(folder: Path) -> tuple[Path, DetectionParts]:
    bundle = micro_bundle()
    parts = make_parts(SMALL, bundle.model, 16)
    parts.info = parts.info.model_copy(update={"stage": "finetune", "base_labels": ("bear",)})
    bundle.parts[NAME] = parts
    return save_bundle(bundle, folder / "bundle"), parts


def test_parts_travel_in_the_bundle(tmp_path: Path) -> None:
    folder, parts = saved(tmp_path)
    assert has_parts(folder)
    assert has_parts(tmp_path), "a run's folder holds the bundle"
    bundle = load_bundle(folder)
    assert bundle.folder == folder
    assert bundle.parts == {}, "loaded by who needs them"
    found = parts_of(bundle)
    assert found is parts_of(bundle)
    assert not found.training
    assert found.config == SMALL
    assert (found.info.stage, found.info.base_labels) == ("finetune", ("bear",))
    for name, value in parts.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    plain = micro_bundle()
    assert not has_parts(save_bundle(plain, tmp_path / "plain"))
    with pytest.raises(BundleError, match=r"holds no detection\.json.*detection/pretrain"):
        parts_of(load_bundle(tmp_path / "plain"))
    with pytest.raises(BundleError, match="in memory without parts"):
        parts_of(plain)


def test_open_clip_loads_the_folder_all_the_same(tmp_path: Path) -> None:
    import open_clip

    folder, _ = saved(tmp_path)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = torch.randn(1, 3, 16, 16)
    expected = load_bundle(folder).model.encode_image(pixels)  # type: ignore[operator]
    torch.testing.assert_close(model.eval().encode_image(pixels), expected)


def test_damage_is_named(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    model = load_bundle(folder).model
    weights, info = folder / WEIGHTS, folder / INFO
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"detection\.safetensors: sha256 differs"):
        load_parts(folder, model)
    weights.unlink()
    with pytest.raises(BundleError, match=r"detection\.safetensors: weights cannot be loaded"):
        load_parts(folder, model)
    weights.write_bytes(content)
    text = info.read_text()
    for change, message in (
        ({"format": 99}, "format 99 is of a newer vlp"),
        ({"stage": "dream"}, r"detection\.json: .*stage"),
        ({"channels": [48]}, r"maps have channels \(48,\), this one's have \(32,\)"),
        ({"config": {**json.loads(text)["config"], "width": 9}}, "weights cannot be loaded"),
    ):
        info.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(BundleError, match=message):
            load_parts(folder, model)
    info.write_text(text[:40])
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        load_parts(folder, model)


def test_loading_takes_no_random_numbers(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    model = load_bundle(folder).model
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_parts(folder, model)
    assert torch.equal(torch.rand(2), expected)


def test_windows_are_refused_for_a_tower_without_tokens() -> None:
    from vlp.detection.window import WindowConfig

    model = instantiate({**MICRO, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}})
    with pytest.raises(ConfigError, match="has no grid of tokens"):
        make_parts(PartsConfig(window=WindowConfig()), model, 16)


CNNS = {"efficientnet": "test_efficientnet", "resnet": "test_resnet", "convnext": "test_convnext"}
TAIL = PartsConfig(levels=(4, 5), width=8, roi_size=4, dense_convs=1, tail=True)


def cnn(kind: str, size: int = 64) -> nn.Module:
    torch.manual_seed(0)
    vision = {"timm_model_name": CNNS[kind], "image_size": size, "timm_pool": "avg", "timm_proj": "linear"}
    model = instantiate({**MICRO, "vision_cfg": vision})
    for module in model.modules():  # what a trained tower has, and a fresh one does not
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
    return model.eval()


@pytest.mark.parametrize("kind", CNNS)
def test_a_tail_sees_the_whole_picture_as_the_tower_does(kind: str) -> None:
    """64 px: a map of 4 x 4, of which 4 x 4 bins with one sample each are the map itself; nothing is added at first."""
    model = cnn(kind)
    parts = make_parts(TAIL.model_copy(update={"roi_samples": 1}), model, 16).eval()
    pixels = torch.randn(2, 3, 64, 64)
    levels = parts.levels(maps_of(model), pixels)
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).expand(2, 1, 4)
    expected = F.normalize(model.encode_image(pixels), dim=-1)  # type: ignore[operator]
    for regions in (*parts.embed(levels, whole), parts.embed_assigned(levels, whole)):
        torch.testing.assert_close(regions[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_tail_learns_from_every_level_and_leaves_the_tower_alone() -> None:
    model = cnn("efficientnet")
    parts = make_parts(TAIL, model, 16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norms = {name: value.clone() for name, value in parts.named_buffers()}
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1)
    model.requires_grad_(False)
    for _ in range(2):  # at first the convolutions that let the pyramid in are zero, and it gets no gradient
        optimizer.zero_grad()
        levels = parts.levels(maps_of(model), torch.randn(2, 3, 64, 64))
        target = torch.randn(2, 3, 16)
        sum((own * target).sum() for own in parts.embed(levels, BOXES.expand(2, -1, -1))).backward()  # type: ignore[union-attr]
        optimizer.step()
    moved = {n for n, p in parts.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.partition(".")[0] for name in moved} == {"pyramid", "enter", "region"}
    assert any(name.startswith("pyramid.lateral.0") for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, norms[name]) for name, value in parts.named_buffers()), "batch norms keep their means"


def test_assigned_regions_of_a_tail_are_those_of_their_levels() -> None:
    model = cnn("resnet")
    parts = make_parts(TAIL.model_copy(update={"levels": (3, 4), "roi_size": 2}), model, 16).eval()
    for added in parts.enter.parameters():
        nn.init.normal_(added)
    levels = parts.levels(maps_of(model), torch.randn(1, 3, 64, 64))
    every = torch.stack(parts.embed(levels, BOXES))
    own = assign(BOXES, levels.maps, 2)
    assert own.unique().tolist() == [0, 1]
    expected = every.gather(0, own[None, ..., None].expand(1, -1, -1, 16))[0]
    torch.testing.assert_close(parts.embed_assigned(levels, BOXES), expected, rtol=1e-4, atol=1e-5)
    assert parts.embed_assigned(levels, BOXES[:, :0]).shape == (1, 0, 16)


def test_a_tail_travels_in_the_bundle(tmp_path: Path) -> None:
    model = cnn("convnext")
    parts = make_parts(TAIL, model, 16)
    with torch.no_grad():
        for value in parts.parameters():
            value.add_(0.01)
    bundle = micro_bundle()
    bundle.model, bundle.parts = model, {NAME: parts}
    vision = {"timm_model_name": CNNS["convnext"], "image_size": 64, "timm_pool": "avg", "timm_proj": "linear"}
    vocabulary = {"vocab_size": MICRO["text_cfg"]["vocab_size"]}
    bundle.model_cfg = {**MICRO, "vision_cfg": vision, "text_cfg": {**MICRO["text_cfg"], **vocabulary}}
    found = load_parts(save_bundle(bundle, tmp_path / "bundle"), cnn("convnext"))
    assert found.config == TAIL
    assert all(torch.equal(found.state_dict()[name], value) for name, value in parts.state_dict().items())


def test_a_tail_needs_a_cnn_and_options_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="the last stage of the image tower VisionTransformer cannot be taken"):
        make_parts(TAIL, instantiate(MICRO), 16)
    for options in ({"convs": 1}, {"hidden": 7}, {"residual": True}):
        with pytest.raises(ConfigError, match="has no effect with tail=true"):
            PartsConfig.model_validate({"tail": True, **options})
    assert PartsConfig.model_validate(json.loads(TAIL.model_dump_json())) == TAIL, "as saved, defaults written out"
