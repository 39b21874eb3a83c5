"""Schedules, parameter groups and optimisers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_pipelines.errors import ConfigError
from vlp.checkpoint import load_checkpoint, save_checkpoint
from vlp.distributed import full_optimizer_state, load_full_optimizer_state
from vlp.models import instantiate
from vlp.optim import (
    Ema,
    OptimConfig,
    build_optimizer,
    layer_scales,
    learning_rate,
    load_numbers,
    names,
    numbers_of,
    parameter_groups,
    set_rate,
)
from vlp.testing import MICRO


def rates(total: int, **options: object) -> list[float]:
    config = OptimConfig.model_validate({"lr": 1.0, **options})
    return [learning_rate(step, total, config) for step in range(total)]


def test_schedules_by_hand() -> None:
    """Warm-up of two steps: a half, the whole. Then, over eight steps or with the root of the steps."""
    cosine = rates(10, warmup=2, schedule="cosine")
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.5), "half of the eight steps after the warm-up: (1 + cos(pi / 2)) / 2"
    assert rates(10, warmup=2, schedule="constant")[1:] == [1.0] * 9
    wsd = rates(10, warmup=2, schedule="wsd", cooldown=0.4, final_lr=0.2)
    assert wsd[2:7] == [1.0] * 5
    assert wsd[7:] == pytest.approx([0.2 + 0.8 * 0.75, 0.2 + 0.8 * 0.5, 0.2 + 0.8 * 0.25])
    rsqrt = rates(100, warmup=4, schedule="rsqrt", cooldown=0.0)
    assert rsqrt[16] == pytest.approx(0.5), "sqrt(4 / (4 + 12))"


@pytest.mark.parametrize(
    "options", [{"schedule": "constant", "final_lr": 0.1}, {"schedule": "cosine", "cooldown": 0.5}]
)
def test_an_option_without_effect_is_an_error(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="no effect with optim.schedule"):
        OptimConfig.model_validate(options)


def test_layers_learn_slower_the_lower_they_lie() -> None:
    """Two blocks above the embeddings in one tower, one in the other: the exponents are counted by hand."""
    names = [
        "visual.conv1.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "visual.transformer.resblocks.1.mlp.c_fc.weight", "visual.ln_post.weight", "visual.proj",
        "token_embedding.weight", "positional_embedding", "transformer.resblocks.0.attn.in_proj_weight",
        "ln_final.weight", "text_projection", "logit_scale",
    ]  # fmt: skip
    exponents = [3, 2, 1, 0, 0, 2, 2, 1, 0, 0, 0]
    assert layer_scales(names, 0.5) == {name: 0.5**n for name, n in zip(names, exponents, strict=True)}


def test_timm_and_hugging_face_names_are_known() -> None:
    names = [
        "visual.trunk.stem.conv.weight", "visual.trunk.stages.0.blocks.0.w", "visual.trunk.stages.0.blocks.1.w",
        "visual.trunk.stages.1.blocks.0.w", "text.transformer.embeddings.word_embeddings.weight",
        "text.transformer.encoder.layer.0.w", "text.transformer.encoder.layer.1.w", "text.proj.weight",
    ]  # fmt: skip
    exponents = [4, 3, 2, 1, 3, 2, 1, 0]
    assert layer_scales(names, 0.5) == {name: 0.5**n for name, n in zip(names, exponents, strict=True)}


def test_resnets_of_open_clip_have_three_convolutions_below() -> None:
    """The pool on top has positions of its own; timm's EfficientNets have a bn2 on top."""
    names = [
        "visual.conv1.weight", "visual.bn2.weight", "visual.conv3.weight", "visual.layer1.0.conv2.weight",
        "visual.layer2.0.bn1.weight", "visual.attnpool.positional_embedding",
    ]  # fmt: skip
    assert layer_scales(names, 0.5) == {name: 0.5**n for name, n in zip(names, [3, 3, 3, 2, 1, 0], strict=True)}
    names = ["visual.trunk.conv_stem.weight", "visual.trunk.blocks.0.0.w", "visual.trunk.bn2.weight"]
    assert list(layer_scales(names, 0.5).values()) == [0.25, 0.5, 1.0]


