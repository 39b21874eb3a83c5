"""What loading a part of the house may drag along; each case in a fresh interpreter, because imports are global."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def loaded(code: str, *suspects: str) -> set[str]:
    """The suspects among the modules that are loaded after running `code` in a new interpreter."""
    ask = f"import sys\n{code}\nprint('LOADED', *(m for m in {suspects!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    head, *found = last.split()
    assert head == "LOADED"
    return set(found)


def command(*arguments: str) -> str:
    """Code that runs `vlp` with these arguments and survives its exit."""
    call = f"import sys\nfrom vlp.cli import main\nsys.argv = {['vlp', *arguments]!r}"
    return f"{call}\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end"


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded("import json", "json", "torch") == {"json"}


@pytest.mark.parametrize("arguments", [["--help"], ["shard", "--help"], ["data", "--help"], ["doctor", "--help"]])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    assert loaded(command(*arguments), "torch", "open_clip", "transformers") == set()


@pytest.mark.parametrize(
    "module",
    [
        "records",
        "write",
        "job",
        "retry",
        "verify",
        "dedup",
        "survey",
        "distribute",
        "commands.write",
        "images",
        "packages",
        "plan",
        "shard_set",
        "remote",
        "sources.folder",
        "sources.starter",
    ],
)
def test_the_sharding_path_loads_no_torch(module: str) -> None:
    assert loaded(f"import data_pipelines.{module}", "torch") == set()


def test_the_server_loads_no_trainer() -> None:
    assert loaded("import server.app", "vlp.train", "vlp.optim", "vlp.objectives", "matplotlib") == set()
