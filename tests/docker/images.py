"""docker/Dockerfile carried out without an engine: a stage is a folder, its RUN lines run in it by chroot.

Needs root, debootstrap and a package index. What is understood is what that file uses; anything else raises.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
BASE = "debian:bookworm-slim"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
ENTER = Path(__file__).with_name("enter.py")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction with its flags."""

    name: str
    value: str
    flags: Mapping[str, str] = field(default_factory=dict)
    line: int = 0


@dataclass(slots=True)
class Stage:
    """What a stage has become: its files, and what a container of it would be told."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    health: tuple[str, ...] = ()


def instructions(text: str) -> Iterator[Instruction]:
    """Of a Dockerfile, in order; comments left out, continued lines joined."""
    whole, begun = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begun = begun if whole else number
        whole += line
        if whole.endswith("\\"):
            whole = whole[:-1]
            continue
        name, _, value = whole.partition(" ")
        flags = {}
        while match := re.match(r"\s*--([a-z-]+)=(\S+)\s*", value):
            flags[match[1]], value = match[2], value[match.end() :]
        yield Instruction(name, value.strip(), flags, begun)
        whole = ""


def stages(text: str) -> tuple[dict[str, str], dict[str, list[Instruction]]]:
    """(arguments before the first stage, stage name -> its instructions, FROM first)."""
    arguments: dict[str, str] = {}
    found: dict[str, list[Instruction]] = {}
    own: list[Instruction] = []
    for item in instructions(text):
        if item.name == "FROM":
            own = found[item.value.partition(" AS ")[2]] = [item]
        elif own:
            own.append(item)
        elif item.name == "ARG":
            name, _, default = item.value.partition("=")
            arguments[name] = default
    return arguments, found


def context(target: Path) -> Path:
    """What .dockerignore lets through, copied."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if not ignored(name, rules):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def ignored(name: str, rules: Sequence[str]) -> bool:
    """Whether the last rule that names the file, or a folder above it, leaves it out."""
    found = False
    for rule in rules:
        pattern = re.escape(rule.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{pattern}(/.*)?", name):
            found = not rule.startswith("!")
    return found


class Builder:
    """Builds stages once each, below a folder."""

    def __init__(self, folder: Path, base: Path, **given: str) -> None:
        """`base`: what stands for the image BASE; `given`: build arguments."""
        self.folder, self.base, self.given = folder, base, given
        self.globals, self.plan = stages(DOCKERFILE.read_text(encoding="utf-8"))
        self.done: dict[str, Stage] = {}
        self.ran: set[int] = set()
        """Lines of the RUN instructions that were carried out."""
        self.context = context(folder / "context")

    def build(self, name: str) -> Stage:
        """A stage with all that it takes from others."""
        if name not in self.done:
            first, *rest = self.plan[name]
            stage = self._begin(name, first.value.partition(" AS ")[0])
            for item in rest:
                self._carry_out(stage, item)
            self.done[name] = stage
        return self.done[name]

    def _begin(self, name: str, source: str) -> Stage:
        root = self.folder / name
        if source == "scratch":
            root.mkdir()
            return Stage(root)
        below = Stage(self.base) if source == "${BASE}" else self.build(source)
        subprocess.run(["cp", "-a", below.root, root], check=True)
        return replace(below, root=root, env=dict(below.env), labels=dict(below.labels), args={})

    def _carry_out(self, stage: Stage, item: Instruction) -> None:
        value = Template(item.value).safe_substitute(stage.args | stage.env) if item.name != "RUN" else item.value
        if item.name == "ARG":
            name, _, default = value.partition("=")
            chosen = self.given.get(name, default or self.globals.get(name, ""))
            stage.args |= {name: chosen} if chosen else {}
        elif item.name in ("ENV", "LABEL"):
            pairs = dict(pair.split("=", 1) for pair in shlex.split(value))
            (stage.env if item.name == "ENV" else stage.labels).update(pairs)
        elif item.name == "WORKDIR":
            stage.workdir = value
            (stage.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif item.name == "USER":
            stage.user = value
        elif item.name in ("ENTRYPOINT", "CMD"):
            setattr(stage, "entrypoint" if item.name == "ENTRYPOINT" else "command", tuple(json.loads(value)))
        elif item.name == "HEALTHCHECK":
            stage.health = () if value == "NONE" else tuple(json.loads(value.removeprefix("CMD ")))
        elif item.name == "COPY":
            self._copy(stage, replace(item, value=value))
        elif item.name == "RUN":
            self._run(stage, item)
        elif item.name != "EXPOSE":
            raise NotImplementedError(f"line {item.line}: {item.name}")

    def _copy(self, stage: Stage, item: Instruction) -> None:
        *sources, target = shlex.split(item.value)
        origin = self.build(item.flags["from"]).root if "from" in item.flags else self.context
        absolute = target if target.startswith("/") else f"{stage.workdir}/{target}"
        place = stage.root / absolute.lstrip("/")
        for source in sources:
            path = origin / source.lstrip("/")
            into = target.endswith("/") or len(sources) > 1 or path.is_dir()
            (place if into else place.parent).mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", f"{path}/." if path.is_dir() else path, place], check=True)

    def _run(self, stage: Stage, item: Instruction) -> None:
        binds: list[tuple[Path, str, bool]] = [(Path("/etc/resolv.conf"), "/etc/resolv.conf", False)]
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", **stage.env, **stage.args}
        # how this machine reaches its package index is no part of the image
        env |= {name: os.environ[name] for name in ("PIP_DEFAULT_TIMEOUT", "PIP_INDEX_URL") if name in os.environ}
        if CERTIFICATES.is_file():
            binds.append((CERTIFICATES, "/run/certificates.crt", False))
            env["PIP_CERT"] = "/run/certificates.crt"
        if (links := os.environ.get("PIP_FIND_LINKS")) and Path(links).is_dir():
            binds.append((Path(links), "/run/wheels", False))
            env["PIP_FIND_LINKS"] = "/run/wheels"
        done = inside(stage.root, ["/bin/sh", "-c", item.value], env=env, cwd=stage.workdir, binds=binds)
        if done.returncode:
            raise RuntimeError(f"line {item.line}: RUN ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        self.ran.add(item.line)

    def start(self, name: str, command: Sequence[str], *binds: tuple[Path, str, bool]) -> list[str]:
        """The command that runs a container of a stage: its user, a read-only root, no capability, no network."""
        stage = self.build(name)
        assert stage.user == "65532:65532"
        whole = [*stage.entrypoint, *command] if command and not command[0].startswith("/") else [*command]
        return entering(stage.root, whole, env=stage.env, cwd=stage.workdir, binds=binds, tight=True)


def entering(
    root: Path, command: Sequence[str], *, env: Mapping[str, str], cwd: str = "/",
    binds: Sequence[tuple[Path, str, bool]] = (), tight: bool = False,
) -> list[str]:  # fmt: skip
    """The host's command for a command in a root folder."""
    settings = {
        "root": str(root), "command": list(command), "env": dict(env), "cwd": cwd, "tight": tight,
        "binds": [[str(source), target, writable] for source, target, writable in binds],
        "tmpfs": ["/tmp"] if tight else [],
    }  # fmt: skip
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts", *(["--net"] if tight else [])]
    return [*apart, sys.executable, str(ENTER), json.dumps(settings)]


def inside(root: Path, command: Sequence[str], **settings: object) -> "subprocess.CompletedProcess[str]":
    """Run a command in a root folder to its end."""
    whole = entering(root, command, **settings)  # type: ignore[arg-type]
    return subprocess.run(whole, capture_output=True, text=True, check=False)


def bootstrap(target: Path) -> Path:
    """Debian 12 with nothing but what every installation has, as near to BASE as can be had without a registry."""
    if os.geteuid() or shutil.which("debootstrap") is None:
        raise RuntimeError("needs root and debootstrap: apt-get install debootstrap")
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", target], check=True, stdout=subprocess.DEVNULL)
    return target
