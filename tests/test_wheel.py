"""The wheel holds every file of the three packages, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipelines", "vlp", "server")


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a freshly built wheel. The build backend is a dev dependency, so nothing is downloaded."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("vlp-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_file_of_the_packages_is_inside(members: set[str]) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for suffix in (".py", ".yaml", ".json", "py.typed"):
        assert any(name.endswith(suffix) for name in files), f"no {suffix} file in the packages: is this test looking?"
    assert files - members == set()


def test_nothing_else_is_inside(members: set[str]) -> None:
    tops = {name.partition("/")[0] for name in members}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert not [name for name in members if name.endswith((".pyc", ".pt", ".pth", ".pkl", ".safetensors", ".tar"))]


def test_licence_and_command_are_inside(members: set[str]) -> None:
    names = {name.partition(".dist-info/")[2] for name in members}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= names
