"""Every model config of open_clip builds and runs; on the meta device, where shapes are real and numbers are not."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from timm.layers.drop import DropPath

from data_pipelines.errors import ConfigError
from vlp.flops import StepFlops
from vlp.models import ModelConfig, build_model, resolve_config
from vlp.models.layout import set_channels_last
from vlp.recipe import dump, validate
from vlp.runlog import RunLog
from vlp.testing import MICRO
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
from open_clip import list_models  # noqa: E402

KINDS = (
    "ViT-B-32", "RN50", "ViT-S-32-alt", "ViT-L-14-CLIPA", "EVA01-g-14", "convnext_base", "swin_base_patch4_window7_224",
    "vit_medium_patch16_gap_256", "PE-Core-T-16-384", "ViTamin-S", "MobileCLIP-S1", "MobileCLIP-B", "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2", "coca_ViT-B-32", "roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32", "mt5-base-ViT-B-32",
    "nllb-clip-base", "coca_roberta-ViT-B-32",
)  # fmt: skip
"""One of every kind; test_every_config_of_open_clip takes all."""
SMALL: dict[str, Any] = {
    "roberta": transformers.RobertaConfig(
        vocab_size=1000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    ),
    "xlm": transformers.XLMRobertaConfig(
        vocab_size=1000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    ),
    "mt5": transformers.MT5Config(vocab_size=1000, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2),
    "nllb": transformers.M2M100Config(
        vocab_size=1000, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    ),
}  # fmt: skip
"""Start of a text tower's name on the hub -> a config of its kind."""


RANDOM = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.Dropout, DropPath)
"""What makes a rank's share of a batch differ from the same rows of the whole."""


def config_of(name: str, folder: Path) -> ModelConfig:
    """A config of open_clip; a Hugging Face text tower gets a folder of its kind."""
    hub = resolve_config(ModelConfig(name=name))["text_cfg"].get("hf_model_name")
    if hub is None:
        return ModelConfig(name=name)
    kind = next(kind for kind in SMALL if hub.rpartition("/")[2].startswith(kind))
    SMALL[kind].save_pretrained(folder / kind)
    return ModelConfig(name=name, text_tower=str(folder / kind))


def check(name: str, folder: Path) -> None:
    config = config_of(name, folder)
    given = resolve_config(config)
    size, length = given["vision_cfg"].get("image_size", 224), given["text_cfg"].get("context_length", 77)
    with torch.device("meta"):
        model, _ = build_model(config, size, length, 1000)
        image = model.eval().encode_image(torch.zeros(2, 3, size, size))  # type: ignore[operator]
    assert image.shape == (2, given["embed_dim"])
    tokens = torch.ones(2, length, dtype=torch.int64)
    if config.text_tower:  # these look at their mask's numbers, which meta does not have
        text = {**given, "vision_cfg": {**MICRO["vision_cfg"], "output_tokens": "multimodal_cfg" in given}}
        model, _ = build_model(ModelConfig(config=text), 16, length, 1000)
    else:
        tokens = tokens.to("meta")
    assert model.eval().encode_text(tokens).shape == (2, given["embed_dim"])  # type: ignore[operator]


@pytest.mark.parametrize("name", KINDS)
def test_a_config_of_every_kind(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ViT-B-16-SigLIP", 256),
        ("ViTamin-S", 320),
        ("EVA02-B-16", 256),
        ("swin_base_patch4_window7_224", 448),
        ("convnext_base", 96),
    ],
)
def test_timm_towers_take_other_sizes(name: str, size: int, tmp_path: Path) -> None:
    """Those built for one size are built for another, which their bundles then tell open_clip."""
    with torch.device("meta"):
        model, config = build_model(ModelConfig(name=name), size, 16, 1000)
        assert len(model.eval().encode_image(torch.zeros(2, 3, size, size))) == 2  # type: ignore[operator]
    fixed = name != "convnext_base"
    assert config["vision_cfg"].get("timm_model_args") == ({"img_size": size} if fixed else None)


def test_a_text_tower_that_knows_fewer_words_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    config = config_of("roberta-ViT-B-32", tmp_path)
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=r"has 1001 words, .*roberta' knows 1000: set tokenizer"),
    ):
        build_model(config, 224, 16, 1001)


def test_flops_of_an_attention_pool_are_counted() -> None:
    with torch.device("meta"):
        model, _ = build_model(ModelConfig(name="PE-Core-T-16-384"), 64, 16, 320)
    assert StepFlops(model).sample(64, 16) > 1e8


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_a_narrow_strided_convolution_of_points_survives_channels_last(channels: int) -> None:
    """As in MobileCLIP's stem; torch's own backward pass kills the process or writes beyond its memory."""
    plain = torch.nn.Conv2d(channels, 64, 1, stride=2)
    fast = set_channels_last(copy.deepcopy(plain), torch.device("cpu"))
    pixels_BCHW = torch.randn(4, channels, 256, 256)
    for model, layout in ((plain, torch.contiguous_format), (fast, torch.channels_last)):
        model(pixels_BCHW.contiguous(memory_format=layout)).square().mean().backward()
    torch.testing.assert_close(fast.get_parameter("weight").grad, plain.weight.grad)
    assert fast.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_config_of_open_clip(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("EVA01-g-14", "ViT-L-14-CLIPA")])
def test_a_config_of_every_kind_trains_on_one_and_two_ranks(name: str, starter_shards: Path, tmp_path: Path) -> None:
    """From shards, by the command; without batch norm and drop-out the ranks' losses are those of one process.

    Left out: those whose optimiser needs more than 8 GB.
    """
    config = config_of(name, tmp_path)
    given = resolve_config(config)
    recipe = validate({
        "data": {
            "train": str(starter_shards / "val"), "batch_size": 4,
            "image": {"size": given["vision_cfg"].get("image_size", 224), "resize": "longest"},
        },
        "tokenizer": {
            "kind": "learn", "vocab_size": 320, "context_length": given["text_cfg"].get("context_length", 77),
        },
        "model": config.model_dump(),
        "optim": {"lr": 1e-4, "warmup": 0},
        "run": {"steps": 2, "precision": "fp32", "log_every": 1, "save_every": 0},
    })  # fmt: skip
    found = []
    for ranks in (1, 2):
        folder, file = tmp_path / f"run{ranks}", tmp_path / "recipe.yaml"
        file.write_text(dump(recipe))
        command = [sys.executable, "-m", "vlp", "train", str(file), "--run-dir", str(folder), f"run.processes={ranks}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([row["loss"] for row in RunLog(folder).rows("metrics.jsonl")])
        shutil.rmtree(folder)
    assert len(found[0]) == len(found[1]) == 2
    with torch.device("meta"):
        model = build_model(config, 224, given["text_cfg"].get("context_length", 77), 320)[0]
    if not any(isinstance(module, RANDOM) and getattr(module, "p", 1) > 0 for module in model.modules()):
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
