"""Claims: their checks, plans, runs and outcomes; the claims that ship; the tables in the README."""

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from data_pipelines.errors import ConfigError
from vlp.claims import Claim, checks, claim_names, data, engine, load_claim, parse_claim, results
from vlp.cli import cli
from vlp.objectives import base
from vlp.recipe import Recipe, apply_override, dump, load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[2]


def claim_of(**changes: Any) -> Claim:
    """A claim that is right but for the changes."""
    settings: dict[str, Any] = {
        "paper": "a, b 2026, arXiv 2601.00001", "statement": "more", "objective": "clip", "recipe": "claims/fashion",
        "arms": {"plain": [], "treated": ["objective.smoothing=0.1"]},
        "values": {"a": ["plain", "x/top1"], "b": ["treated", "x/top1"]}, "checks": ["b - a >= 0.03"],
    }  # fmt: skip
    return parse_claim(settings | changes)


# -- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ("b - a >= 0.03", True),
        ("b - a > 0.06", False),
        ("(b - a) / a >= 0.1", True),
        ("a < b < 1", True),
        ("a < b < 0.5", False),
        ("max(a, b, 0.7) <= min(0.7, 2 * b)", True),
        ("abs(a - b) <= -(-0.05) + 1e-9", True),
        ("a / (b - b) >= 0", False),
        ("a / (b - b) < 0", False),
    ],
)
def test_checks_are_arithmetic(check: str, expected: bool) -> None:
    """a = 0.5, b = 0.55; what is divided by zero is true of nothing."""
    assert checks.holds(check, {"a": 0.5, "b": 0.55}) is expected


@pytest.mark.parametrize(
    "check",
    ["b - a", "a >=", "__import__('os') > 0", "a.real > 0", "a[0] > 1", "a == b", "a ** 9 > 1", "a > 'x'", "a > True",
     "(lambda: a)() > 0", "a and b > 0", "min() > 0", "max(a, key=b) > 0"],
)  # fmt: skip
def test_nothing_else_is_a_check(check: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed: numbers, names of values"):
        checks.parse(check)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checks": ["c > 0"]}, "c is no value; values are a, b"),
        ({"checks": []}, "one check at least"),
        ({"values": {"a": ["other", "x"]}}, "there is no arm or step 'other'; there are plain, treated"),
        ({"arms": {"a-b": []}}, "'a-b' is no name"),
        ({"steps": {"plain": "eval x"}}, "plain: an arm and a step of the same name"),
        ({"recipes": {"other": "claims/fashion"}}, "recipes.other: there is no arm of that name; there are"),
        ({"threshold": 3}, "unknown key 'threshold'; known here: paper, statement"),
    ],
)
def test_a_claim_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        claim_of(**changes)


# -- the claims that ship ----------------------------------------------------------------------------------------------


def test_there_are_claims() -> None:
    assert "clip" in claim_names()
    with pytest.raises(ConfigError, match="claim 'none' is unknown; known: .*clip"):
        load_claim("none")


@pytest.mark.parametrize("name", claim_names())
def test_a_shipped_claim_can_be_planned(name: str) -> None:
    """Recipe, overrides and data exist, the objective is one of ours, every value is of an evaluation that is run."""
    claim = load_claim(name)
    assert claim.objective in base.names()
    assert {claim.recipe_of(arm) for arm in claim.arms} <= set(recipe_names())
    assert re.search(r"arXiv \d{4}\.\d{4,5}", claim.paper)
    assert claim.seeds >= 3
    places = {name: Path("/data") / name for name in data.data_sets()}
    jobs = {job.name: job for job in engine.plan(claim, 1, places, "test")}
    assert jobs.keys() == claim.arms.keys() | claim.steps.keys()
    for arm, metric in claim.values.values():
        settings = jobs[arm].settings
        if settings is not None and not metric.startswith("train/"):
            assert any(metric.startswith(item["name"] + "/") for item in settings["evals"]), metric
    tuned = json.dumps([job.settings for job in engine.plan(claim, 1, places, "val")])
    assert not re.search(r"/data/[\w-]+/test", tuned), "the test split is read while options are chosen"


# -- plans -------------------------------------------------------------------------------------------------------------


