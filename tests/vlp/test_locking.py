"""Locking and thawing: what trains is a function of the progress alone, for every kind of tower."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from data_pipelines.errors import ConfigError
from vlp.models import ModelConfig, build_model
from vlp.models.locking import apply, set_training
from vlp.testing import MICRO

TEXT = {"width": 32, "heads": 2, "layers": 3}
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {**MICRO["vision_cfg"], "layers": 3},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "timm_vit": {"timm_model_name": "test_vit"},
    "timm_resnet": {"timm_model_name": "test_resnet"},
}


def model_of(image: str = "vit", text: dict[str, Any] | None = None, custom: bool = False, **options: Any) -> Any:
    config = {"embed_dim": 16, "vision_cfg": IMAGES[image], "text_cfg": text or TEXT, "custom_text": custom}
    chosen = ModelConfig(config=config, **options)
    torch.manual_seed(0)
    return build_model(chosen, 64, 12, 320)[0], chosen


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("image", IMAGES)
def test_a_locked_image_tower_of_any_kind_does_not_move(image: str) -> None:
    """Neither weights nor batch-norm statistics, in training mode, after an update with weight decay."""
    model, _ = model_of(image, lock_image=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.train()
    set_training(model)
    out = (
        model.encode_image(torch.randn(4, 3, 64, 64)).square().sum() + model.encode_text(torch.ones(4, 12).long()).sum()
    )
    out.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert any(not key.startswith("visual.") for key in changed)
    assert {key for key in changed if key.startswith("visual.")} == (
        {"visual.head.proj.weight"} if image.startswith("timm") else set()
    )


@pytest.mark.parametrize("image", ["vit", "timm_vit", "timm_resnet"])
def test_the_last_groups_stay_unlocked(image: str) -> None:
    counts = []
    for groups in range(4):
        model, _ = model_of(image, lock_image=True, lock_image_unlocked_groups=groups)
        counts.append(sum(name.startswith("visual.") for name in trained(model)))
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[3]


def test_an_open_clip_resnet_is_locked_whole() -> None:
    with pytest.raises(ConfigError, match="lock_image_unlocked_groups=2.*set 0"):
        model_of("resnet", lock_image=True, lock_image_unlocked_groups=2)


@pytest.mark.parametrize("custom", [False, True])
def test_text_towers_lock_by_layers(custom: bool) -> None:
    """Groups from the end: 1 projection, 2 last block and norm, 3 the block before; then all of the image tower."""
    prefix = "text." if custom else ""
    for layers, expected in (
        (0, set()),
        (1, {"text_projection"}),
        (3, {"text_projection", "ln_final", "transformer.resblocks.2", "transformer.resblocks.1"}),
    ):
        model, _ = model_of(custom=custom, lock_text=True, lock_text_unlocked_layers=layers)
        text = {name for name in trained(model) if not name.startswith(("visual.", "logit_"))}
        starts = {start for start in expected if any(name.startswith(prefix + start) for name in text)}
        assert starts == expected
        assert all(name.startswith(tuple(prefix + start for start in expected)) for name in text)


@pytest.fixture
def bert_folder(tmp_path: Path) -> str:
    transformers.BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_hugging_face_text_towers_lock_by_layers(bert_folder: str) -> None:
    text = {"hf_model_name": bert_folder, "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    model, _ = model_of(text=text, lock_text=True)
    assert {name for name in trained(model) if name.startswith("text.")} == {"text.proj.weight"}
    model, _ = model_of(text=text, lock_text=True, lock_text_unlocked_layers=1)
    layers = {name.split(".")[4] for name in trained(model) if name.startswith("text.transformer.encoder.layer.")}
    assert layers == {"2"}
    assert not any("embeddings" in name for name in trained(model))
    everything, _ = model_of(text=text, lock_text=True, lock_text_unlocked_layers=4)
    assert len(trained(everything)) == len(list(everything.parameters()))


def test_thawing_depends_on_progress_alone() -> None:
    """Any order of calls, and a fresh model at once, give the same state: a resume cannot differ."""
    options: dict[str, Any] = {"lock_image": True, "thaw_image_at": 0.5, "lock_text": True, "thaw_text_at": 0.8}
    model, config = model_of("timm_resnet", **options)
    expected = {}
    for progress in (0.0, 0.3, 0.5, 0.79, 0.8, 1.0):
        fresh, _ = model_of("timm_resnet", **options)
        apply(fresh, config, progress)
        expected[progress] = trained(fresh)
    for progress in (0.8, 0.3, 1.0, 0.0, 0.79, 0.5):
        apply(model, config, progress)
        assert trained(model) == expected[progress], progress
    assert expected[0.0] == expected[0.3] < expected[0.5] == expected[0.79] < expected[0.8] == expected[1.0]
    assert len(expected[1.0]) == len(list(model.parameters()))
    assert apply(model, config, 0.49)
    assert not apply(model, config, 0.1)


def test_batch_norms_move_again_once_thawed() -> None:
    model, config = model_of("timm_resnet", lock_image=True, thaw_image_at=0.5)
    name = next(name for name, _ in model.named_buffers() if name.endswith("running_mean"))
    before = model.get_buffer(name).clone()
    set_training(model)
    model.encode_image(torch.randn(4, 3, 64, 64) + 3)
    assert torch.equal(model.get_buffer(name), before)
    assert apply(model, config, 0.5)
    set_training(model)
    model.encode_image(torch.randn(4, 3, 64, 64) + 3)
    assert not torch.equal(model.get_buffer(name), before)


def test_constants_stay_constants_when_a_tower_thaws() -> None:
    config = {**MICRO, "vision_cfg": {**MICRO["vision_cfg"], "pos_embed_type": "sin_cos_2d"}}
    chosen = ModelConfig(config=config, lock_image=True, lock_image_unlocked_groups=9, thaw_image_at=0.5)
    model, _ = build_model(chosen, 16, 12, 320)
    for progress in (0.0, 1.0):
        apply(model, chosen, progress)
        assert not model.get_parameter("visual.positional_embedding").requires_grad
        assert model.get_parameter("visual.conv1.weight").requires_grad


def test_options_without_effect_are_refused() -> None:
    for option, value in (
        ("lock_image_unlocked_groups", 1), ("lock_text_unlocked_layers", 1), ("thaw_image_at", 0.5),
        ("thaw_text_at", 0.5), ("stem", "mean"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"model.{option}=.*no effect without"):
            ModelConfig.model_validate({option: value})
