"""Places of a picture in the space of the texts: exact where a mean is pooled, by hand where attention is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.errors import ConfigError
from vlp.detection.dense import dense_features, project_places
from vlp.models import ModelDict, instantiate
from vlp.models.lean import LeanModel
from vlp.testing import MICRO, MICRO_COCA


def timm_model(name: str, size: int, pool: str = "avg", proj: str = "linear", **arguments: Any) -> ModelDict:
    """A model_cfg with a timm tower."""
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return {**MICRO, "custom_text": True, "vision_cfg": vision | ({"timm_model_args": arguments} if arguments else {})}


SMALL_VIT: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
SMALL_RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
SMALL_EVA: dict[str, Any] = {**SMALL_VIT, "img_size": 28}
SMALL_SWIN: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
MEANS: dict[str, ModelDict] = {
    "open_clip vit": {**MICRO, "vision_cfg": {**MICRO["vision_cfg"], "pool_type": "avg"}},
    "timm resnet": timm_model("test_resnet", 64),
    "timm efficientnet": timm_model("test_efficientnet", 64, ""),
    "timm nhwc": timm_model("swin_tiny_patch4_window7_224", 32, **SMALL_SWIN),
    "timm vit": timm_model("vit_tiny_patch16_224", 32, "avg", **SMALL_VIT),
}  # fmt: skip
OTHERS: dict[str, ModelDict] = {
    "open_clip vit by token": {**MICRO, "vision_cfg": {**MICRO["vision_cfg"], "layers": 2}},
    "coca": MICRO_COCA,
    "open_clip resnet": {**MICRO, "vision_cfg": SMALL_RESNET},
    "timm vit by token": timm_model("vit_tiny_patch16_224", 32, "token", **SMALL_VIT),
    "timm vit by map": timm_model("vit_base_patch16_siglip_224", 32, "map", "none", **SMALL_VIT),
    "timm eva by token": timm_model("eva02_tiny_patch14_224", 28, "token", **SMALL_EVA),
    "timm resnet by attention": timm_model("resnet18", 64, "abs_attn", "", channels=(16, 16, 16, 64)),
    "timm resnet by rotary attention": timm_model("resnet18", 64, "rot_attn", "", channels=(16, 16, 16, 64)),
}  # fmt: skip


def model_of(config: ModelDict) -> tuple[Any, Tensor]:
    """A model in eval mode and two pictures of its size, as it takes them."""
    torch.manual_seed(0)
    side = config["vision_cfg"]["image_size"]
    return instantiate(config).eval(), torch.randn(2, 3, side, side)


@pytest.mark.parametrize("name", MEANS)
def test_the_mean_over_places_is_the_picture_where_a_mean_is_pooled(name: str) -> None:
    model, pixels = model_of(MEANS[name])
    found = dense_features(model, pixels)
    assert found.shape[2:] > (1, 1)
    torch.testing.assert_close(found.mean(dim=(2, 3)), model.encode_image(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_towers_that_pool_by_attention_have_places_too(name: str) -> None:
    """In the shared space, each of its own, with gradients down to the first layer; a lean model gives the same."""
    model, pixels = model_of(OTHERS[name])
    found = dense_features(model, pixels)
    assert found.shape[:2] == (2, model.encode_image(pixels).shape[1])
    assert found.shape[2:] > (1, 1)
    assert (found[..., 0, 0] - found[..., -1, -1]).abs().max() > 1e-4
    assert torch.equal(dense_features(LeanModel(model), pixels), found)
    found.square().sum().backward()
    first = next(parameter for name, parameter in model.visual.named_parameters() if parameter.ndim == 4)
    assert first.grad is not None
    assert first.grad.abs().max() > 0


def by_hand(attention: Any, normed: Tensor) -> Tensor:
    """The value projection alone, of open_clip's or timm's attention."""
    if isinstance(attention, nn.MultiheadAttention):
        weight, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
        return F.linear(F.linear(normed, weight, bias), attention.out_proj.weight, attention.out_proj.bias)
    weight, bias = attention.qkv.weight.chunk(3)[2], attention.qkv.bias.chunk(3)[2]
    projected: Tensor = attention.proj(F.linear(normed, weight, bias))
    return projected


def test_open_clips_last_block_is_its_value_projection() -> None:
    """MaskCLIP: x + out(value(ln_1 x)), then the MLP, ln_post and the projection; of every patch."""
    model, pixels = model_of(OTHERS["open_clip vit by token"])
    tower = model.visual
    with torch.no_grad():
        first, last = tower.transformer.resblocks
        tokens = first(tower._embeds(pixels))[:, 1:]
        mixed = tokens + by_hand(last.attn, last.ln_1(tokens))
        expected = tower.ln_post(mixed + last.mlp(last.ln_2(mixed))) @ tower.proj
        found = dense_features(model, pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_timms_last_block_is_its_value_projection() -> None:
    model, pixels = model_of(OTHERS["timm vit by token"])
    trunk = model.visual.trunk
    with torch.no_grad():
        tokens = trunk.blocks[0](trunk._pos_embed(trunk.patch_embed(pixels)))[:, trunk.num_prefix_tokens :]
        last = trunk.blocks[1]
        mixed = tokens + by_hand(last.attn, last.norm1(tokens))
        expected = model.visual.head(trunk.norm(mixed + last.mlp(last.norm2(mixed))))
        found = dense_features(model, pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_attention_pools_project_values_without_positions() -> None:
    """ModifiedResNet's pool, and CoCa's, whichever of its queries asks."""
    model, pixels = model_of(OTHERS["open_clip resnet"])
    places = torch.randn(2, 256, 3, 4)
    pool = model.visual.attnpool
    expected = pool.c_proj(pool.v_proj(places.flatten(2).transpose(1, 2))).transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(project_places(model.visual, places), expected)
    model, pixels = model_of(MICRO_COCA)
    tower = model.visual
    with torch.no_grad():
        tokens = tower.transformer(tower._embeds(pixels))[:, 1:]
        pooler = tower.attn_pool
        answers = torch.stack([pooler(tokens[:, place : place + 1]) for place in range(4)], dim=1)
        torch.testing.assert_close(answers[:, :, 0], answers[:, :, -1])
        expected = (tower.ln_post(answers[:, :, 0]) @ tower.proj).transpose(1, 2).unflatten(2, (2, 2))
        torch.testing.assert_close(dense_features(model, pixels), expected, rtol=1e-4, atol=1e-5)


def test_sizes_and_towers_that_are_not_taken_are_named() -> None:
    model, _ = model_of(MEANS["timm resnet"])
    assert dense_features(model, torch.randn(1, 3, 96, 160)).shape == (1, 16, 3, 5)
    model, _ = model_of(OTHERS["open_clip vit by token"])
    with pytest.raises(ConfigError, match="no pictures of 40 x 24 pixels"):
        dense_features(model, torch.randn(1, 3, 40, 24))
    model.visual = nn.Identity()
    with pytest.raises(ConfigError, match=r"image tower \(Identity\) has no places"):
        dense_features(model, torch.randn(1, 3, 16, 16))
