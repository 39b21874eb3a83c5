"""A cluster in small: hosts are network namespaces on one bridge, ranks meet through torchrun and speak gloo over it.

A host is lost in the middle of an epoch; what is left goes on from the newest checkpoint, and every global batch is
that of one process that nothing happened to. Needs root and iproute2: `make prove-containers`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from tests.s3_server import make_bucket, point_to, s3_server
from tests.vlp.conftest import micro_settings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # s3fs warns about its own insides
ROOT = Path(__file__).parents[2]
RANK = ROOT / "tests/docker/rank.py"
JOINING = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""With a shared store torchrun tells a newcomer no address after the first round: both wait in vain (torch 2.13)."""
STEPS, SAVE = 120, 5
SUBNET = "10.213.7"
BRIDGE = "vlp-bridge"
GATEWAY = f"{SUBNET}.254"
Lines = dict[int, list[tuple[int, int, tuple[str, ...]]]]
"""Step -> (ranks at that time, rank, keys); of a step that was taken again, the last time."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Host:
    """A network namespace with one address, and what was started in it."""

    name: str
    address: str
    processes: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def names(self) -> Path:
        """What `ip netns exec` shows as /etc/hosts."""
        return Path("/etc/netns") / self.name / "hosts"

    def start(self, command: list[str], env: dict[str, str]) -> "subprocess.Popen[str]":
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name]
        whole = ["ip", "netns", "exec", self.name, *named, *command]
        with Path(env["LOG"]).open("a") as log:
            process = subprocess.Popen(whole, env=env, stdout=log, stderr=log, text=True, cwd=ROOT)
        self.processes.append(process)
        return process

    def cut(self) -> None:
        """Off the network, without a word to anybody."""
        ip("-n", self.name, "link", "set", "eth0", "down")

    def kill(self) -> None:
        """Every process on it, at once."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        for process in self.processes:
            process.wait(30)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts that reach each other and, at GATEWAY, this machine, and nothing else."""
    if os.geteuid() or shutil.which("ip") is None:
        raise RuntimeError("needs root and iproute2: apt-get install iproute2")
    found = [Host(f"vlp-host-{number}", f"{SUBNET}.{number}") for number in range(1, count + 1)]
    clear(found)  # what a run that was killed has left
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        ip("address", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        for number, host in enumerate(found, 1):
            host.names.parent.mkdir(parents=True)
            host.names.write_text("127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in found))
            ip("netns", "add", host.name)
            ip("link", "add", f"vlp-veth-{number}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "set", f"vlp-veth-{number}", "master", BRIDGE, "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host.name, "link", "set", device, "up")
        yield found
    finally:
        clear(found)


def clear(found: list[Host]) -> None:
    """No process, no namespace, no bridge."""
    for host in found:
        host.kill()
        subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
        shutil.rmtree(host.names.parent, ignore_errors=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


@dataclass
class Work:
    """One training, its command and what it leaves behind."""

    folder: Path
    recipe: Path
    url: str = ""
    """Of the run, where it lies on a store and every host has a cache of its own."""

    @property
    def run(self) -> Path:
        """The run's folder; of one on a store, the copy that grew last."""
        copies = self.folder.glob("cache-*/runs/*/run/metrics.jsonl")
        return max(copies, key=lambda path: path.stat().st_mtime).parent if self.url else self.folder / "run"

    def env(self, host: str = "") -> dict[str, str]:
        (self.folder / "keys").mkdir(parents=True, exist_ok=True)
        given = {"KEYS_FOLDER": str(self.folder / "keys"), "LOG": str(self.folder / "log"), "PYTHONPATH": str(ROOT)}
        own = {"VLP_CACHE": str(self.folder / f"cache-{host}")} if self.url else {}
        return {**os.environ, **given, **own, "OMP_NUM_THREADS": "1", JOINING: "1"}

    def command(self, *launcher: str) -> list[str]:
        """The same whenever and wherever it is started, as in docker/k8s/base/train.yaml."""
        words = ["train", str(self.recipe), "--run-dir", self.url or str(self.folder / "run"), "--resume"]
        return [sys.executable, *launcher, str(RANK), *words]

    def join(self, host: Host, meet: Host) -> "subprocess.Popen[str]":
        """torchrun on a host."""
        launcher = ["-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=10",
                    "--rdzv-backend=c10d", "--rdzv-id=cluster", f"--rdzv-endpoint={meet.name}:29400",
                    "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"]  # fmt: skip
        return host.start(self.command(*launcher), self.env(host.name))

    def losses(self) -> list[float]:
        with suppress(OSError, ValueError):  # nothing written yet
            return [json.loads(line)["loss"] for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return []

    def lines(self) -> Lines:
        files = sorted((self.folder / "keys").glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        found: Lines = {}
        for row in rows:
            entry = (row["ranks"], row["rank"], tuple(row["keys"]))
            before = found.setdefault(row["step"], [])
            if any(ranks != entry[0] or rank == entry[1] for ranks, rank, _ in before):
                before.clear()  # an attempt that was lost with its host
            before.append(entry)
        return found

    def await_steps(self, steps: int, process: "subprocess.Popen[str]") -> None:
        until = time.monotonic() + 300
        while len(self.losses()) < steps:
            assert process.poll() is None, (self.folder / "log").read_text()[-3000:]
            assert time.monotonic() < until, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.05)

    def finish(self, process: "subprocess.Popen[str]") -> None:
        assert process.wait(600) == 0, (self.folder / "log").read_text()[-3000:]


Make = Callable[[str], Work]


@pytest.fixture(scope="module")
def make(starter_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(name): the same recipe, a place of its own. Epochs of 24 steps, a checkpoint every fifth step."""
    folder = tmp_path_factory.mktemp("cluster")
    settings = micro_settings(starter_shards, steps=STEPS, save_every=SAVE, keep=3)
    settings["optim"]["lr"] = 1e-4  # so that rounding does not grow into another run
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return lambda name: Work(folder / name, folder / "recipe.yaml")


@pytest.fixture(scope="module")
def undisturbed(make: Make) -> Work:
    """One process, from the first step to the last."""
    work = make("alone")
    done = subprocess.run(work.command(), env=work.env(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work


def check(work: Work, undisturbed: Work, before: int, after: int) -> None:
    """Same samples in every global batch, same losses, one account; so many ranks at first and in the end."""
    lines, expected = work.lines(), undisturbed.lines()
    assert sorted(lines) == sorted(expected) == list(range(STEPS))
    for step, entries in lines.items():
        (whole,) = expected[step]
        assert len(entries) == entries[0][0], f"step {step}: {len(entries)} of {entries[0][0]} ranks"
        assert sorted(key for _, _, keys in entries for key in keys) == sorted(whole[2]), f"step {step}"
    assert (lines[0][0][0], lines[STEPS - 1][0][0]) == (before, after)
    assert work.losses() == pytest.approx(undisturbed.losses(), rel=1e-3)
    ledgers = [json.loads((each.run / "ledger.json").read_text()) for each in (work, undisturbed)]
    assert ledgers[0] == ledgers[1]


def test_a_host_dies_and_the_other_ends_the_run_alone(make: Make, undisturbed: Work) -> None:
    work = make("dies")
    with hosts(2) as (first, second):
        process = work.join(first, first)
        work.join(second, first)
        work.await_steps(31, process)  # an epoch has 24: this one is not at its end
        second.kill()
        work.finish(process)
    check(work, undisturbed, 2, 1)


def test_a_host_falls_silent_and_another_takes_its_place(make: Make, undisturbed: Work) -> None:
    """No connection is closed: nothing tells the first host but the missing sign of life, and the newcomer."""
    work = make("silent")
    with hosts(3) as (first, second, third):
        process = work.join(first, first)
        work.join(second, first)
        work.await_steps(31, process)
        second.cut()
        work.join(third, first)
        work.finish(process)
    check(work, undisturbed, 2, 2)


def test_hosts_share_nothing_but_a_store(make: Make, undisturbed: Work) -> None:
    """One dies, the other goes on; it dies as well, and a third, which has seen nothing of the run, ends it."""
    with hosts(3) as (first, second, third), s3_server(GATEWAY) as port, pytest.MonkeyPatch.context() as patch:
        point_to(f"{GATEWAY}:{port}", patch)
        system = make_bucket()
        work = replace(make("store"), url="s3://bucket/run")
        process = work.join(first, first)
        work.join(second, first)
        work.await_steps(31, process)
        second.kill()
        work.await_steps(61, process)
        first.kill()
        process = work.join(third, third)
        work.finish(process)
        sent = json.loads(system.cat("bucket/run/ledger.json"))
        assert system.exists("bucket/run/bundle/complete.json")
    assert work.run.is_relative_to(work.folder / f"cache-{third.name}")
    assert sent == json.loads((work.run / "ledger.json").read_text())
    check(work, undisturbed, 2, 1)
