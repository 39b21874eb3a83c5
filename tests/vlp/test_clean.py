"""`vlp clean`: what it trains, what it refuses, and a short real run."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from data_pipelines.errors import ConfigError
from data_pipelines.keep import load_keys
from vlp.backdoor import clean as cleaning
from vlp.backdoor import scan as scanning
from vlp.backdoor.clean import METHODS, Options, recipe_of
from vlp.bundle import load_bundle
from vlp.cli import cli
from vlp.recipe import Recipe
from vlp.testing import micro_bundle
from vlp.train import train


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_bundles_own_model_on_its_own_kind_of_pictures(
    method: str, trained: Path, starter_shards: Path
) -> None:
    bundle = load_bundle(trained)
    recipe = recipe_of(bundle, trained, starter_shards / "val", None, Options(method, steps=7, lr=2e-4), ["run.keep=3"])
    assert recipe.data.image == bundle.image
    start = str(trained / "bundle")
    assert recipe.model.weights == start
    assert recipe.tokenizer.kind == "weights"
    assert (recipe.run.steps, recipe.optim.lr, recipe.run.keep) == (7, 2e-4, 3)
    assert recipe.data.captions.labels == (1.0 if method == "supervised" else 0.3), "as in the bundle's own training"
    assert recipe.objective["name"] == {"cleanclip": "inmodal"}.get(
        method, method if method in ("unlearn", "distill") else "clip"
    )
    for augmented in (recipe.data.augment, recipe.data.strong):
        if augmented is not None and augmented.geometric:
            assert augmented.ground == bundle.image.ground


def test_a_method_has_its_own_length_where_none_is_given() -> None:
    assert Options("distill").length() == (600, 5e-4)
    assert Options("finetune").length() == (300, 1e-3)
    assert Options("distill", lr=1e-4).length() == (600, 1e-4)
    assert Options("unlearn").told() == {
        "method": "unlearn", "steps": 600, "lr": 6e-4, "batch_size": 128, "seed": 0, "device": "auto"
    }  # fmt: skip


def test_what_is_distilled_keeps_the_text_tower(trained: Path, starter_shards: Path, tmp_path: Path) -> None:
    before = load_bundle(trained).model.state_dict()
    options = Options("distill", 2, batch_size=16)
    recipe = recipe_of(load_bundle(trained), trained, starter_shards / "val", None, options)
    after = load_bundle(Path(train(recipe, tmp_path / "run")["bundle"])).model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        if value.is_floating_point() and value.ndim > 1:
            assert torch.equal(value, after[name]) == (not name.startswith("visual.")), name


def test_a_bundle_that_names_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no recipe that made it"):
        recipe_of(micro_bundle(), tmp_path, tmp_path, None, Options())
    with pytest.raises(ConfigError, match="--method 'soap' is unknown; known: finetune, cleanclip"):
        Options("soap").check()


def test_cleaning_leaves_out_what_looks_planted_and_says_what_it_cost(
    trained: Path, starter_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A low limit flags some of the pairs; with the share allowed they are left out, with less they end the command."""
    data = str(starter_shards / "val")
    monkeypatch.setattr(scanning, "Options", partial(scanning.Options, ("slof",), sample=200, limit=4.0))
    monkeypatch.setattr(cleaning, "MOST_FLAGGED", 0.2)
    command = ["clean", str(trained), "--data", data, "--steps", "3", "--batch-size", "32", "run.threads=1", "--json"]
    done = CliRunner().invoke(cli, [*command, "--out", str(tmp_path / "run"), "--val", data])
    assert done.exit_code == 1
    assert "the pairs that it is tuned on" in done.output
    others = str(starter_shards / "unseen_concepts")
    done = CliRunner().invoke(cli, [*command, "--out", str(tmp_path / "run"), "--val", others], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["steps"] == 3
    assert result["pairs_left_out"] > 0
    assert 0 <= result["accuracy_after"] <= 1
    kept = load_keys(tmp_path / "run" / "scan" / "keep.txt")
    log = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "keep.txt" in log
    assert len(kept) > 100
    monkeypatch.setattr(cleaning, "MOST_FLAGGED", 0.0)
    done = CliRunner().invoke(cli, [*command, "--out", str(tmp_path / "other")])
    assert done.exit_code == 1
    assert "pairs look planted" in done.output
    assert "--as-is" in done.output


def test_plain_tuning_is_plain_clip(micro_recipe: Callable[..., Recipe], trained: Path, starter_shards: Path) -> None:
    """The control: neither views nor a changed loss nor augmentation."""
    recipe = recipe_of(load_bundle(trained), trained, starter_shards / "val", None, Options("finetune"))
    assert recipe.objective == {"name": "clip"}
    assert (recipe.data.views, recipe.data.texts) == (1, 1)
    assert not recipe.data.augment.geometric
    assert not recipe.data.augment.colour