def test_positions_and_tokens_do_not_decay() -> None:
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.zeros(1, 2, 3)) for name in ("pos_embed", "cls_token", "reg_token", "patch_embed")}
    )
    groups = parameter_groups(model, nn.Identity(), OptimConfig(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.items()} == {
        "pos_embed": 0.0, "cls_token": 0.0, "reg_token": 0.0, "patch_embed": 0.3,
    }  # fmt: skip


def test_rates_and_decay_reach_the_right_parameters() -> None:
    model = instantiate(MICRO)
    config = OptimConfig(layer_decay=0.5, weight_decay=0.3)
    optimizer = build_optimizer(model, nn.Identity(), config)
    set_rate(optimizer, 1e-2)
    by_name = {id(p): name for name, p in model.named_parameters()}
    found = {by_name[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    assert found["visual.conv1.weight"]["lr"] == 1e-2 * 0.25
    assert found["visual.transformer.resblocks.0.ln_1.weight"]["lr"] == 1e-2 * 0.5
    assert found["logit_scale"]["lr"] == 1e-2
    assert found["visual.conv1.weight"]["weight_decay"] == 0.3
    assert {found[name]["weight_decay"] for name in ("token_embedding.weight", "ln_final.weight", "logit_scale")} == {0}


@pytest.mark.parametrize("name", names())
def test_optimisers_resume_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Two steps, a checkpoint, two more: as four steps without a break. Groups may be cut otherwise after it."""
    torch.manual_seed(0)
    model = instantiate(MICRO)
    options = {"betas": (0.98, 0.92, 0.99)} if "adan" in name else {}
    config = OptimConfig(name=name, lr=1e-3, options=options)
    gradients = [[torch.randn_like(p) for p in model.parameters()] for _ in range(4)]

    def step(optimizer: torch.optim.Optimizer, model: nn.Module, number: int) -> None:
        for parameter, gradient in zip(model.parameters(), gradients[number], strict=True):
            parameter.grad = gradient.clone()
        set_rate(optimizer, 1e-3 / (number + 1))
        optimizer.step()

    first = build_optimizer(model, nn.Identity(), config)
    before = copy.deepcopy(model.state_dict())
    for number in (0, 1):
        step(first, model, number)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    named = dict(model.named_parameters())
    tensors = {"model": model.state_dict(), "optimizer": full_optimizer_state(first, named)}
    state: Any
    tensors, state = load_checkpoint(save_checkpoint(tmp_path, 2, tensors, {"optimizer": numbers_of(first, named)}))
    other = instantiate(MICRO)
    other.load_state_dict(tensors["model"])
    second = build_optimizer(other, nn.Identity(), config)
    load_full_optimizer_state(second, dict(other.named_parameters()), tensors["optimizer"])
    load_numbers(second, dict(other.named_parameters()), state["optimizer"])
    for number in (2, 3):
        step(first, model, number)
        step(second, other, number)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("name", ["kron", "adahessian", "fusedadam", "bnbadam8bit"])
def test_optimisers_that_cannot_be_resumed_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.name: '{name}' cannot be saved and resumed; known: adamw, .*lamb"):
        build_optimizer(instantiate(MICRO), nn.Identity(), OptimConfig(name=name))


def test_the_average_of_bfloat16_weights_moves() -> None:
    """By 0.001 of a distance of 1: bfloat16 holds no 1.001."""
    model = nn.Linear(1, 1).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = Ema(model, 0.999)
    ema.updates = 10**6
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(3):
        ema.update(model)
    assert float(ema.shadow["weight"]) == pytest.approx(2 - 0.999**3, abs=1e-6)


def test_unknown_names_and_options_are_named() -> None:
    model = instantiate(MICRO)
    with pytest.raises(ConfigError, match=r"optim\.name: 'adamq' is unknown; known: adamw, .*lion"):
        build_optimizer(model, nn.Identity(), OptimConfig(name="adamq"))
    with pytest.raises(ConfigError, match=r"optim\.options=.*nonsense"):
        build_optimizer(model, nn.Identity(), OptimConfig(options={"nonsense": 1}))
