"""Installs a wheel into a clean environment and tries what a user would try first.

Usage: python tests/wheel_smoke.py dist/vlp-*.whl

Not a pytest file: it takes a minute or two and needs the package index. Everything runs outside the checkout, so that
only the wheel can be what is imported.
"""

import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

COMMANDS = ("--help", "recipes", "objectives", "doctor")

PACKAGE_DATA = """
import importlib.resources as resources
import server.app
wanted = {"vlp": ("recipes", ".yaml"), "vlp.models": ("configs", ".json")}
for package, (folder, suffix) in wanted.items():
    def walk(place):
        for item in place.iterdir():
            yield from walk(item) if item.is_dir() else [item.name]
    names = list(walk(resources.files(package) / folder))
    assert any(name.endswith(suffix) for name in names), f"{package}/{folder}: no {suffix} file among {names}"
    print(f"{package}/{folder}: {len(names)} files")
"""


def main() -> None:
    """Install, run, and stop at the first failure with its exit code."""
    wheel = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="vlp-smoke-") as scratch:
        folder = Path(scratch)
        venv.create(folder / "venv", with_pip=True)
        python, vlp = (str(folder / "venv" / "bin" / name) for name in ("python", "vlp"))
        # Without --no-compile pip spends half its time on byte code that one run never reads.
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        run("install", [*pip, f"{wheel}[serve]"], folder)
        run("pip check", [python, "-m", "pip", "--disable-pip-version-check", "check"], folder)
        for name in COMMANDS:
            run(f"vlp {name}", [vlp, name], folder)
        run("python -m vlp", [python, "-m", "vlp", "--help"], folder)
        run("package data", [python, "-c", PACKAGE_DATA], folder)


def run(title: str, command: list[str], folder: Path) -> None:
    """Run one command outside the checkout; show what it printed only when it fails."""
    began = time.monotonic()
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=False)
    sys.stdout.write(f"{'ok' if done.returncode == 0 else 'FAILED':<7}{title}: {time.monotonic() - began:.1f} s\n")
    sys.stdout.flush()
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\n{title} ended with exit code {done.returncode}")


if __name__ == "__main__":
    main()
