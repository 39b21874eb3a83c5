import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from data_pipelines import console
from data_pipelines.cli import COMMANDS, data, shard
from data_pipelines.errors import BadSample
from data_pipelines.sources import starter
from data_pipelines.testing import draw


def run(*arguments: object) -> Result:
    return CliRunner().invoke(shard, [str(argument) for argument in arguments])


def python(code: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The code in a fresh interpreter."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the statistics, which hold times."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("_stats.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def summary(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_folder_from_end_to_end(photos: Path, tmp_path: Path) -> None:
    (photos / "cut.png").write_bytes((photos / "p0.png").read_bytes()[:300])
    (photos / "cut.txt").write_text("a cut picture")
    result = run(photos, "--out", tmp_path / "out", "--image-size", 16, "--samples-per-shard", 5)
    assert result.exit_code == 0, result.output
    assert "7 samples of 9 records, 2 failures (no_caption 1, truncated_image 1), 2 shards" in result.stdout
    assert "every failed row is in the .parquet" in result.stdout
    assert "sharding folder" in result.stderr
    assert "9/9" in result.stderr


def test_json_is_the_only_thing_on_stdout(photos: Path, tmp_path: Path) -> None:
    result = run(photos, "--out", tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    assert (found["records"], found["samples"], found["failures"]) == (8, 7, {"no_caption": 1})
    assert found["splits"][""]["samples"] == 7
    assert not found["up_to_date"]


def test_again_does_nothing_and_other_output_is_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(photos, "--out", out).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run(photos, "--out", out, "--workers", 1)
    assert (again.exit_code, "up to date, nothing to do" in again.stdout) == (0, True)
    refused = run(photos, "--out", out, "--image-size", 16)
    assert refused.exit_code == 1
    assert "options.image_size was None, is 16" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_changed_input_is_noticed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, "--out", out)
    (photos / "lonely.txt").write_text("no longer alone")
    refused = run(photos, "--out", out)
    assert refused.exit_code == 1
    assert "different: source.files" in refused.stderr
    replaced = run(photos, "--out", out, "--overwrite", "--json")
    assert summary(replaced)["samples"] == 8


def test_overwrite_removes_old_shards_and_nothing_else(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, "--out", out, "--samples-per-shard", 2)
    assert len(list(out.glob("*.tar"))) == 4
    (out / "notes.txt").write_text("mine")
    assert run(photos, "--out", out, "--overwrite").exit_code == 0
    assert [path.name for path in out.glob("*.tar")] == ["00000.tar"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_missing_shard_is_written_again_when_asked(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, "--out", out)
    whole = contents(out)
    (out / "00000.tar").unlink()
    refused = run(photos, "--out", out)
    assert refused.exit_code == 1
    assert "files are missing or damaged" in refused.stderr
    assert run(photos, "--out", out, "--overwrite").exit_code == 0
    assert contents(out) == whole


def test_a_folder_with_other_things_is_not_littered(photos: Path, tmp_path: Path) -> None:
    result = run(photos, "--out", photos)
    assert result.exit_code == 1
    assert "is not empty and holds no shards of this tool" in result.stderr
    (tmp_path / "file").write_text("x")
    assert "is a file" in run(photos, "--out", tmp_path / "file").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/empty"], "no images among 0 files"),
        (
            ["{tmp}/nowhere"],
            "no such path, and no data set has this name; data sets are clipart, detection-starter, emoji, ",
        ),
        (["{tmp}/photos", "--kind", "rar"], "kinds are clipart, coco, detection-starter, emoji"),
        (["{tmp}/photos", "--template", "a {label}"], "template 'a {label}' has no effect"),
        (["{tmp}/photos", "--template", "a photo"], "template"),
        (["{tmp}/photos", "--resize-mode", "border"], "give both or neither"),
        (["{tmp}/photos", "--resize-always"], "no effect without --image-size"),
        (["{tmp}/photos", "--encode-quality", "80"], "no effect without encode_format"),
        (["{tmp}/photos", "--max-pixels", "10"], "none of 8 records became a sample (too_many_pixels 7, no_caption 1)"),
        (["starter", "--dir", "{tmp}/damaged"], "sha256 of emojibase-data-17.0.0.tgz is"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(
    photos: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "emojibase-data-17.0.0.tgz").write_bytes(b"not it")
    result = run(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments), "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("sharding")]
    assert len(errors) <= 2, result.stderr
    assert message in " ".join(errors)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("manifest.json"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    code = "from data_pipelines.cli import shard; shard()"
    plain = python(code, "nope", "--out", tmp_path / "out")
    assert (plain.returncode, plain.stderr.count("\n")) == (1, 1)
    assert "Traceback" in python(code, "nope", "--out", tmp_path / "out", VLP_DEBUG="1").stderr


@pytest.mark.parametrize("name", ["", "write", *COMMANDS])
def test_every_command_has_an_example_and_json(name: str) -> None:
    result = CliRunner().invoke(shard, [*name.split(), "--help"])
    assert result.exit_code == 0, result.output
    assert "--json" in result.stdout
    assert "vlp shard " in result.stdout.partition("Example")[2]


def test_the_group_lists_its_commands() -> None:
    listed = CliRunner().invoke(shard, ["--help"]).stdout.partition("Commands:")[2].split()
    assert set(COMMANDS) <= set(listed)


@pytest.mark.parametrize("command", [data, data.commands["fetch"]])
def test_help_has_an_example(command: click.Command) -> None:
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert "vlp " in result.stdout.partition("Example")[2]


def test_img2dataset_spellings_are_accepted(photos: Path, tmp_path: Path) -> None:
    options = ("--image_size", 16, "--resize_mode", "border", "--encode_format", "jpg", "--encode_quality", 90)
    result = run(photos, "--out", tmp_path / "out", *options, "--number_sample_per_shard", 4, "--json")
    assert summary(result)["shards"] == 2


def test_no_torch_is_loaded(photos: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys; from data_pipelines.cli import shard\n"
        "for arguments in json.loads(sys.argv[1]): shard(arguments, standalone_mode=False)\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'torchvision', 'vlp', 'server')))"
    )
    out = str(tmp_path / "out")
    looks = [[name, out] for name in ("verify", "stats", "ls", "dedup", "retry")]
    commands = [["--help"], [str(photos), "--out", out], *looks, ["show", out, "00000000"], ["plan", str(photos)]]
    done = python(code, json.dumps(commands))
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_options_stand_before_or_behind_the_source(photos: Path, tmp_path: Path) -> None:
    assert run("--out", tmp_path / "a", photos).exit_code == 0
    assert run("write", photos, "--out", tmp_path / "b").exit_code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_settings_reach_the_source_and_unknown_ones_are_refused(photos: Path, tmp_path: Path) -> None:
    refused = run(photos, "--out", tmp_path / "a", "--box-col", "boxes", "--label-col", "x,y")
    assert refused.exit_code == 1
    assert "box_col, label_col: source 'folder' has no such option" in refused.stderr


def test_shards_can_be_looked_at(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, "--out", out, "--samples-per-shard", 5)
    found = summary(run("stats", out, "--json"))
    assert (found["rows"], found["samples"], found["failures"]) == (8, 7, {"no_caption": 1})
    assert found["quantiles"]["width"] == {"min": 40, "p5": 40, "median": 43, "p95": 46, "max": 46}
    assert "captions per sample: 7 with 2" in run("stats", out).stdout
    assert [row["key"] for row in summary(run("ls", out, "--json"))["rows"]] == [
        *(f"00000{n}" for n in range(5)), "000010", "000011", "000012",
    ]  # fmt: skip
    failed = run("ls", out, "--failed").stdout.splitlines()
    assert len(failed) == 1
    assert failed[0].split()[1] == "no_caption"
    assert len(run("ls", out, "--limit", 2).stdout.splitlines()) == 2
    shown = summary(run("show", out, "000012", "--json", "--save", tmp_path / "x.png"))
    assert (shown["url"], shown["shard"], shown["format"]) == ("trip/p6.png", "00001.tar", "png")
    data = (out / "00001.tar").read_bytes()[shown["offset"] : shown["offset"] + shown["bytes"]]
    assert data == (tmp_path / "x.png").read_bytes() == (photos / "trip" / "p6.png").read_bytes()
    assert "key '9' is in no shard" in run("show", out, "9").stderr
    assert "no picture of it" in run("show", out, failed[0].split()[0], "--save", tmp_path / "y").stderr
    assert "holds no .parquet" in run("stats", photos).stderr


def test_plan_says_what_will_be_written(photos: Path, tmp_path: Path) -> None:
    plan = summary(run("plan", photos, "--samples-per-shard", 5, "--json"))
    run(photos, "--out", tmp_path / "out", "--samples-per-shard", 5)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert (plan["records"], plan["shards"], plan["tried"], plan["failures"]) == (8, 2, 8, {"no_caption": 1})
    assert 0.3 * written < plan["bytes"] < 3 * written
    assert not (tmp_path / "plan").exists()
    assert "8 records, 1 shards; of 8 tried: no_caption 1" in run("plan", photos).stdout


def test_retry_and_extend_from_the_command_line(photos: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", tmp_path / "more"
    run(photos, "--out", out)
    (photos / "lonely.txt").write_text("no longer alone")
    again = run("retry", out)
    assert (again.exit_code, "1 of 1 failed rows became samples" in again.stdout) == (0, True), again.output
    shutil.copytree(photos / "trip", more)
    added = summary(run("extend", out, more, "--json"))
    assert (added["samples"], added["shards"], added["up_to_date"]) == (11, 2, False)
    assert run("verify", out).exit_code == 0
    assert summary(run("dedup", out, "--json"))["exact"] == 3


def test_fetch_prints_paths_licences_and_credits() -> None:
    result = CliRunner().invoke(data, ["fetch", "starter", "--json"])
    assert result.exit_code == 0, result.output
    packages = summary(result)["packages"]
    assert len(packages) == len(starter.PACKAGES) == 7
    assert all(Path(package["path"]).is_file() and package["licence"] and package["credit"] for package in packages)
    assert "Noto Emoji by Google" in CliRunner().invoke(data, ["fetch", "emoji"]).stdout
    assert len(summary(CliRunner().invoke(data, ["fetch", "towers", "--json"]))["packages"]) == 2


CLI = "import sys; from data_pipelines.cli import shard; shard(sys.argv[1:])"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred small pictures."""
    root = tmp_path_factory.mktemp("many")
    for number in range(300):
        (root / f"{number:04}.png").write_bytes(draw((32, 32), seed=number))
        (root / f"{number:04}.txt").write_text(f"picture {number}")
    return root


def test_a_full_disk_is_one_message_and_no_end(photos: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the kernel refuses the same write calls."""
    code = (
        "import resource, signal, sys; from data_pipelines.cli import shard\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 2**30))\n"
        "shard(sys.argv[1:])"
    )
    options = ["--samples-per-shard", "4"]
    (photos / "trip" / "p5.txt").write_text("fits\n" * 3_000)  # the second shard does not
    assert run(photos, "--out", tmp_path / "whole", *options).exit_code == 0
    done = python(code, photos, "--out", tmp_path / "out", *options)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("sharding")]
    assert "cannot be written (File too large)" in " ".join(errors), done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]
    assert run(photos, "--out", tmp_path / "out", *options).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_processes_do_not_share_a_folder(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", CLI, str(many), "--out", str(out), "--samples-per-shard", "5"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "00000_stats.json").exists():
        assert first.poll() is None
        time.sleep(0.002)
    second = run(many, "--out", out, "--samples-per-shard", 5)
    assert second.exit_code == 1
    assert "another process is writing" in second.stderr
    assert first.wait() == 0
    assert summary(run(many, "--out", out, "--samples-per-shard", 5, "--json"))["up_to_date"]


def test_a_moved_folder_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / photos.name
    shutil.copytree(photos, moved)
    for number, folder in enumerate((photos, moved)):
        assert run(folder, "--out", tmp_path / str(number)).exit_code == 0
    one, other = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] in ([], ["job.json"])  # job.json knows the files' times


def test_lazy_group_lists_without_importing() -> None:
    group = console.LazyGroup(
        "tool", lazy={"shard": ("data_pipelines.cli:shard", "Write."), "gone": ("no.such:thing", "Gone.")}
    )
    listed = CliRunner().invoke(group, ["--help"])
    assert listed.exit_code == 0
    assert "Gone." in listed.stdout
    assert "resize" in CliRunner().invoke(group, ["shard", "--help"]).stdout
    assert isinstance(CliRunner().invoke(group, ["gone"]).exception, ModuleNotFoundError)


def test_group_errors_are_readable() -> None:
    @click.group(cls=console.Group)
    def tool() -> None:
        """Tool."""

    @tool.command()
    def fail() -> None:
        """Fail."""
        raise BadSample("truncated_image", "8 bytes")

    result = CliRunner().invoke(tool, ["fail"])
    assert (result.exit_code, result.stderr) == (1, "Error: truncated_image: 8 bytes\n")
