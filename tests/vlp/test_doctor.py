"""`vlp doctor`: every requirement is looked at, missing ones fail the command, and JSON says the same as the lines."""

import importlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from vlp import doctor
from vlp.doctor import doctor as command


@pytest.fixture
def two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One check that is fine and one that is missing, instead of the real ones."""

    def checks() -> Iterator[doctor.Check]:
        yield doctor.Check("first", "1.0")
        yield doctor.Check("second", "not installed", "missing", "pip install second")

    monkeypatch.setattr(doctor, "run_checks", checks)


def test_this_machine_is_ready() -> None:
    """The environment of the tests holds everything, so the command succeeds and says so last."""
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "ready"


def test_every_requirement_has_a_line() -> None:
    names = {check.name.lower().replace("_", "-") for check in doctor.packages()}
    assert {"torch", "open-clip-torch", "timm", "webdataset", "tokenizers", "simplejpeg", "pillow"} <= names
    assert {"fastapi", "uvicorn", "qdrant-edge-py"} <= names
    assert "pytest" not in names, "what only developers need is not the user's to install"


@pytest.mark.usefixtures("two_checks")
def test_something_missing_fails_and_says_what_to_do() -> None:
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 1
    first, second, verdict = result.output.splitlines()
    assert first.split() == ["ok", "first", "1.0"]
    assert second.startswith("missing")
    assert second.endswith("pip install second")
    assert verdict == "1 required thing is missing, see above"


@pytest.mark.usefixtures("two_checks")
def test_json_is_one_object_on_the_last_line() -> None:
    result = CliRunner().invoke(command, ["--json"])
    answer = json.loads(result.output.splitlines()[-1])
    assert result.exit_code == 1
    assert answer["ok"] is False
    assert [check["status"] for check in answer["checks"]] == ["ok", "missing"]
    assert answer["checks"][1] == {
        "name": "second",
        "value": "not installed",
        "status": "missing",
        "advice": "pip install second",
    }


def test_absent_package_of_an_extra_is_a_note_and_a_required_one_is_missing() -> None:
    assert doctor.package("no-such-package", ">=1", "serve").status == "note"
    required = doctor.package("no-such-package", ">=1")
    assert required.status == "missing"
    assert "pip install 'no-such-package>=1'" in required.advice


def test_a_version_below_the_floor_is_missing() -> None:
    found = doctor.package("click", ">=999")
    assert found.status == "missing"
    assert found.value == importlib.metadata.version("click")
    assert ">=999" in found.advice


def test_a_package_that_does_not_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libsomething.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    found = doctor.package("click")
    assert found.status == "missing"
    assert "OSError: libsomething.so" in found.advice


def test_project_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    (only,) = doctor.packages()
    assert (only.name, only.status) == ("vlp", "missing")
    assert "make setup" in only.advice


def test_missing_client_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert {doctor.program(name).status for name in doctor.CLIENTS} == {"note"}


def test_cache_size_and_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "not" / "yet"))
    assert doctor.cache().value == f"{tmp_path / 'not' / 'yet'}, 0.00 GB"
    assert doctor.cache().status == "ok"
    (tmp_path / "not" / "yet").mkdir(parents=True)
    (tmp_path / "not" / "yet" / "file").write_bytes(bytes(20 << 20))
    assert doctor.cache().value.endswith("0.02 GB")


def test_unwritable_cache_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked through os.access, because root may write everywhere."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor.cache().status == "missing"
    assert "VLP_CACHE" in doctor.cache().advice


def test_a_containers_memory_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/meminfo": "MemTotal:       16777216 kB\n", "/sys/fs/cgroup/memory.max": f"{2 << 30}\n"}
    monkeypatch.setattr(doctor, "_read", lambda name: texts.get(name, ""))
    assert doctor.memory() == doctor.Check("memory", "2.0 GB", "note", doctor.memory().advice)
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert doctor.memory().value == "16.0 GB"
