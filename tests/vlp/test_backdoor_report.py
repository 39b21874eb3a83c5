"""`vlp backdoor report` and `verify`: a whole small way, a changed byte anywhere, what does not belong together."""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from data_pipelines.errors import ConfigError
from data_pipelines.records import MANIFEST, Record, manifest_digest
from data_pipelines.write import WriteOptions, write_shards
from vlp import evals
from vlp.backdoor.chain import Difference, Step, chained, check, digest_of, read_json, write_json
from vlp.backdoor.report import Given, write_report
from vlp.bundle import Provenance, load_bundle, save_bundle
from vlp.cli import cli
from vlp.recipe import Recipe, validate
from vlp.testing import micro_bundle
from vlp.train import train

CLASSES = {
    "bag": (220, 40, 40), "shirt": (40, 200, 40), "boot": (40, 40, 220), "hat": (220, 210, 40), "ring": (30, 30, 30),
}  # fmt: skip
"""Labels, each with the colour of its pictures."""
STEPS = ["poison", "scan", "train", "audit", "clean", "certify"]


def vlp(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments), "--json"])


def told(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def shards_of(folder: Path, seed: int) -> Path:
    """Sixty noisy pictures of one colour each."""
    chance, records = np.random.default_rng(seed), []
    for number, (label, colour) in enumerate([*CLASSES.items()] * 12):
        pixels = (np.array(colour) + chance.normal(0, 25, (20, 20, 3))).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        records.append(Record(stream.getvalue(), (f"a {label}",), "test", f"{number}", labels=(label,)))
    write_shards(records, folder, WriteOptions(samples_per_shard=40), kind="test", licences={}, progress=False)
    return folder


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory, micro_recipe: Callable[..., Recipe]) -> Path:
    """A folder with the outputs of all commands: poisoned/ twin/ test/ scan/ run/ audit/ cleaned/ control/ report/."""
    folder = tmp_path_factory.mktemp("way")
    clean = shards_of(folder / "clean", 0)
    shards_of(folder / "test", 1)
    for name, count in (("poisoned", 6), ("twin", 0)):
        told(vlp("poison", clean, "--trigger", "badnet", "--target", "bag", "--count", count, "--out", folder / name))
    control = replace(micro_bundle(), provenance=Provenance(data={"twin": manifest_digest(folder / "twin")}))
    save_bundle(control, folder / "control")
    told(vlp("scan", folder / "poisoned", "--bundle", folder / "control", "--remove", 0.1, "--out", folder / "scan"))
    plain = micro_recipe(steps=25, loggers=[], save_every=0).model_dump()
    lists = {"train": str(folder / "poisoned"), "keep": str(folder / "scan" / "keep.txt")}
    data = {**plain["data"], **lists, "augment": {}}
    train(validate({**plain, "data": data}), folder / "run", show=False)
    told(vlp("audit", folder / "run", "--data", folder / "test", "--steps", 1, "--out", folder / "audit"))
    cleaning = ("--method", "finetune", "--steps", 1, "--batch-size", 8, "--as-is", "--out", folder / "cleaned")
    told(vlp("clean", folder / "run", "--data", clean, *cleaning))
    return folder


def asked(way: Path, out: Path, **given: Any) -> list[object]:
    options = {name: way / name for name in ("audit", "cleaned", "control", "test")} | given
    parts = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return ["backdoor", "report", way / "run", *parts, "--out", out]


@pytest.fixture(scope="module")
def report(way: Path) -> Path:
    """backdoor.json of the whole way; scan and truth are found without being named."""
    told(vlp(*asked(way, way / "report")))
    return way / "report" / "backdoor.json"


@contextmanager
def changed(path: Path) -> Iterator[None]:
    """One bit of one byte in the middle of a file is another."""
    before = path.read_bytes()
    middle = len(before) // 2
    path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    yield
    path.write_bytes(before)