PLACES = {"claims-fashion": Path("/data/fashion")}


def test_arms_differ_by_their_overrides_and_seed_alone() -> None:
    plain, treated, again, _ = engine.plan(claim_of(), 2, PLACES, "test")
    assert (plain.name, plain.seed, treated.name, again.seed) == ("plain", 0, "treated", 1)
    assert plain.settings is not None
    assert treated.settings is not None
    assert plain.settings["run"] == treated.settings["run"]
    assert plain.settings["data"] == treated.settings["data"]
    assert treated.settings["objective"] == {"name": "clip", "smoothing": 0.1}
    assert plain.settings["data"]["train"] == "/data/fashion/train"
    assert (plain.settings["run"]["threads"], plain.settings["run"]["processes"]) == (1, 1)
    assert len({plain.folder, treated.folder, again.folder}) == 3


def test_claims_with_the_same_baseline_share_its_runs() -> None:
    other = claim_of(arms={"base": [], "treated": ["optim.lr=1e-4"]}, values={"a": ["base", "x"]}, checks=["a > 0"])
    first, second = (engine.plan(claim, 1, PLACES, "test") for claim in (claim_of(), other))
    assert first[0].folder == second[0].folder
    assert first[1].folder != second[1].folder
    assert engine.plan(claim_of(), 1, PLACES, "val")[0].folder != first[0].folder


def test_a_changed_objective_leaves_runs_of_others_as_they_are() -> None:
    """By hand: clip's run counts distill, which the trainer imports, and kernel and base; of detection's its own."""
    trainer = b"from vlp.objectives import base as objectives\nfrom vlp.objectives.distill import seen_by\n"
    sources = {
        "vlp/run.py": trainer,
        "vlp/models/a.json": b"{not python}",
        "vlp/objectives/base.py": b"import vlp.objectives",
        "vlp/objectives/clip.py": b"def f():\n    from vlp.objectives import (\n        _kernel,\n        cacr,\n    )",
        "vlp/objectives/cacr.py": b"import vlp.objectives.entity as other",
        **{f"vlp/objectives/{name}.py": b"" for name in ("entity", "distill", "mlcd", "siglip")},
    }
    idle = engine.idle_objectives("clip", sources)
    names = {Path(name).stem for name in idle if name in sources}
    assert names == {"mlcd", "siglip"}
    assert engine.idle_objectives("mlcd", sources) & sources.keys() == {
        f"vlp/objectives/{name}.py" for name in ("clip", "cacr", "entity", "siglip")
    }
    digests = [engine.code_digest(name) for name in (None, "clip", "siglip")]
    assert len(set(digests)) == 3


def test_steps_come_before_the_arms_that_name_them() -> None:
    claim = claim_of(
        arms={"treated": ["data.keep={made}/keep.txt"], "plain": []},
        steps={"made": "curate cluster {plain} --data shards/claims-fashion/train --out {made}/keep.txt"},
    )
    jobs = {job.name: job for job in engine.plan(claim, 1, PLACES, "test")}
    plain, made, treated = jobs["plain"], jobs["made"], jobs["treated"]
    assert made.command == (
        "curate", "cluster", str(plain.folder), "--data", "/data/fashion/train", "--out", f"{made.folder}/keep.txt",
    )  # fmt: skip
    assert treated.settings is not None
    assert treated.settings["data"]["keep"] == f"{made.folder}/keep.txt"
    assert [set(job.needs) for job in (plain, made, treated)] == [set(), {plain.folder}, {made.folder}]


def test_a_circle_of_needs_is_refused() -> None:
    claim = claim_of(arms={"plain": ["data.keep={treated}/a"], "treated": ["data.keep={plain}/b"]})
    with pytest.raises(ConfigError, match="in a circle: plain -> treated -> plain"):
        engine.plan(claim, 1, PLACES, "test")


def test_another_objective_drops_the_options_of_the_old_one() -> None:
    settings: dict[str, Any] = {"objective": {"name": "clip", "smoothing": 0.2}}
    apply_override(settings, "objective.name=clip")
    assert settings["objective"] == {"name": "clip", "smoothing": 0.2}
    apply_override(settings, "objective.name=siglip")
    assert settings["objective"] == {"name": "siglip"}


