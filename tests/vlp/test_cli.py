"""The command line as a user meets it: help, JSON as the last line, and errors that say what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vlp.cli import COMMANDS, cli
from vlp.recipe import dump

LEAVES = [
    ["data", "fetch"], ["shard"], ["train"], ["recipes"], ["recipes", "show"], ["recipes", "cp"], ["objectives"],
    ["eval"], ["detect"], ["export"], ["claims", "ls"], ["claims", "run"], ["claims", "table"], ["claims", "data"],
    ["runs", "ls"], ["runs", "compare"], ["plan"], ["profile"], ["embed"], ["curate", "cluster"], ["curate", "entity"],
    ["poison"], ["scan"], ["audit"], ["clean"], ["segment"], ["backdoor", "report"], ["backdoor", "verify"],
    ["guard"], ["index", "build"], ["index", "import"], ["index", "export"], ["index", "push"],
    ["keys", "new"], ["keys", "list"], ["keys", "audit"], ["serve"], ["health"], ["demo"], ["doctor"],
]  # fmt: skip


def vlp(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def last_json(result: Result) -> dict[str, object]:
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def test_every_command_is_mounted() -> None:
    assert {leaf[0] for leaf in LEAVES} == set(COMMANDS)


@pytest.mark.parametrize("leaf", LEAVES, ids=" ".join)
def test_every_command_has_help_with_an_example_and_json(leaf: list[str]) -> None:
    result = vlp(*leaf, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert "--json" in result.stdout
    assert f"vlp {' '.join(leaf)}" in result.stdout.split("Example")[1]


def test_listings() -> None:
    recipes = last_json(vlp("recipes", "--json"))["recipes"]
    assert isinstance(recipes, dict)
    assert "starter/clip" in recipes
    objectives = last_json(vlp("objectives", "--json"))["objectives"]
    assert isinstance(objectives, dict)
    assert objectives["clip"]["needs"] == ["pixels", "tokens"]
    assert "clip " in vlp("objectives").stdout


def test_recipes_are_shown_and_copied(tmp_path: Path) -> None:
    assert "learning" not in vlp("recipes", "show", "starter/clip").stderr
    assert "final_lr" in vlp("recipes", "show", "starter/clip", "--resolved").stdout
    target = tmp_path / "mine.yaml"
    assert last_json(vlp("recipes", "cp", "starter/clip", str(target), "--json"))["file"] == str(target)
    assert target.read_text() == vlp("recipes", "show", "starter/clip").stdout
    assert "exists" in vlp("recipes", "cp", "starter/clip", str(target)).stderr


def test_a_dry_run_builds_all_and_writes_nothing(trained: Path, tmp_path: Path) -> None:
    result = last_json(
        vlp("train", str(trained / "recipe.yaml"), "--dry-run", "--run-dir", str(tmp_path / "r"), "--json")
    )
    assert result["steps"] == 12
    assert not (tmp_path / "r").exists()


def test_eval_and_export_print_json(trained: Path, starter_shards: Path, tmp_path: Path) -> None:
    data = str(starter_shards / "unseen_concepts")
    metrics = last_json(vlp("eval", str(trained), "--data", data, "--json"))["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["captions"] == 199
    out = tmp_path / "export"
    assert last_json(vlp("export", str(trained), "--format", "open_clip", "--out", str(out), "--json"))["out"] == str(
        out
    )
    exported = last_json(vlp("eval", str(out), "--data", data, "--json"))["metrics"]
    assert exported == pytest.approx(metrics)


def test_train_writes_run_bundle_and_report(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["train", str(trained / "recipe.yaml"), "run.steps=2", "--run-dir", str(folder), "--json"]
    done = subprocess.run([sys.executable, "-m", "vlp", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["steps"] == 2
    assert Path(result["report"]).is_file()
    assert (folder / "bundle" / "bundle.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "starter/clop"], ["starter/clop", "known: ", "starter/clip"]),
        (["train", "starter/clip", "optim.lrr=1"], ["optim.lrr", "known here"]),
        (["train", "starter/clip", "data.train=/nowhere"], ["/nowhere", "vlp shard"]),
        (["train", "starter/clip", "--resume"], ["--run-dir"]),
        (["eval", "/nowhere", "--data", "."], ["/nowhere"]),
        (["export", "/nowhere", "--out", "x"], ["/nowhere"]),
        (["serve", "/nowhere"], ["/nowhere"]),
        (["shard", "/nowhere", "--out", "x"], ["/nowhere"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in COMMANDS else "",
)
def test_bad_input_gives_a_message_and_a_non_zero_exit(arguments: list[str], words: list[str]) -> None:
    result = vlp(*arguments)
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    assert all(word in result.stderr for word in words), result.stderr


def test_a_corrupt_tar_stops_training_with_its_name(trained: Path, starter_shards: Path, tmp_path: Path) -> None:
    from vlp.recipe import load_recipe

    folder = tmp_path / "cut"
    folder.mkdir()
    content = (starter_shards / "val" / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "r.yaml").write_text(dump(load_recipe(str(trained / "recipe.yaml"), [f"data.train={folder}"])))
    result = vlp("train", str(tmp_path / "r.yaml"), "--run-dir", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert "00000.tar" in result.stderr