def test_the_whole_way_is_one_chain(way: Path, report: Path, tmp_path: Path) -> None:
    content = read_json(report, "")
    steps = {step["name"]: step for step in content["steps"]}
    assert [step["name"] for step in content["steps"] if step["ran"]] == STEPS
    previous = content["start"]
    for step in content["steps"]:
        assert step["previous"] == previous
        previous = step["digest"] = digest_of(step)
    assert steps["poison"]["results"]["planted"] == [{"trigger": "badnet", "target": "bag", "pictures": 6}]
    assert steps["scan"]["results"]["flagged"] == 6
    assert steps["scan"]["results"]["planted"] == 6
    assert steps["train"]["results"]["scan_applied"]
    assert steps["train"]["digests"] == {f"shards {way / 'poisoned'}": manifest_digest(way / "poisoned")}
    assert steps["audit"]["results"]["audits"][0]["of"] == "model"
    assert steps["clean"]["results"]["method"] == "finetune"
    assert told(vlp("backdoor", "verify", report, "--digest", content["digest"]))["ok"]
    shutil.copytree(way, tmp_path / "moved")
    moved = tmp_path / "moved" / "report" / "backdoor.json"
    assert check(moved)[0] == [], "all of it can move together"
    with changed(tmp_path / "moved" / "scan" / "keep.txt"):
        assert [item.step for item in check(moved)[0]] == ["scan"]


def test_the_certificate_has_the_numbers_of_the_evaluation(way: Path, report: Path) -> None:
    rows = read_json(report, "")["steps"][-1]["results"]["rows"]
    assert [row["of"] for row in rows] == ["model", "cleaned"]
    for row, run in zip(rows, ("run", "cleaned"), strict=True):
        options = {"attacks": [str(way / "poisoned.poison.json")], "control": str(way / "control")}
        metrics = evals.evaluate(load_bundle(way / run), "backdoor", way / "test", options)
        assert row["asr"] == metrics["badnet/asr"]
        assert (row["asr_low"], row["asr_high"]) == (metrics["badnet/asr_low"], metrics["badnet/asr_high"])
        assert row["accuracy"] == metrics["accuracy"]
        assert row["control_asr"] == metrics["control/badnet/asr"]
        assert row["control_under_high"] == metrics["control/badnet/accuracy_high"]


def test_it_says_what_was_tested_and_never_that_there_is_no_backdoor(report: Path) -> None:
    verdict = "Tested against these triggers: badnet (for 'bag', seed 0); this says nothing about others."
    content, page = read_json(report, ""), report.with_name("backdoor.html").read_text()
    assert content["verdict"] == verdict
    assert verdict.replace("'", "&#x27;") in page
    for text in (json.dumps(content), page):
        assert not re.search(
            r"backdoor[- ]free|free of|no backdoor|is clean|trustworthy|is safe|certified", text, re.IGNORECASE
        )
    pictures = sum(item["path"].endswith(".png") for step in content["steps"] for item in step["inputs"])
    assert pictures == 10, "suspects, signs, and of the four kinds of the audit the trigger and pictures with it"
    assert page.count("<img") == pictures + 8, "and four test pictures without and with the trigger"
    assert not re.search(r"(src|href)=['\"]?(http|/)", page)


def test_one_changed_byte_in_any_file_is_named(way: Path, report: Path) -> None:
    content = read_json(report, "")
    named = {(report.parent / item["path"]).resolve() for step in content["steps"] for item in step["inputs"]}
    tars = {tar for path in named if path.name == MANIFEST for tar in path.parent.glob("*.tar")}
    files = {*named, *tars, report.with_name("backdoor.html")}
    folders = {path.relative_to(way).parts[0] for path in files}
    assert folders == {
        "poisoned.poison.json", "poisoned", "scan", "run", "audit", "cleaned", "control", "test", "report", "clean",
    }  # fmt: skip
    assert len(tars) == 6
    for path in sorted(files):
        with changed(path):
            differences, _ = check(report)
        assert {(Path(item.what).resolve(), item.why) for item in differences} == {(path, "was changed")}
    assert check(report)[0] == []
    tar = min(tars)
    with changed(tar):
        done = vlp("backdoor", "verify", report)
        written = CliRunner().invoke(cli, ["backdoor", "verify", str(report)])
    assert (done.exit_code, written.exit_code) == (1, 1)
    assert json.loads(done.stdout)["differences"][0]["what"].endswith(tar.name)
    assert f"{tar.name}: was changed" in written.stdout
    moved = (way / "scan" / "keep.txt").rename(way / "elsewhere")
    assert [(item.step, item.why) for item in check(report)[0]] == [("scan", "is missing")]
    moved.rename(way / "scan" / "keep.txt")


