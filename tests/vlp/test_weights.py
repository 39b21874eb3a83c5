"""Starting weights from local files: every form gives the features of the model they came from, or says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipelines.errors import BundleError, ConfigError
from data_pipelines.preprocess import ImageConfig
from data_pipelines.tokens import learn_tokenizer
from vlp.bundle import check_start, load_tokenizer, save_bundle
from vlp.export import export_open_clip
from vlp.models import ModelConfig, build_model, resolve_config
from vlp.models.config import Stem
from vlp.models.folders import find_bundle
from vlp.testing import MICRO, micro_bundle
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402
import timm  # noqa: E402
import transformers  # noqa: E402

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[300, 5, 9, 319, 0, 0, 0, 0, 0, 0, 0, 0], [300, 7, 319, 0, 0, 0, 0, 0, 0, 0, 0, 0]])


def build(weights: object = None, size: int = 16, length: int = 12, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    options = {"config": MICRO, **options} if "name" not in options else options
    config = ModelConfig(weights=str(weights) if weights else None, **options)
    return build_model(config, size, length, 320)[0].eval()


@torch.inference_mode()
def features(model: Any, pixels: Tensor = PIXELS, tokens: Tensor = TOKENS) -> tuple[Tensor, Tensor]:
    return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(features(left), features(right), strict=True))


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(7)
    return build_model(ModelConfig(config=MICRO), 16, 12, 320)[0].eval()


def write(model: nn.Module, form: str, folder: Path) -> Path:
    """The model's weights in one of the forms that people have."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if form == "open_clip folder":
        save_file(state, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MICRO}))
        return folder
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    path = folder / {"training": "epoch_1.pt", "bare": "weights.pth", "compiled": "weights.bin"}[form]
    content: dict[str, Any] = {
        "training": {"epoch": 3, "name": "x", "state_dict": {f"module.{key}": value for key, value in state.items()}},
        "bare": state,
        "compiled": {f"_orig_mod.{key}": value for key, value in state.items()},
    }[form]
    torch.save(content, path)
    return path


@pytest.mark.parametrize("form", ["training", "bare", "compiled", "safetensors", "open_clip folder"])
def test_every_form_of_weights_gives_the_same_features(form: str, teacher: nn.Module, tmp_path: Path) -> None:
    path = write(teacher, form, tmp_path)
    assert not same(build(), teacher)
    assert same(build(path), teacher)
    if path.is_file():  # open_clip's own loader agrees
        theirs = build()
        open_clip.load_checkpoint(theirs, str(path)) if form != "compiled" else theirs.load_state_dict(
            teacher.state_dict()
        )
        assert same(theirs, teacher)


def test_open_clip_starts_from_the_weights_file_of_an_export(tmp_path: Path) -> None:
    """`pretrained=FILE` reads the safetensors of the exported folder: no pickled .pt has to exist."""
    model, config = build_model(ModelConfig(name="ViT-S-32-alt"), 32, 77, 49408)
    torch.manual_seed(0)
    bundle = micro_bundle()
    bundle.model, bundle.model_cfg = model.eval(), config
    folder = export_open_clip(bundle, tmp_path / "export")
    file = folder / "open_clip_model.safetensors"
    theirs = open_clip.create_model("ViT-S-32-alt", pretrained=str(file), force_image_size=32).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(theirs.encode_image(pixels), model.encode_image(pixels))  # type: ignore[operator]


def test_training_goes_on_from_a_bundle_and_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = micro_bundle(seed=3)
    save_bundle(bundle, tmp_path / "run" / "bundle")
    for place in (tmp_path / "run", tmp_path / "run" / "bundle"):
        config = ModelConfig(name=f"local-dir:{place}", weights=str(place))
        model, model_cfg = build_model(config, 16, 12, bundle.tokenizer.vocab_size)
        assert model_cfg["vision_cfg"] == bundle.model_cfg["vision_cfg"]
        assert all(torch.equal(value, bundle.model.state_dict()[key]) for key, value in model.state_dict().items())
    tokenizer = load_tokenizer(tmp_path / "run")
    assert torch.equal(tokenizer(["red circle"]), bundle.tokenizer(["red circle"]))
    check_start(tmp_path / "run", tokenizer, bundle.image)
    assert not caplog.records
    check_start(tmp_path / "run", tokenizer, ImageConfig(size=64, mean=(0.5, 0.5, 0.5)))
    assert "data.image.mean=(0.48" in caplog.text
    with pytest.raises(ConfigError, match="token ids would mean other words.*tokenizer.kind=weights"):
        check_start(tmp_path / "run", learn_tokenizer(["other words"], 320, 12), bundle.image)
    with pytest.raises(ConfigError, match=r"knows 3\d\d tokens, the recipe's tokenizer 512: set tokenizer.kind"):
        build_model(config, 16, 12, 512)
    weights = tmp_path / "run" / "bundle" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match="sha256"):
        build_model(config, 16, 12, bundle.tokenizer.vocab_size)


