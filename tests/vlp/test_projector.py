"""Projectors, and towers taken apart: features and projection make the tower's own output bit for bit."""

from typing import Any

import pytest
import torch
from torch import nn

from vlp.heads.projector import BatchNorm, Tower, follow, mlp
from vlp.models import instantiate
from vlp.models.lean import LeanModel
from vlp.testing import MICRO, MICRO_BERT, MICRO_COCA, full_batch, network_input

TIMM = {**MICRO["vision_cfg"], "timm_model_name": "test_resnet", "timm_pool": "avg", "image_size": 16}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}
MODELS: dict[str, tuple[dict[str, Any], int | None, int | None]] = {
    "clip": (MICRO, 32, 32),
    "custom text": ({**MICRO, "custom_text": True}, 32, 32),
    "coca": (MICRO_COCA, 16, 16),
    "timm linear": ({**MICRO, "vision_cfg": {**TIMM, "timm_proj": "linear"}}, 96, 32),
    "timm mlp": ({**MICRO, "vision_cfg": {**TIMM, "timm_proj": "mlp"}}, 96, 32),
    "bias": ({**MICRO, "custom_text": True, "text_cfg": {**MICRO["text_cfg"], "proj_bias": True}}, 32, 32),
    "none": ({**MICRO, "text_cfg": {**MICRO["text_cfg"], "width": 16, "proj_type": "none"}}, 32, None),
}  # fmt: skip
"""Model config, F of its towers; None where features are the embedding."""


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lean", [False, True])
def test_features_and_projection_are_the_tower(name: str, lean: bool) -> None:
    config, *widths = MODELS[name]
    model: Any = instantiate(config).eval()
    encoder = LeanModel(model) if lean else model
    before = list(model.state_dict())
    pixels, batch = network_input(full_batch())
    sides = (("image", encoder.encode_image, pixels), ("text", encoder.encode_text, batch.tokens))
    for (side, encode, inputs), width in zip(sides, widths, strict=True):
        tower = Tower(model, side)
        features = tower.features(encode, inputs)
        assert tower.width == width
        assert features.shape == (6, width or 16)
        assert torch.equal(tower.project(features), encode(inputs, normalize=False))
    assert list(model.state_dict()) == before, "every projection is back in its place"


def test_a_projection_inside_the_pooling_stays_there() -> None:
    """open_clip's ResNets end in an attention pooling that projects: their features are the embedding."""
    model: Any = instantiate({**MICRO, "vision_cfg": RESNET}).eval()
    tower, pixels = Tower(model, "image"), torch.rand(2, 3, 32, 32)
    assert tower.width is None
    assert torch.equal(tower.features(model.encode_image, pixels), model.encode_image(pixels))


def test_a_failing_tower_gets_its_projection_back() -> None:
    model: Any = instantiate(MICRO)
    before = list(model.state_dict())
    with pytest.raises(RuntimeError):
        Tower(model, "image").features(model.encode_image, torch.rand(2, 5, 16, 16))
    assert list(model.state_dict()) == before


def test_text_tower_of_hugging_face(tmp_path: Any) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(MICRO_BERT))
    text = {
        "hf_model_name": str(tmp_path),
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "mlp",
        "context_length": 12,
    }
    model: Any = instantiate({**MICRO, "text_cfg": text}).eval()
    tower, tokens = Tower(model, "text"), full_batch().tokens
    assert tower.width == 32
    features = tower.features(model.encode_text, tokens)
    assert features.shape == (6, 32)
    assert torch.equal(tower.project(features), model.encode_text(tokens))


def test_projector_is_that_of_the_paper() -> None:
    layers = [type(layer).__name__ for layer in mlp([8, 6, 6, 4])]
    assert layers == ["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm", "ReLU", "Linear"]
    bare = mlp([8, 6, 4], bias=False, last=BatchNorm(4, affine=False))
    assert [name for name, _ in bare.named_parameters()] == ["0.weight", "1.weight", "1.bias", "3.weight"]


def test_batch_norm_by_hand() -> None:
    """Values 1 and 3: mean 2, variance 1, so -1 and 1 (but for epsilon); one value alone lies on its own mean."""
    norm = BatchNorm(1)
    torch.testing.assert_close(norm(torch.tensor([[1.0], [3.0]])), torch.tensor([[-1.0], [1.0]]), rtol=1e-4, atol=0)
    with torch.no_grad():
        norm.bias.fill_(0.5)
    assert norm(torch.tensor([[7.0]])).item() == 0.5
    assert BatchNorm(1, affine=False)(torch.tensor([[7.0]])).item() == 0.0


def test_a_copy_follows() -> None:
    """0.75 of 1 and 0.25 of 5 make 2."""
    copy, model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(copy.weight, 1.0)
    nn.init.constant_(model.weight, 5.0)
    follow(copy, model, 0.75)
    assert copy.weight.item() == 2.0