# -- a whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def micro_claim(
    micro_recipe: Callable[..., Recipe], starter_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A claim file of two arms, a step between them and two seeds; trains in seconds."""
    monkeypatch.setattr(engine, "runs_folder", lambda: tmp_path / "runs")
    plain = yaml.safe_load(dump(micro_recipe(steps=4)))
    val = str(starter_shards / "val")
    plain["evals"] = [{"name": "val", "task": "geometry", "data": val}]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(plain))
    claim = claim_of(
        recipe=str(tmp_path / "base.yaml"),
        seeds=2,
        steps={"measured": f"eval {{plain}} --data {val} --task geometry"},
        arms={
            "plain": [],
            "treated": ["objective.smoothing=0.3"],
            "after": ["model.weights={plain}/bundle", "tokenizer.kind=weights"],
        },
        values={
            "a": ["plain", "val/image/effective_rank"],
            "b": ["treated", "val/image/effective_rank"],
            "c": ["measured", "metrics/image/effective_rank"],
            "loss": ["after", "train/loss"],
        },
        checks=["abs(a - c) <= 1e-6", "abs(a - b) > 1e-6", "loss > 0"],
    )
    path = tmp_path / "micro.yaml"
    path.write_text(yaml.safe_dump(claim.model_dump(mode="json")))
    return path


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["claims", "run", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout.strip().splitlines()[-1])["claims"]
    return dict(row)


def test_a_claim_is_run_kept_and_gone_on_with(micro_claim: Path, tmp_path: Path) -> None:
    """One seed, kept nowhere; then the other; then only the run that was lost, with the same numbers to the last digit.

    Every job is a process that starts torch, so one test asks for all of it.
    """
    kept = tmp_path / "results.json"
    row = run(str(micro_claim), "--seeds", "1", "--results", str(kept), "--workers", "2")
    assert row["kept"] is None, "a claim has as many seeds as it says"
    assert row["values"]["a"]["deviation"] is None
    assert not kept.exists()
    row = run(str(micro_claim), "--results", str(kept), "--workers", "2")
    assert row["met"], row
    assert row["value"] == 3
    assert row["kept"] == str(kept)
    assert [check["seeds_that_hold"] for check in row["checks"]] == [2, 2, 2]
    assert json.loads(kept.read_text())["rows"][0]["values"] == row["values"]
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob(f"*/{engine.DONE}")}
    assert len(done) == 8
    assert not list((tmp_path / "runs").glob("*/checkpoints"))

    def numbers(path: Path) -> dict[str, float]:
        found: dict[str, float] = json.loads(path.read_text())["numbers"]
        return {name: value for name, value in found.items() if not re.search("second|wait|mfu", name)}

    lost = next(path for path in done if "val/alignment" in json.loads(path.read_text())["numbers"])
    before = numbers(lost)
    lost.unlink()
    (lost.parent / "metrics.jsonl").unlink()
    again = run(str(micro_claim), "--workers", "1")
    assert again["values"] == row["values"]
    assert again["kept"] is None, "a claim of a file is kept only where --results says so"
    assert numbers(lost) == before
    assert [path for path in done if path.stat().st_mtime_ns != done[path]] == [lost]


def test_what_fails_is_named(micro_claim: Path) -> None:
    text = micro_claim.read_text().replace("--task geometry", "--task nothing")
    micro_claim.write_text(text)
    done = CliRunner().invoke(cli, ["claims", "run", str(micro_claim), "--seeds", "1", "--workers", "1"])
    assert done.exit_code == 1
    assert re.search(r"measured with seed 0: `vlp eval .*` failed: .*task 'nothing' is unknown", done.output, re.DOTALL)


# -- outcomes ----------------------------------------------------------------------------------------------------------


def found_of(*pairs: tuple[float, float]) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (arm, seed): {"numbers": {"x/top1": number}, "seconds": 30.0}
        for seed, pair in enumerate(pairs)
        for arm, number in zip(("plain", "treated"), pair, strict=True)
    }


def test_outcome_by_hand() -> None:
    """b - a is 0.05, 0.01 and 0.06: 0.04 in the mean, which is enough, and enough for two of three seeds."""
    row = results.outcome("x", claim_of(), found_of((0.5, 0.55), (0.52, 0.53), (0.54, 0.6)), 3)
    assert (row["met"], row["value"], row["goal"], row["core_seconds"]) == (True, 1, ">= 1", 180)
    assert row["values"]["a"] == {"mean": 0.52, "deviation": 0.02, "low": 0.5, "high": 0.54}
    assert row["checks"] == [{"check": "b - a >= 0.03", "holds": True, "left": 0.04, "seeds_that_hold": 2}]


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    claim = claim_of(values={"a": ["plain", "x/top5"]}, checks=["a > 0"])
    with pytest.raises(ConfigError, match=r"values.a: plain has no 'x/top5'; it has x/top1"):
        results.outcome("x", claim, found_of((0.5, 0.55)), 1)


def deaf(path: str) -> None:
    """A job that nothing but a kill ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(path).touch()
    time.sleep(600)


