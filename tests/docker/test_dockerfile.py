"""docker/Dockerfile as text: linted, locked, non-root, without a shell. What it builds: test_images.py (slow)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docker.images import DOCKERFILE, Instruction, ignored, instructions, stages
from tests.test_dependencies import requirements
from vlp import __version__

DOCKER = DOCKERFILE.parent
LOCKS = sorted(path.name for path in DOCKER.glob("requirements-*.txt"))
IMAGES = ("shard", "train", "serve")
__all__ = ["requirements"]  # the fixture


@pytest.fixture(scope="module")
def plan() -> dict[str, list[Instruction]]:
    return stages(DOCKERFILE.read_text())[1]


def lineage(plan: dict[str, list[Instruction]], name: str) -> list[Instruction]:
    """Instructions of a stage, and before them those of the stages it begins with."""
    first, *rest = plan[name]
    below = first.value.partition(" AS ")[0]
    return [*(lineage(plan, below) if below in plan else [first]), *rest]


def lock(name: str) -> dict[str, str]:
    """Package -> version of one lock."""
    lines = (DOCKER / name).read_text().splitlines()
    pairs = [line.split()[0].split("==") for line in lines if "==" in line]
    return {canonicalize_name(package): version for package, version in pairs}


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp && sudo apt-get install x\n")
    assert "DL3004" in subprocess.run([hadolint, bad], capture_output=True, text=True, check=False).stdout
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_targets_and_bases(plan: dict[str, list[Instruction]]) -> None:
    """Everything begins with the one base that an argument names, or with nothing."""
    assert {*IMAGES, "ray", "sbom"} <= plan.keys()
    bases = {items[0].value.partition(" AS ")[0] for items in plan.values()} - plan.keys()
    assert bases == {"${BASE}", "scratch"}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_nobody_from_nothing(plan: dict[str, list[Instruction]], name: str) -> None:
    """No RUN after `scratch`: there is no shell that could carry it out; and users by number, as Kubernetes checks."""
    items = lineage(plan, name)
    assert items[0].value.startswith("scratch")
    assert not [item for item in items if item.name == "RUN"]
    said = {item.name: item.value for item in items}
    assert said["USER"] == "65532:65532"
    assert said["ENTRYPOINT"] == '["/opt/vlp/bin/vlp"]'
    assert "PYTHONSAFEPATH=1" in " ".join(item.value for item in items if item.name == "ENV")
    labels = " ".join(item.value for item in items if item.name == "LABEL")
    wanted = ("title", "description", "licenses", "version", "revision", "created", "base.name")
    assert [label for label in wanted if f"org.opencontainers.image.{label}=" not in labels] == []
    assert said["HEALTHCHECK"] == ('CMD ["/opt/vlp/bin/vlp", "health"]' if name == "serve" else "NONE")


def test_the_version_is_ours(plan: dict[str, list[Instruction]]) -> None:
    given = {item.value for items in plan.values() for item in items if item.value.startswith("VERSION=")}
    assert given == {f"VERSION={__version__}"}


def test_every_installation_is_locked(plan: dict[str, list[Instruction]]) -> None:
    """From a lock with hashes, or from the wheel built here without an index."""
    runs = [item.value for items in plan.values() for item in items if item.name == "RUN"]
    installs = [part for run in runs for part in run.split("&&") if re.search(r"pip\b.*\binstall", part)]
    assert len(installs) == 9
    assert [part for part in installs if "--require-hashes" not in part and "--no-index --no-deps" not in part] == []
    used = {name for part in installs for name in re.findall(r"requirements-[a-z$\{\}A-Z-]+\.txt", part)}
    found = {name.replace("${DEVICE}", device) for name in used for device in ("cpu", "cuda")}
    assert found == set(LOCKS)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_hashes_and_names_no_place(name: str) -> None:
    text = (DOCKER / name).read_text()
    assert "make locks" in text.splitlines()[1]
    assert "://" not in text
    pinned = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    assert pinned
    assert [line for line in pinned if not re.fullmatch(r"[a-z0-9-]+==\S+ \\", line)] == []
    assert text.count("--hash=sha256:") >= len(pinned)


def test_locks_satisfy_the_project(requirements: dict[str, Requirement]) -> None:
    extras = {"train": ("s3", "detect", "scan"), "serve": ("serve", "openvino"), "ray": ("ray", "s3")}
    for image, chosen in extras.items():
        for device in ("cpu", "cuda"):
            found = lock(f"requirements-{image}-{device}.txt")
            for name, wanted in requirements.items():
                marker = wanted.marker
                if marker is None or any(marker.evaluate({"extra": extra}) for extra in chosen):
                    assert found[name] in wanted.specifier, f"{image} {device}: {name} {found[name]}"


def test_images_agree_and_cpu_ones_hold_no_cuda(requirements: dict[str, Requirement]) -> None:
    """A model is trained by the same versions that serve it, as far as we ask for them."""
    for device in ("cpu", "cuda"):
        train, serve = (lock(f"requirements-{image}-{device}.txt") for image in ("train", "serve"))
        assert {name for name in requirements if name in serve and train.get(name, serve[name]) != serve[name]} == set()
        assert train["torch"].endswith("+cpu") == (device == "cpu")
        assert any(name.startswith("nvidia-") for name in train) == (device == "cuda")


def test_the_shard_image_has_what_sharding_imports(requirements: dict[str, Requirement]) -> None:
    lines = (DOCKER / "requirements-shard.in").read_text().splitlines()
    named = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert {wanted.name: wanted.specifier for wanted in named} == {
        wanted.name: requirements[wanted.name].specifier for wanted in named
    }
    found = lock("requirements-shard.txt")
    assert "torch" not in found
    assert all(found[wanted.name] in wanted.specifier for wanted in named)


def test_the_builder_is_sent_what_is_copied_and_no_more() -> None:
    root = DOCKER.parent
    rules = [line for line in (root / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    sent = {"vlp/cli.py", "server/ui/index.html", "docker/requirements-shard.txt", "pyproject.toml",
            "tests/benchmarks/results/claims.json"}  # fmt: skip
    kept = {"docker/secrets/keys.json", ".git/config", "tests/conftest.py", "runs/a/model.safetensors", ".venv/x",
            "vlp/__pycache__/cli.cpython-311.pyc", "tests/benchmarks/results/data.json"}  # fmt: skip
    assert {name for name in sent | kept if ignored(name, rules)} == kept
    copied = [item for item in instructions(DOCKERFILE.read_text()) if item.name == "COPY" and "from" not in item.flags]
    sources = {source for item in copied for source in item.value.split()[:-1]}
    for source in sources:
        paths = list(root.glob(source.replace("${DEVICE}", "*")))
        assert paths, source
        assert not [path for path in paths if ignored(path.relative_to(root).as_posix(), rules)], source
