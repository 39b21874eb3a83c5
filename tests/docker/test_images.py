"""The images, built without an engine (images.py) and run as Compose and Kubernetes run them.

That is: as nobody, in a read-only root without a shell, without a capability, with no network but loopback. CPU builds;
needs root, debootstrap and a package index: `make prove-containers`.
"""

import json
import os
import re
import signal
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from server.keys import add_key
from tests.docker.deployment import DOCKER, filled
from tests.docker.images import Builder, bootstrap, inside
from tests.docker.test_dockerfile import lock
from vlp.testing import WORDS, picture

pytestmark = pytest.mark.slow
Bind = tuple[Path, str, bool]
OURS = ("shard", "train", "serve")
SHELLS = ("sh", "bash", "dash", "busybox", "perl", "apt", "apt-get", "dpkg", "pip", "pip3", "wget", "curl")
PROBE = """
import json, os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
def refused(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.strerror
    os.remove(path)
    return ""
print(json.dumps({"uid": os.getuid(), "groups": os.getgroups(), "interfaces": os.listdir("/sys/class/net") if
    os.path.isdir("/sys/class/net") else [], **{name: status[name] for name in ("CapEff", "CapPrm", "CapBnd",
    "NoNewPrivs")}, "writes": {path: refused(path) for path in ("/x", "/opt/vlp/x", "/etc/x", "/tmp/x")}}))
"""


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Every target, built; below a folder that any user may enter."""
    folder = tmp_path_factory.mktemp("images")
    for path in (folder, *folder.parents):
        if path.owner() == Path.home().owner() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
    built = Builder(folder, bootstrap(folder / "base"), DEVICE="cpu", REVISION="0123456789ab")
    for target in (*OURS, "ray", "sbom"):
        built.build(target)
    return built


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pictures/ with captions, and data/ and out/ that the containers' user owns, as volumes do."""
    folder = tmp_path_factory.mktemp("volumes")
    for name in ("pictures", "data", "out"):
        (folder / name).mkdir()
    for number in range(256):
        (folder / f"pictures/{number:03d}.jpg").write_bytes(picture(number))
        (folder / f"pictures/{number:03d}.txt").write_text(f"{WORDS[number % len(WORDS)]}, number {number}")
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    add_key(folder / "keys.json", "tests", "write", None)
    for path in (folder / "data", folder / "out", folder / "keys.json"):
        os.chown(path, 65532, 65532)
    return folder


def command(service: str, **given: str) -> list[str]:
    """What docker/compose.yaml says a service runs."""
    text = filled((DOCKER / "compose.yaml").read_text(), {"VLP_QDRANT_API_KEY": "unused", **given})
    return [str(word) for word in yaml.safe_load(text)["services"][service]["command"]]


def run(images: Builder, target: str, words: list[str], *binds: Bind) -> subprocess.CompletedProcess[str]:
    started = images.start(target, words, *binds)
    return subprocess.run(started, capture_output=True, text=True, check=False, timeout=900)


def mounts(volumes: Path, data: bool = True, out: bool = True) -> list[Bind]:
    return [(volumes / "hosts", "/etc/hosts", False), (volumes / "pictures", "/pictures", False),
            (volumes / "data", "/data", data), (volumes / "out", "/out", out)]  # fmt: skip


def test_every_run_line_was_carried_out(images: Builder) -> None:
    lines = {item.line for items in images.plan.values() for item in items if item.name == "RUN"}
    assert images.ran == lines


@pytest.mark.parametrize("target", OURS)
def test_an_image_holds_no_shell_and_nothing_of_another_user(images: Builder, target: str) -> None:
    root = images.build(target).root
    places = ("bin", "usr/bin", "sbin", "usr/sbin", "usr/local/bin", "opt/vlp/bin")
    assert [f"{place}/{name}" for place in places for name in SHELLS if (root / place / name).exists()] == []
    odd = []
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            found = (Path(folder) / name).lstat()
            raises = stat.S_ISREG(found.st_mode) and found.st_mode & (stat.S_ISUID | stat.S_ISGID)
            if raises or (found.st_uid and name not in ("data", "out")):
                odd.append(f"{folder}/{name}")
    assert odd == []