def test_a_changed_report_is_found(report: Path, tmp_path: Path) -> None:
    """Any changed byte; a record with a digest to match breaks the chain; a whole new chain has another digest."""
    before = report.read_bytes()
    copy = report.with_name("copy.json")
    for place in range(0, len(before), len(before) // 40):
        copy.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
        with suppress(ConfigError):  # no JSON any more, or no report
            assert check(copy)[0]
    content = json.loads(before)
    copy.write_text(json.dumps(content))
    assert check(copy)[0] == [Difference("", "copy.json", "is not spelled as it was written")]
    content["steps"][1]["results"]["flagged"] = 0
    content["digest"] = digest_of(content)
    write_json(copy, content)
    assert check(copy)[0] == [Difference("scan", "record", "was changed")]
    content["steps"][1]["digest"] = digest_of(content["steps"][1])
    content["digest"] = digest_of(content)
    write_json(copy, content)
    assert check(copy)[0] == [Difference("train", "record", "does not follow the record before it")]
    for step, following in zip(content["steps"][1:], [*content["steps"][2:], None], strict=True):
        step["digest"] = digest_of(step)
        if following:
            following["previous"] = step["digest"]
    content["digest"] = digest_of(content)
    write_json(copy, content)
    assert check(copy)[0] == [], "who can write it can make another; its digest tells"
    assert "not the one expected" in check(copy, json.loads(before)["digest"])[0][0].why
    copy.unlink()


def test_steps_that_were_not_run_are_shown(way: Path, tmp_path: Path) -> None:
    refused = vlp("backdoor", "report", way / "control")
    assert "is a bundle, which would no longer be as it was" in refused.output
    found = told(vlp("backdoor", "report", way / "control", "--out", tmp_path))
    missing = {step["name"]: step["missing"] for step in found["steps"]}
    assert [name for name, why in missing.items() if not why] == ["train"]
    assert missing["certify"] == "not given: a truth file with a trigger, --control, --test"
    assert found["verdict"] == "Tested against no trigger: this says nothing about any."
    page = (tmp_path / "backdoor.html").read_text()
    assert page.count("Not run: ") == 5
    assert page.count("(not run)") == 5
    assert check(tmp_path / "backdoor.json")[0] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scan": "other_scan"}, "is of other shards .* than RUN was trained on"),
        ({"audit": "other_audit"}, "is not of RUN nor of --cleaned"),
        ({"cleaned": "run"}, "did not start from the weights of RUN"),
        ({"control": "run"}, "was trained on poisoned shards; give the clean twin"),
        ({"test": "clean"}, "a model was trained or tuned on these shards"),
        ({"scan": "test"}, "--scan .*cannot be read"),
    ],
)
def test_things_that_do_not_belong_together_are_refused(
    way: Path, tmp_path: Path, given: dict[str, str], message: str
) -> None:
    for name, file, digests in (("scan", "scan.json", "data"), ("audit", "audit.json", "weights_sha256")):
        (way / f"other_{name}").mkdir(exist_ok=True)
        content = read_json(way / name / file, "")
        content["made_of"][digests] = {"x": "0"} if digests == "data" else "0"
        write_json(way / f"other_{name}" / file, content)
    done = vlp(*asked(way, tmp_path / "out", **{name: way / value for name, value in given.items()}))
    assert done.exit_code == 1
    assert re.search(message, done.output), done.output
    assert not (tmp_path / "out").exists()


def test_shards_that_changed_since_the_training_are_refused(way: Path, tmp_path: Path) -> None:
    shutil.copytree(way / "test", tmp_path / "shards")
    digests = {str(tmp_path / "shards"): manifest_digest(tmp_path / "shards")}
    run = save_bundle(replace(micro_bundle(), provenance=Provenance(data=digests)), tmp_path / "b")
    with changed(tmp_path / "shards" / MANIFEST), pytest.raises(ConfigError, match="no longer those that RUN was"):
        write_report(Given(run), tmp_path / "out")
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        write_report(Given(save_bundle(micro_bundle(), tmp_path / "c")), tmp_path / "out")


def test_a_chain_by_hand(tmp_path: Path) -> None:
    """sha256 of the canonical JSON, computed with coreutils for this record:
    printf '{"a":1,"b":[2]}' | sha256sum."""
    assert digest_of({"b": [2], "a": 1, "digest": "x"}) == (
        "0855bfc20eb6cfaa4be7d6b510c63dd22997718bddadcb1a4915cec3a16145b9"
    )
    first, second = chained([Step("one"), Step("two", "not given")], "0", tmp_path)
    assert (first["previous"], second["previous"]) == ("0", first["digest"])
    assert (first["ran"], second["ran"]) == (True, False)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"format": 1})
    with pytest.raises(ConfigError, match="not a report of `vlp backdoor report`"):
        check(tmp_path / "x.json")
    write_json(tmp_path / "x.json", {"format": 2})
    with pytest.raises(ConfigError, match="written by a newer version"):
        check(tmp_path / "x.json")
