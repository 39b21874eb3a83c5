"""What is imported is declared, and versions with known holes are shut out: one case per advisory."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MAY_USE: dict[str, tuple[str, ...]] = {
    "data_pipelines": ("ray",),
    "vlp": ("wandb", "mlflow", "onnx", "scan", "detect"),
    "server": ("serve", "faiss", "onnx", "openvino"),
    "tests": ("serve", "faiss", "dev", "wandb", "mlflow", "onnx", "scan", "detect"),
}
"""Top folder -> extras whose packages it may import, beside the core dependencies."""
ELSEWHERE = ("foreign_clients.py", "fuzz_parsers.py", "fuzz_requests.py", "peer_infinity.py", "peer_search.py")
"""Run in environments of their own, with other people's packages."""

LAST_VULNERABLE = {
    "CVE-2026-24747 (weights_only runs code)": ("torch", "2.9.1"),
    "CVE-2025-32434 (weights_only runs code)": ("torch", "2.5.1"),
    "CVE-2026-40192 (FITS decompression bomb)": ("pillow", "12.1.1"),
    "CVE-2026-55379 (bomb check bypassed)": ("pillow", "12.2.0"),
    "CVE-2026-55380 (bomb check bypassed)": ("pillow", "12.2.0"),
    "CVE-2025-54121 (large form blocks the loop)": ("starlette", "0.47.1"),
    "CVE-2025-62727 (Range header, quadratic)": ("starlette", "0.49.0"),
    "CVE-2026-48710 (Host header passes for a path)": ("starlette", "1.0.0"),
    "CVE-2026-54283 (form limits ignored)": ("starlette", "1.3.0"),
}


@pytest.fixture(scope="module")
def requirements() -> dict[str, Requirement]:
    """What the installed project asks for, by name."""
    parsed = map(Requirement, importlib.metadata.requires("vlp") or [])
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


@pytest.mark.parametrize("advisory", LAST_VULNERABLE)
def test_requirements_shut_out_the_vulnerable_version(advisory: str, requirements: dict[str, Requirement]) -> None:
    name, version = LAST_VULNERABLE[advisory]
    assert version not in requirements[name].specifier
    assert importlib.metadata.version(name) in requirements[name].specifier


def test_no_form_parser_is_pulled_in(requirements: dict[str, Requirement]) -> None:
    """python-multipart (CVE-2024-24762, CVE-2024-53981, CVE-2026-24486, CVE-2026-40347, CVE-2026-42561).

    Bodies are JSON or raw bytes, so it is not needed. Whoever adds it must ask for 0.0.27 or later.
    """
    found = requirements.get("python-multipart")
    assert found is None or "0.0.26" not in found.specifier


def imported_packages(floor: str) -> set[str]:
    """Top names that a floor imports and that are neither ours nor Python's."""
    names: set[str] = set()
    for path in (ROOT / floor).rglob("*.py"):
        if path.name in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
    beside = {path.stem for path in (ROOT / "tests/benchmarks").glob("[!t]*.py")}
    return names - {*MAY_USE, *sys.stdlib_module_names, *beside}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not know which package most modules are of")
@pytest.mark.parametrize("floor", MAY_USE)
def test_every_import_is_a_declared_dependency(floor: str, requirements: dict[str, Requirement]) -> None:
    """Nothing is used that only happens to be there because something else brought it."""
    imported = imported_packages(floor)
    assert imported
    distributions = importlib.metadata.packages_distributions()
    for name in sorted(imported):
        owners = [requirements.get(canonicalize_name(owner)) for owner in distributions.get(name, [name])]
        assert any(owner is not None and _wanted(owner, MAY_USE[floor]) for owner in owners), f"{floor} imports {name}"


def _wanted(requirement: Requirement, extras: tuple[str, ...]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
