"""Multispectral and radar pictures through the whole house: folder of .npy, shards, training, bundle, evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from data_pipelines.cli import shard
from data_pipelines.errors import BundleError
from data_pipelines.preprocess import ImageConfig
from vlp.bundle import load_bundle, save_bundle
from vlp.evals import evaluate
from vlp.export import export_open_clip
from vlp.infer import encode_images
from vlp.recipe import validate
from vlp.report import load_gallery, picture_sheet
from vlp.testing import MICRO
from vlp.torchvision_guard import ensure_torchvision
from vlp.train import train

ensure_torchvision()
import open_clip  # noqa: E402

CLASSES = ("water", "forest", "crops", "town")
KINDS: dict[str, dict[str, Any]] = {
    # 13 bands of Sentinel-2 as reflectance times 10,000; 2 bands of Sentinel-1 in decibels, interleaved
    "multispectral": {"channels": 13, "values": "float32", "scale": 1, "mean": (5000,) * 13, "std": (2500,) * 13},
    "radar": {"channels": 2, "values": "float32", "scale": 1, "mean": (-15, -20), "std": (5, 5), "layout": "hwc"},
}
TIMM = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "test_resnet"}, "text_cfg": MICRO["text_cfg"]}


def scene(kind: str, number: int) -> np.ndarray[Any, Any]:
    """Every class has a spectrum of its own, plus noise."""
    draw = np.random.default_rng(number)
    spectrum = np.random.default_rng(1000 + number % len(CLASSES))
    if kind == "radar":
        level = -25 + 15 * spectrum.random((1, 1, 2))
        return (level + draw.normal(0, 1, (20, 24, 2))).astype(np.float32)
    level = 10_000 * spectrum.random((13, 1, 1))
    return np.clip(level + draw.normal(0, 300, (13, 20, 24)), 0, 65535).astype(np.uint16)


def shards_of(kind: str, folder: Path) -> Path:
    source = folder / "scenes"
    source.mkdir()
    for number in range(32):
        np.save(source / f"{number:02}.npy", scene(kind, number))
        (source / f"{number:02}.txt").write_text(CLASSES[number % len(CLASSES)])
    outcome = CliRunner().invoke(shard, [str(source), "--out", str(folder / "shards")])
    assert outcome.exit_code == 0, outcome.output
    return folder / "shards"


@pytest.mark.parametrize(("kind", "config"), [("multispectral", MICRO), ("multispectral", TIMM), ("radar", MICRO)])
def test_training_on_other_bands_ends_in_a_bundle_that_works(kind: str, config: Any, tmp_path: Path) -> None:
    """Forty steps tell four spectra apart; the saved bundle gives the same answers, from .npy bytes as well."""
    shards = shards_of(kind, tmp_path)
    image = ImageConfig(size=16, **KINDS[kind])
    recipe = validate({
        "data": {
            "train": str(shards), "batch_size": 16, "image": image.model_dump(),
            "augment": {"flip": 0.5, "rotate": 5, "ground": 0},
        },
        "tokenizer": {"kind": "learn", "vocab_size": 300, "context_length": 12},
        "model": {"config": config},
        "objective": {"name": "clip", "mask": "captions"},
        "optim": {"lr": 3e-3, "warmup": 0, "schedule": "constant"},
        "run": {"steps": 40, "precision": "fp32", "threads": 1, "save_every": 0},
    })  # fmt: skip
    train(recipe, tmp_path / "run", show=False)
    bundle = load_bundle(tmp_path / "run")
    metrics = evaluate(bundle, "retrieval", shards)
    assert metrics["image_to_text/R@1"] >= 0.9
    assert metrics["pictures"] == 32
    again = load_bundle(save_bundle(bundle, tmp_path / "bundle"))
    assert again.image == image
    gallery = load_gallery(bundle, shards)
    assert gallery is not None
    assert len(picture_sheet(gallery).axes) > 6, "bands that nobody can see are drawn as well"
    raw = [(tmp_path / "scenes" / f"{number:02}.npy").read_bytes() for number in range(3)]
    assert torch.equal(encode_images(again, raw), encode_images(bundle, raw))
    if config is MICRO:
        with pytest.raises(BundleError, match="RGB alone.*timm image tower"):
            export_open_clip(bundle, tmp_path / "export")
    else:
        theirs = open_clip.create_model(f"local-dir:{export_open_clip(bundle, tmp_path / 'export')}").eval()
        pixels = torch.randn(1, image.channels, 16, 16)
        with torch.inference_mode():
            assert torch.equal(theirs.encode_image(pixels), bundle.model.encode_image(pixels))  # type: ignore[operator]
