"""Frozen towers: the pinned weights load, trunk features are computed once, only the heads learn."""

from pathlib import Path

import pytest
import torch

from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError
from data_pipelines.preprocess import normalise
from vlp.bundle import Bundle, load_bundle
from vlp.export import export_open_clip
from vlp.frozen import FeatureLoader, trunks_frozen
from vlp.infer import encode_pixels, encode_texts
from vlp.models import ModelConfig, build_model
from vlp.models.towers import image_weights, in_order
from vlp.recipe import load_recipe
from vlp.run import current_bundle, prepare
from vlp.runlog import RunLog
from vlp.torchvision_guard import ensure_torchvision
from vlp.train import train

ensure_torchvision()
import open_clip  # noqa: E402


@pytest.fixture(scope="module")
def folder(starter_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the real recipe on the 199 pictures of one small split, at 64 px."""
    folder = tmp_path_factory.mktemp("frozen") / "run"
    recipe = load_recipe("starter/frozen-towers", [
        f"data.train={starter_shards / 'unseen_concepts'}", "data.sources=null", "data.cached_views=2",
        "data.image.size=64", "data.batch_size=64", "run.epochs=null", "run.steps=6", "evals=[]", "optim.warmup=1",
    ])  # fmt: skip
    train(recipe, folder, show=False)
    return folder


def test_only_the_heads_learn(folder: Path, starter_shards: Path) -> None:
    trained = load_bundle(folder)
    fresh, _ = build_model(ModelConfig.model_validate(trained.provenance.recipe["model"]), 64, 32, 0)
    assert trunks_frozen(fresh)
    before, after = fresh.state_dict(), trained.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith(("visual.head", "text.proj", "logit_")) for key in changed), changed
    losses = [row["loss"] for row in RunLog(folder).rows("metrics.jsonl")]
    assert losses


@pytest.mark.parametrize("override", ["run.sizes={0.5: 32}", "run.compile=true"])
def test_options_of_towers_that_do_not_run_are_refused(folder: Path, override: str, tmp_path: Path) -> None:
    recipe = load_recipe(str(folder / "recipe.yaml"), [override])
    with pytest.raises(ConfigError, match=rf"{override.partition('=')[0]}.* has no effect with both trunks frozen"):
        prepare(recipe, tmp_path)


def test_cached_features_give_what_the_whole_model_gives(folder: Path, starter_shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(folder / "recipe.yaml"), ["data.captions={}", "data.cached_views=1"])
    run = prepare(recipe, tmp_path)
    assert isinstance(run.loader, FeatureLoader)
    run.loader.fill(lambda step: None)
    batch: Batch = next(iter(run.loader))
    run.ema = None
    bundle: Bundle = current_bundle(run)
    samples = run.loader.loader.draw(0).samples
    with torch.inference_mode():
        run.encoder.eval()
        heads_image = run.encoder.encode_image(batch.image_features, normalize=True)
        heads_text = run.encoder.encode_text(batch.text_features, normalize=True)
    torch.testing.assert_close(
        heads_image, encode_pixels(bundle, torch.stack([s.pixels for s in samples])), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(heads_text, encode_texts(bundle, [s.captions[0] for s in samples]), rtol=1e-4, atol=1e-5)


def test_open_clip_loads_the_export_with_equal_features(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder)
    exported = export_open_clip(bundle, tmp_path / "export")
    model = open_clip.create_model(f"local-dir:{exported}").eval()
    texts = ["red apple", "a very long text " * 20, "größer &amp; schöner", ""]
    tokens = open_clip.get_tokenizer(f"local-dir:{exported}")(texts)
    assert torch.equal(tokens, bundle.tokenizer(texts))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_text(tokens, normalize=True), encode_texts(bundle, texts))
        torch.testing.assert_close(
            model.encode_image(normalise(pixels, bundle.image), normalize=True), encode_pixels(bundle, pixels)
        )


def test_weights_of_another_shape_are_refused() -> None:
    own = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    assert set(in_order({"x": torch.ones(2, 3), "y": torch.ones(4)}, own, "s")) == {"a", "b"}
    for weights in ({"x": torch.ones(3, 2), "y": torch.ones(4)}, {"x": torch.ones(2, 3)}):
        with pytest.raises(ConfigError, match="do not fit"):
            in_order(weights, own, "s")


def test_the_loaded_tower_knows_what_it_was_trained_on() -> None:
    """Every weight in its right place: drawings of two ImageNet classes come first, not two of 1,000 by chance."""
    import timm
    from timm.data.imagenet_info import ImageNetInfo

    from data_pipelines.preprocess import ImageConfig, load_image, normalise
    from data_pipelines.sources import emoji

    model = timm.create_model("tf_efficientnet_lite0").eval()
    weights = image_weights("efficientnet-lite0")
    model.load_state_dict(in_order(weights, model.state_dict(), "efficientnet-lite0"))
    config = ImageConfig(size=144, resize="longest", mean=(0.5,) * 3, std=(0.5,) * 3)
    for vendor, code, expected in (("fluent", "26bd", "soccer ball"), ("google", "1f427", "king penguin")):
        picture = emoji.load_images(vendor, emoji.Config())[code]
        with torch.inference_mode():
            best = model(normalise(load_image(picture, config)[None], config))[0].softmax(0).max(0)
        assert expected in ImageNetInfo().index_to_description(int(best.indices))
        assert best.values > 0.9