def test_weights_go_in_and_out_of_models_with_a_text_tower_of_their_own(teacher: nn.Module, tmp_path: Path) -> None:
    path = write(teacher, "bare", tmp_path)
    custom = build(path, config={**MICRO, "custom_text": True})
    assert hasattr(custom, "text")
    for left, right in zip(features(custom), features(teacher), strict=True):
        torch.testing.assert_close(left, right)
    torch.save(custom.state_dict(), path)
    assert same(build(path), teacher)


def hf_clip(folder: Path, act: str) -> Any:
    config = transformers.CLIPConfig(
        projection_dim=16,
        text_config={"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 320, "max_position_embeddings": 12, "hidden_act": act, "bos_token_id": 300,
            "eos_token_id": 319, "pad_token_id": 0},
        vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 8, "hidden_act": act},
    )  # fmt: skip
    torch.manual_seed(5)
    model: Any = transformers.CLIPModel(config)
    model.eval()
    for parameter in model.parameters():  # its own first weights are too small to tell right from wrong
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_a_hugging_face_clip_model_gives_equal_features(act: str, tmp_path: Path) -> None:
    theirs = hf_clip(tmp_path, act)
    ours = build(tmp_path, name=f"local-dir:{tmp_path}")
    with torch.inference_mode():
        image = theirs.get_image_features(pixel_values=PIXELS).pooler_output
        text = theirs.get_text_features(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).pooler_output
    for mine, other in zip(features(ours), (image, text), strict=True):
        torch.testing.assert_close(mine, nn.functional.normalize(other, dim=-1), rtol=1e-5, atol=1e-5)
    half = build(name=f"local-dir:{tmp_path}", image_weights=str(tmp_path))
    assert torch.equal(features(half)[0], features(ours)[0])
    assert not torch.equal(features(half)[1], features(ours)[1])


def test_equal_shapes_do_not_hide_another_computation(tmp_path: Path) -> None:
    hf_clip(tmp_path, "quick_gelu")
    config = resolve_config(ModelConfig(name=f"local-dir:{tmp_path}"))
    heads = {**config["vision_cfg"], "head_width": 32}
    for other, named in (
        ({"quick_gelu": False}, "quick_gelu True"),
        ({"vision_cfg": heads}, "vision_cfg.head_width 16"),
    ):
        with pytest.raises(ConfigError, match=f"trained with {named}.*vectors would be wrong"):
            build(tmp_path, config={**config, **other})


def test_positions_are_fitted_to_size_and_length(teacher: nn.Module, tmp_path: Path) -> None:
    """Larger pictures as open_clip does it; shorter texts keep their places, so their features stay equal."""
    path = write(teacher, "safetensors", tmp_path)
    large = build(path, size=32)
    theirs = build(size=32)
    open_clip.load_checkpoint(theirs, str(path))
    pixels = torch.randn(1, 3, 32, 32)
    for left, right in zip(features(large, pixels), features(theirs, pixels), strict=True):
        assert torch.equal(left, right)
    short = build(path, length=5)
    torch.testing.assert_close(features(short, tokens=TOKENS[:, :5])[1], features(teacher)[1])
    longer = build(path, length=16)
    open_clip.load_checkpoint(longer_theirs := build(length=16), str(path))
    assert torch.equal(
        longer.get_parameter("positional_embedding"), longer_theirs.get_parameter("positional_embedding")
    )


