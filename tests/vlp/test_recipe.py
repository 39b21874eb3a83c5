"""Recipes: defaults, inheritance, overrides, and errors that name key, value and what is allowed."""

from pathlib import Path

import pytest
import yaml

from data_pipelines.errors import ConfigError
from vlp.recipe import apply_override, dump, load_recipe, merge, recipe_names, recipe_text, validate

NAMES = recipe_names()


def test_there_are_recipes() -> None:
    assert {"starter/clip", "starter/frozen-towers"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_opens_with_a_comment_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    head = recipe_text(name).split("data:")[0]
    for word in ("# command:", "# hardware:", "# expected:", "# paper:"):
        assert word in head, f"{name} must open with {word!r}"
    assert validate(yaml.safe_load(dump(recipe))) == recipe


def test_overrides_read_numbers_as_people_write_them() -> None:
    recipe = load_recipe("starter/clip", ["optim.lr=1e-3", "run.steps=7", "run.epochs=null", "data.train=x/y"])
    assert recipe.optim.lr == 0.001
    assert recipe.run.steps == 7
    assert recipe.data.train == "x/y"


def test_overrides_reach_into_lists_and_objectives() -> None:
    recipe = load_recipe("starter/clip", ["evals.0.every=50", "objective.smoothing=0.1"])
    assert recipe.evals[0].every == 50
    assert recipe.objective["smoothing"] == 0.1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["unknown key 'optim.lrr'", "known here", "weight_decay"]),
        ("nonsense.key=1", ["unknown key 'nonsense'", "data", "model"]),
        ("run.steps=many", ["run.steps", "'many'"]),
        ("run.precision=fp8", ["run.precision", "amp_bf16", "'fp8'"]),
        ("optim.lr", ["key=value"]),
        ("evals.7.every=1", ["no entry", "list of 1"]),
        ("run.seed.x=1", ["run.seed", "valid integer"]),
        ("run.steps.x=1", ["below a plain value"]),
        ("objective.name=unheard", ["'unheard'", "clip"]),
    ],
)
def test_a_wrong_override_names_key_value_and_what_is_allowed(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe("starter/clip", [override])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_recipes_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="starter/clip"):
        load_recipe("starter/clop")
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(str(tmp_path / "mine.yaml"))
    (tmp_path / "broken.yaml").write_text("data: [1,")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(str(tmp_path / "broken.yaml"))


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        load_recipe("starter/clip", ["run.steps=3", "run.epochs=3"])


def test_a_recipe_file_extends_another_once(tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text("extends: starter/clip\noptim: {lr: 5.0e-4}\ndescription: mine\n")
    child, parent = load_recipe(str(tmp_path / "child.yaml")), load_recipe("starter/clip")
    assert child.optim.lr == 5e-4
    assert child.data == parent.data
    (tmp_path / "grandchild.yaml").write_text(f"extends: {tmp_path / 'child.yaml'}\n")
    with pytest.raises(ConfigError, match="one level"):
        load_recipe(str(tmp_path / "grandchild.yaml"))


def test_merge_replaces_an_objective_of_another_name_whole() -> None:
    base = {"objective": {"name": "clip", "smoothing": 0.1}, "optim": {"lr": 1, "warmup": 2}}
    assert merge(base, {"objective": {"name": "siglip"}, "optim": {"lr": 3}}) == {
        "objective": {"name": "siglip"},
        "optim": {"lr": 3, "warmup": 2},
    }
    settings = {"a": {"b": 1}}
    apply_override(settings, "a.c=[1, 2]")
    assert settings == {"a": {"b": 1, "c": [1, 2]}}