def test_a_worker_that_cannot_end_does_not_hold_up_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SAVING_S", 0.2)

    def one_hangs_one_fails() -> None:
        with engine._pool(1) as pool:
            pool.submit(deaf, str(tmp_path / "begun"))
            while not (tmp_path / "begun").exists():
                time.sleep(0.01)
            raise ConfigError("the other arm failed")

    with pytest.raises(ConfigError, match="the other arm"):
        one_hangs_one_fails()


def test_a_failed_claim_stays_and_a_changed_one_must_be_run_again(tmp_path: Path) -> None:
    claim = load_claim("clip")
    numbers = {metric: 0.5 for _, metric in claim.values.values()}
    found = {(arm, seed): {"numbers": numbers, "seconds": 1.0} for arm in claim.arms for seed in range(3)}
    path = results.keep(results.outcome("clip", claim, found, 3), tmp_path / "results.json")
    rows = results.read_rows(path)
    assert results.verdict("clip", rows) == "fails"
    assert "**no**" in results.claims_table(rows)
    assert "`clip`: fails" in results.zoo_table(rows)
    assert results.verdict("clip", [{**rows[0], "claim": "another"}]) == "not run yet"
    other = claim.model_copy(update={"arms": {**claim.arms, "masked": ("objective.mask=captions",)}})
    assert results.is_of(rows[0], claim)
    assert not results.is_of(rows[0], other), "an arm with other options is another claim"
    results.keep({**rows[0], "met": True}, path)
    assert [results.verdict("clip", [row]) for row in results.read_rows(path)] == ["holds"]


def test_results_belong_to_the_claims_as_they_stand() -> None:
    stale = [row["name"] for row in results.read_rows() if row["name"] not in claim_names()
             or not results.is_of(row, load_claim(row["name"]))]  # fmt: skip
    assert not stale, "these claims were changed or are gone: run them again, or remove their rows"


# -- tables ------------------------------------------------------------------------------------------------------------


def test_readme_shows_all_objectives_and_claims() -> None:
    page = ROOT / "README.md"
    assert results.renew(page, results.read_rows()) == page.read_text(), "run: vlp claims table --readme README.md"


def test_every_objective_names_its_paper() -> None:
    found = results.zoo([])
    assert found.keys() == set(base.names())
    for name, row in found.items():
        assert re.search(r"arXiv[: ]\d{4}\.\d{4,5}$", row["paper"]), (
            f"{name}: (Authors year, arXiv 0000.00000) is missing"
        )
        assert row["recipe"], name
        assert row["title"], name


def test_commands_print_the_tables() -> None:
    for command, expected in (
        (["objectives", "--markdown"], results.zoo_table(results.read_rows())),
        (["claims", "table"], results.claims_table(results.read_rows())),
    ):
        done = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert done.output.strip() == expected
    listed = json.loads(CliRunner().invoke(cli, ["claims", "ls", "--json"]).stdout)["claims"]
    assert listed["clip"]["objective"] == "clip"


def test_base_recipes_read_no_test_split_for_training() -> None:
    names = [name for name in recipe_names() if name.startswith("claims/")]
    assert names
    for name in names:
        recipe = load_recipe(name)
        assert str(recipe.data.train).endswith(("/train", "/pretrain"))
        assert all("/test" in str(item.data) for item in recipe.evals)