def test_the_shard_image_is_small(images: Builder) -> None:
    root = images.build("shard").root
    bytes_ = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file())
    assert not list(root.glob("opt/vlp/lib/*/site-packages/torch*"))
    assert bytes_ < 450e6


@pytest.mark.parametrize("target", OURS)
def test_a_container_is_nobody_and_can_change_nothing(images: Builder, target: str) -> None:
    done = run(images, target, ["/opt/vlp/bin/python", "-c", PROBE])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["uid"], found["groups"], found["NoNewPrivs"]) == (65532, [], "1")
    assert {found[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    assert found["writes"].pop("/tmp/x") == ""
    assert set(found["writes"].values()) == {"Read-only file system"}


def test_contents_are_what_was_locked(images: Builder) -> None:
    root = images.build("sbom").root
    for name in OURS:
        document = json.loads((root / f"{name}.cdx.json").read_text())
        found = {item["name"].lower().replace("_", "-"): item["version"] for item in document["components"]}
        wanted = lock(f"requirements-{name}{'' if name == 'shard' else '-cpu'}.txt")
        assert found.pop("vlp") == "0.1.0"
        assert {package.replace(".", "-"): version for package, version in found.items()} == wanted
    assert re.search(r"^Version: \S+", (root / "debian/libc6").read_text(), re.MULTILINE)


def test_pictures_become_a_served_model(images: Builder, volumes: Path) -> None:
    """The commands of docker/compose.yaml one after the other; training twice, as after a preemption."""
    done = run(images, "shard", command("shard"), *mounts(volumes, out=False))
    assert done.returncode == 0, done.stderr
    for steps in ("2", "3"):
        done = run(images, "train", command("train", VLP_STEPS=steps), *mounts(volumes, data=False))
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (volumes / "out/model/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    bundle = json.loads((volumes / "out/model/bundle/bundle.json").read_text())
    assert bundle["provenance"]["revision"] == "0123456789ab"
    with_qdrant = command("serve")
    at = with_qdrant.index("--qdrant")
    words = [*with_qdrant[:at], *with_qdrant[at + 2 :], "--json"]  # there is no Qdrant server here
    key: Bind = (volumes / "keys.json", "/run/secrets/keys", False)
    started = images.start("serve", words, *mounts(volumes, data=False, out=False), key)
    process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["model"] == "model"
        (inner,) = children(process.pid)
        healthy = within(inner, ["/opt/vlp/bin/vlp", "health"])
        assert healthy.returncode == 0, healthy.stderr
        refused = within(inner, ["/opt/vlp/bin/python", "-c", ASK])
        assert refused.stdout.strip() == "401", refused.stderr
        os.kill(inner, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.communicate()


ASK = """
import http.client
connection = http.client.HTTPConnection("127.0.0.1", 8000)
connection.request("POST", "/v1/embeddings", '{"input": "a red circle"}')
print(connection.getresponse().status)
"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def within(pid: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """A command inside the container of a process, as an engine's health check runs."""
    enter = ["nsenter", f"--target={pid}", "--mount", "--net", "--pid", "--root", "--wd=/", "--setuid=65532",
             "--setgid=65532", *words]  # fmt: skip
    return subprocess.run(enter, capture_output=True, text=True, check=False, timeout=60, env={"HOME": "/tmp"})


def test_the_ray_image_starts_through_its_shell(images: Builder, volumes: Path) -> None:
    """As KubeRay does, by a login shell; and writes the shards that the shard image writes."""
    stage = images.build("ray")
    done = inside(stage.root, ["/bin/bash", "-lc", "ray --version && wget --version"], env={"HOME": "/tmp"})
    assert done.returncode == 0, done.stderr
    assert f"version {lock('requirements-ray-cpu.txt')['ray']}" in done.stdout
    words = ["shard", "/pictures", "--out", "/data/by-ray", "--image-size", "256", "--on", "ray"]
    done = run(images, "ray", words, *mounts(volumes, out=False))
    assert done.returncode == 0, done.stderr
    there = volumes / "data/by-ray"
    assert (there / "00000.tar").read_bytes() == (volumes / "data/shards/00000.tar").read_bytes()
