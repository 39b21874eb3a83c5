"""FLOPs against counts by hand, peaks against data sheets."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vlp.flops import Peak, StepFlops, count, device_peak, listed_peak, mfu
from vlp.models import ModelConfig, build_model, instantiate
from vlp.testing import MICRO, MICRO_BERT


def test_a_linear_layer_costs_two_flops_per_weight_and_sample() -> None:
    """4 samples through 8 -> 16 with bias: 4 * 8 * 16 multiply-adds = 1024 FLOPs."""
    assert count(lambda: nn.Linear(8, 16)(torch.zeros(4, 8))) == 1024


def block_flops(tokens: int, width: int) -> int:
    """A block by hand, in multiply-adds: q, k, v and output 4 * T * W * W, the MLP of factor four 8 * T * W * W,
    scores and weighted sum T * T * W each."""
    return 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)


def test_a_vit_and_a_text_tower_by_hand() -> None:
    """MICRO, 16 px, patch 8: 4 patches of 3 * 64 values and a class token.

    Picture: patches 4 * 192 * 32, one block of 5 tokens, projection 32 * 16. Text: one block of 12 tokens, projection.
    Forward and backward: three times that.
    """
    image = 2 * 4 * 192 * 32 + block_flops(5, 32) + 2 * 32 * 16
    text = block_flops(12, 32) + 2 * 32 * 16
    assert (image, text) == (49_152 + 126_080 + 1_024, 313_344 + 1_024)
    flops = StepFlops(instantiate(MICRO))
    assert flops.sample(16, 12) == 3 * (image + text)
    assert flops.sample(16, 12) == 3 * (image + text), "the second answer comes from memory"


def test_shorter_text_and_smaller_pictures_cost_less() -> None:
    """Text of 5 tokens instead of 12 in a tower of its own, where the trainer may trim it."""
    flops = StepFlops(instantiate({**MICRO, "custom_text": True}))
    assert flops.sample(16, 12) - flops.sample(16, 5) == 3 * (block_flops(12, 32) - block_flops(5, 32))


def test_a_frozen_trunk_costs_its_forward_pass_and_the_model_stays_as_it_was() -> None:
    model, _ = build_model(ModelConfig(name="starter-small"), 64, 16, 600)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pixels, tokens = torch.zeros(1, 3, 64, 64), torch.zeros(1, 16, dtype=torch.int64)
    image, text = count(lambda: model.eval().visual(pixels)), count(lambda: model.eval().text(tokens))  # type: ignore[operator]
    assert text == block_flops(16, 128) + 2 * 128 * 128, "a block and a projection"
    assert StepFlops(model.train()).sample(64, 16) == 3 * image + 3 * text
    model.get_submodule("visual.trunk").requires_grad_(False)
    assert StepFlops(model).sample(64, 16) == image + 3 * text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_a_frozen_tower_of_open_clip_costs_its_forward_pass() -> None:
    model = instantiate(MICRO)
    whole = StepFlops(model).sample(16, 12)
    model.get_submodule("visual").requires_grad_(False)
    image = count(lambda: model.visual(torch.zeros(1, 3, 16, 16)))  # type: ignore[operator]
    assert whole - StepFlops(model).sample(16, 12) == 2 * image


def test_a_hugging_face_text_tower_is_counted(tmp_path: Path) -> None:
    """BERT, 6 tokens, width 32, MLP of 64: 4 * T * W * W and 2 * T * W * 64 multiply-adds, attention 2 * T * T * W."""
    (tmp_path / "config.json").write_text(json.dumps(MICRO_BERT))
    flops = StepFlops(instantiate({**MICRO, "text_cfg": {"hf_model_name": str(tmp_path), "hf_proj_type": None}}))
    text = 2 * (4 * 6 * 32**2 + 2 * 6 * 32 * 64 + 2 * 6**2 * 32)
    assert flops.sample(16, 6) == 3 * (49_152 + 126_080 + 1_024) + 3 * text


@pytest.mark.parametrize(
    ("name", "precision", "matmul", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "amp_bf16", "highest", 311.9),
        ("NVIDIA A100-SXM4-80GB", "fp32", "highest", 19.5),
        ("NVIDIA A100-SXM4-80GB", "fp32", "medium", 156.0),
        ("NVIDIA H100 PCIe", "amp_bf16", "highest", 756.0),
        ("NVIDIA H100 80GB HBM3", "bf16", "highest", 989.4),
        ("NVIDIA H200", "amp_bf16", "highest", 989.4),
        ("NVIDIA GH200 480GB", "amp_bf16", "highest", 989.4),
        ("NVIDIA L4", "amp_bf16", "highest", 121.0),
        ("NVIDIA L40S", "amp_bf16", "highest", 362.1),
        ("Tesla T4", "amp_bf16", "highest", 65.1),
        ("Tesla V100-SXM2-16GB", "fp32", "medium", 15.7),
        ("NVIDIA GeForce RTX 4090", "amp_bf16", "highest", 165.2),
        ("AMD Instinct MI300X", "amp_bf16", "highest", None),
    ],
)
def test_peaks_are_found_by_the_names_gpus_give_themselves(
    name: str, precision: str, matmul: str, expected: float | None
) -> None:
    assert listed_peak(name, precision, matmul) == expected


def test_utilisation_is_achieved_over_peak_and_a_cpu_measures_its_own() -> None:
    """100 samples of 2 GFLOP a second on a device of 1 TFLOP/s: a fifth."""
    assert mfu(100, 2e9, Peak(1e12, "data sheet")) == pytest.approx(0.2)
    peak = device_peak(torch.device("cpu"), "fp32")
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e15
    assert device_peak(torch.device("cpu"), "fp32") is peak