@pytest.mark.parametrize("name", ["RN50", "timm"])
def test_positions_of_other_towers_are_fitted_too(name: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"embed_dim": 8, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}
    config["vision_cfg"] = (
        {"timm_model_name": "test_vit"} if name == "timm" else {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    )
    small, large = build(size=64, config=config), build(size=128, config=config)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    fitted = build(tmp_path / "small.pt", size=128, config=config)
    assert features(fitted, torch.randn(1, 3, 128, 128))[0].shape == (1, 8)
    key = "visual.trunk.pos_embed" if name == "timm" else "visual.attnpool.positional_embedding"
    assert fitted.get_parameter(key).shape == large.get_parameter(key).shape != small.get_parameter(key).shape


def test_what_does_not_fit_is_counted_and_named(teacher: nn.Module, tmp_path: Path) -> None:
    state = dict(teacher.state_dict())
    state["visual.novel"] = state.pop("visual.proj")
    state["ln_final.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "x.pt")
    expected = r"1 missing: visual.proj; 1 unexpected: visual.novel; 1 of another shape: ln_final.bias \(3,\).*\(32,\)"
    with pytest.raises(ConfigError, match=expected):
        build(tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="no such file"):
        build(tmp_path / "nowhere.pt")
    with pytest.raises(BundleError, match=r"https://host/x\.pt: models are not fetched from the web"):
        build("https://host/x.pt")
    with pytest.raises(BundleError, match="not fetched from the web"):
        find_bundle(Path("http://host/runs/demo"))
    with pytest.raises(BundleError, match="did training finish"):
        build(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path, teacher: nn.Module) -> None:
    torch.save(teacher, tmp_path / "model.pt")  # a pickled module runs code when it is loaded
    with pytest.raises(BundleError, match="plain tensors"):
        build(tmp_path / "model.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BundleError, match="no plain dictionary"):
        build(tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0")
    with pytest.raises(BundleError, match="cut.safetensors"):
        build(tmp_path / "cut.safetensors")


def test_single_towers_come_from_whole_models(teacher: nn.Module, tmp_path: Path) -> None:
    path = write(teacher, "training", tmp_path)
    fresh = features(build())
    image, text = features(build(image_weights=str(path)))
    assert torch.equal(image, features(teacher)[0])
    assert torch.equal(text, fresh[1])
    image, text = features(build(text_weights=str(path)))
    assert torch.equal(image, fresh[0])
    assert torch.equal(text, features(teacher)[1])


@pytest.mark.parametrize("form", ["folder", "pth"])
def test_timm_towers_load_from_files_of_timm(form: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    trunk: Any = timm.create_model("test_vit", num_classes=10)
    path = tmp_path
    if form == "folder":
        save_file(trunk.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
    else:
        path = tmp_path / "vit.pth"
        torch.save(trunk.state_dict(), path)
    config = {**MICRO, "vision_cfg": {"timm_model_name": "test_vit"}}
    model = build(config=config, image_weights=str(path), size=160)
    assert torch.equal(model.get_parameter("visual.trunk.blocks.0.attn.qkv.weight"), trunk.blocks[0].attn.qkv.weight)
    torch.save({"a": torch.zeros(2)}, path := tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"image_weights=.*missing"):
        build(config=config, image_weights=str(path), size=160)
    with pytest.raises(ConfigError, match="timm image tower"):
        build(image_weights=str(path))


def bert(folder: Path) -> Any:
    config = transformers.RobertaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(9)
    model = transformers.RobertaForMaskedLM(config)
    model.save_pretrained(folder)
    return model


def test_a_config_that_names_a_text_tower_on_the_hub_builds_from_a_folder(tmp_path: Path) -> None:
    """The names of a model for another task, with its head and prefix, are found; the hub is never asked."""
    theirs = bert(tmp_path)
    with pytest.raises(ConfigError, match=r"'roberta-base'.*model.text_tower"):
        build_model(ModelConfig(name="roberta-ViT-B-32"), 32, 12, 320)
    config = ModelConfig(name="roberta-ViT-B-32", text_tower=str(tmp_path), text_weights=str(tmp_path))
    model, _ = build_model(config, 32, 12, 320)
    own = model.state_dict()
    for name, value in theirs.roberta.state_dict().items():
        if f"text.transformer.{name}" in own:
            assert torch.equal(own[f"text.transformer.{name}"], value), name
    with pytest.raises(ConfigError, match="text_tower.*no effect"):
        resolve_config(ModelConfig(name="ViT-B-32", text_tower=str(tmp_path)))


@pytest.mark.parametrize("stem", ["mean", "repeat", "random"])
@pytest.mark.parametrize("channels", [1, 2, 13])
def test_rgb_weights_meet_other_channels(stem: Stem, channels: int, teacher: nn.Module, tmp_path: Path) -> None:
    """mean keeps the answer to a picture whose channels are equal; repeat takes R, G, B in turn."""
    path = write(teacher, "bare", tmp_path)
    with pytest.raises(ConfigError, match=f"channels is {channels}: set model.stem"):
        build_model(ModelConfig(config=MICRO, weights=str(path)), 16, 12, 320, channels)
    config = ModelConfig(config=MICRO, weights=str(path), stem=stem)
    model, model_cfg = build_model(config, 16, 12, 320, channels)
    assert model_cfg["vision_cfg"]["channels"] == channels
    kernel, rgb = model.get_parameter("visual.conv1.weight"), teacher.get_parameter("visual.conv1.weight")
    assert kernel.shape == (32, channels, 8, 8)
    if stem == "mean":
        torch.testing.assert_close(kernel.sum(1), rgb.sum(1))
    elif stem == "repeat":
        torch.testing.assert_close(kernel[:, channels - 1], rgb[:, (channels - 1) % 3] * 3 / channels)
    else:
        assert not torch.allclose(kernel.sum(1), rgb.sum(1))
    with pytest.raises(ConfigError, match="no effect"):
        build_model(config, 16, 12, 320)


def test_towers_of_every_kind_take_other_channels() -> None:
    text = {"width": 32, "heads": 2, "layers": 1}
    for vision in (
        MICRO["vision_cfg"],
        {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        {"timm_model_name": "test_resnet"},
        {"timm_model_name": "test_vit"},
    ):
        model, _ = build_model(
            ModelConfig(config={"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}), 64, 12, 320, 13
        )
        assert model.get_submodule("visual")(torch.zeros(2, 13, 64, 64)).shape == (2, 8)
