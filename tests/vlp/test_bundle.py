"""Bundles: saved, loaded, exported, damaged, newer."""

import json
from pathlib import Path

import pytest
import torch

from data_pipelines.errors import BundleError, ConfigError
from data_pipelines.preprocess import ImageConfig, load_image, normalise
from data_pipelines.testing import draw
from data_pipelines.tokens import clip_tokenizer
from vlp.bundle import CONFIG, INFO, VOCABULARY, WEIGHTS, Bundle, load_bundle, save_bundle
from vlp.export import export_open_clip
from vlp.infer import classify, encode_images, encode_texts, label_head
from vlp.models import ModelConfig, build_model, instantiate, own_configs, resolve_config
from vlp.testing import WORDS, micro_bundle
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402

PICTURES = [draw((50, 40), format="JPEG", seed=seed) for seed in range(3)]


def features(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    return encode_images(bundle, PICTURES), encode_texts(bundle, WORDS)


def same_features(left: Bundle, right: Bundle) -> bool:
    return all(torch.equal(a, b) for a, b in zip(features(left), features(right), strict=True))


def test_a_bundle_survives_saving_and_replaces_the_one_before(tmp_path: Path) -> None:
    bundle = micro_bundle()
    folder = save_bundle(bundle, tmp_path / "runs" / "bundle")
    assert same_features(load_bundle(folder), bundle)
    assert same_features(load_bundle(tmp_path / "runs"), bundle), "a run folder stands for its bundle"
    save_bundle(micro_bundle(seed=1), folder)
    assert not same_features(load_bundle(folder), bundle)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["bundle"], "no temporary folder stays"
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir()), "another user may serve it"


def test_open_clip_loads_the_export_with_equal_features(tmp_path: Path) -> None:
    bundle = micro_bundle()
    folder = export_open_clip(bundle, tmp_path / "export")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = [*WORDS, "", "a very long text " * 20, "größer &amp; schöner", "Red CIRCLE"]
    assert torch.equal(tokenizer(texts), bundle.tokenizer(texts))
    pixels = torch.stack([load_image(data, bundle.image) for data in PICTURES])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (bundle.image.mean, bundle.image.std))
    with torch.inference_mode():
        theirs = model.eval().encode_image((pixels / 255 - mean) / std, normalize=True)
        torch.testing.assert_close(theirs, encode_images(bundle, PICTURES), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            model.encode_text(tokenizer(texts), normalize=True), encode_texts(bundle, texts), rtol=1e-5, atol=1e-5
        )
    assert tuple(preprocess.transforms[-1].mean) == bundle.image.mean


def test_open_clip_reads_clips_own_vocabulary_from_the_export(tmp_path: Path) -> None:
    """Capitals and the exclamation mark, whose entry CLIP pads with, included; what pads behind the end is free."""
    micro = micro_bundle()
    tokenizer = clip_tokenizer(20)
    config = {**micro.model_cfg, "text_cfg": {**micro.model_cfg["text_cfg"], "vocab_size": 49408, "context_length": 20}}
    torch.manual_seed(0)
    bundle = Bundle("words", instantiate(config).eval(), config, micro.image, tokenizer)
    folder = export_open_clip(bundle, tmp_path / "export")
    texts = ["Red CIRCLE!", "hello! world !", "", "a very long text " * 20]
    theirs, ours = open_clip.get_tokenizer(f"local-dir:{folder}")(texts), tokenizer(texts)
    written = ours.argmax(dim=1, keepdim=True) >= torch.arange(20)
    assert torch.equal(theirs[written], ours[written])
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_text(theirs, normalize=True), encode_texts(bundle, texts))
    assert torch.equal(load_bundle(folder).tokenizer(texts)[written], ours[written])


def test_a_timm_tower_with_our_arguments_survives_export_and_moving(tmp_path: Path) -> None:
    tokenizer = micro_bundle().tokenizer
    torch.manual_seed(0)
    model, config = build_model(ModelConfig(name="starter-small"), 64, 12, tokenizer.vocab_size)
    bundle = Bundle("small", model.eval(), config, ImageConfig(size=64, resize="longest"), tokenizer)
    folder = export_open_clip(bundle, tmp_path / "export")
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    pixels = torch.stack([load_image(data, bundle.image) for data in PICTURES])
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs.encode_image(normalise(pixels, bundle.image), normalize=True), encode_images(bundle, PICTURES)
        )
    saved = save_bundle(bundle, tmp_path / "bundle")
    moved = saved.rename(tmp_path / "elsewhere")
    assert same_features(load_bundle(moved), bundle)
    again = save_bundle(load_bundle(moved), tmp_path / "again")
    assert same_features(load_bundle(again), bundle)


def test_an_exported_folder_is_a_bundle_too(tmp_path: Path) -> None:
    bundle = micro_bundle()
    folder = export_open_clip(bundle, tmp_path / "export")
    assert not (folder / INFO).exists()
    assert same_features(load_bundle(folder), bundle)
    with pytest.raises(BundleError, match="not empty"):
        export_open_clip(bundle, folder)


def test_an_open_clip_folder_with_clips_own_vocabulary_loads(tmp_path: Path) -> None:
    model_cfg = resolve_config(ModelConfig(config={
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}))  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / WEIGHTS)
    bundle = load_bundle(tmp_path)
    assert bundle.image.mean == (0.5, 0.5, 0.5)
    assert bundle.image.size == 32
    with torch.inference_mode():
        theirs = model.eval().encode_text(open_clip.get_tokenizer("ViT-B-32")(list(WORDS)), normalize=True)
    torch.testing.assert_close(encode_texts(bundle, WORDS), theirs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_bundle(micro_bundle(), tmp_path / "bundle")


def test_a_bundle_of_a_newer_format_asks_for_an_upgrade(saved: Path) -> None:
    info = json.loads((saved / INFO).read_text())
    (saved / INFO).write_text(json.dumps({**info, "format": 99, "unheard": 1}))
    with pytest.raises(BundleError, match="format 99.*upgrade"):
        load_bundle(saved)


def test_damage_is_found_and_named(saved: Path) -> None:
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(BundleError, match="sha256"):
        load_bundle(saved)
    (saved / INFO).unlink()
    (saved / WEIGHTS).write_bytes(content[:100])
    with pytest.raises(BundleError, match=WEIGHTS):
        load_bundle(saved)
    (saved / CONFIG).write_text("{")
    with pytest.raises(BundleError, match="JSON"):
        load_bundle(saved)


def test_missing_parts_are_named(saved: Path, tmp_path: Path) -> None:
    (saved / VOCABULARY).unlink()
    with pytest.raises(BundleError, match=VOCABULARY):
        load_bundle(saved)
    with pytest.raises(BundleError, match="no such folder"):
        load_bundle(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="did training finish"):
        load_bundle(tmp_path / "empty")


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle"):
        save_bundle(micro_bundle(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_classification_is_a_softmax_over_cosines() -> None:
    bundle = micro_bundle()
    images, head = encode_images(bundle, PICTURES), label_head(bundle, WORDS, ("{}", "a photo of a {}"))
    assert torch.allclose(head.norm(dim=1), torch.ones(len(WORDS)))
    probabilities, cosines = classify(bundle, images, head)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(3))
    assert torch.allclose(cosines, images @ head.T)


OWN = [name for name in own_configs() if "hf_model_name" not in resolve_config(ModelConfig(name=name))["text_cfg"]]
"""Those that need no pinned tower; test_frozen builds the others."""


@pytest.mark.parametrize("name", OWN)
def test_our_sizes_are_buildable(name: str) -> None:
    model, _ = build_model(ModelConfig(name=name), image_size=64, context_length=16, vocab_size=600)
    assert sum(p.numel() for p in model.parameters()) > 1000


@pytest.mark.parametrize("name", ["RN50", "ViT-S-16"])
def test_open_clips_configs_build(name: str) -> None:
    model, config = build_model(ModelConfig(name=name), image_size=32, context_length=8, vocab_size=100)
    assert config["vision_cfg"]["image_size"] == 32
    assert model.get_parameter("token_embedding.weight").shape[0] == 100


def test_timm_image_towers_build() -> None:
    config = {
        "embed_dim": 8,
        "vision_cfg": {"timm_model_name": "test_resnet"},
        "text_cfg": {"width": 32, "heads": 2, "layers": 1},
    }
    model, _ = build_model(ModelConfig(config=config), image_size=32, context_length=8, vocab_size=100)
    assert model.get_submodule("visual")(torch.zeros(2, 3, 32, 32)).shape == (2, 8)


def test_unknown_models_and_towers_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'ViT-Z-99'.*starter.*ViT-B-32"):
        resolve_config(ModelConfig(name="ViT-Z-99"))
    with pytest.raises(ConfigError, match=r"image_weights='nope'"):
        build_model(ModelConfig(name="starter-micro", image_weights="nope"), 64, 16, 600)
    with pytest.raises(ConfigError, match=r"lock_image_unlocked_groups=1 has no effect without model.lock_image"):
        ModelConfig(name="starter-micro", lock_image_unlocked_groups=1)
