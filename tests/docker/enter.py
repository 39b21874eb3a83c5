"""Runs one command inside a root folder as a container engine would: `unshare ... python enter.py SETTINGS`.

SETTINGS is JSON: root, command, env, cwd; binds [[host path, path inside, writable]], tmpfs [path inside]; tight: root
mounted read-only, /tmp without exec, user 65532, no capability, no new privileges, and no network but loopback.
The mounts end with the mount namespace that `unshare` made. Standard library alone; nothing of the project.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

USER = 65532
DEVICES = ("null", "zero", "full", "random", "urandom")
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38


def mount(*arguments: str | Path) -> None:
    """mount(8)."""
    subprocess.run(["mount", *map(str, arguments)], check=True)


def bind(source: Path, target: Path, writable: bool) -> None:
    """Show a file or folder of the host inside."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount("--bind", source, target)
    if not writable:
        mount("-o", "remount,bind,ro", target)


def furnish(root: Path, settings: dict[str, Any]) -> None:
    """/proc, /dev, what is bound, and then the root read-only."""
    mount("--make-rprivate", "/")
    mount("--bind", root, root)
    mount("-t", "proc", "-o", "nosuid,nodev,noexec", "proc", root / "proc")
    mount("-t", "tmpfs", "-o", "nosuid,noexec,mode=755", "tmpfs", root / "dev")
    for name in DEVICES:
        bind(Path("/dev") / name, root / "dev" / name, writable=True)
    (root / "dev/shm").mkdir()
    mount("-t", "tmpfs", "-o", "nosuid,nodev,noexec,mode=1777", "tmpfs", root / "dev/shm")
    for source, target, writable in settings["binds"]:
        bind(Path(source), root / target.lstrip("/"), writable)
    for target in settings["tmpfs"]:
        mount("-t", "tmpfs", "-o", "nosuid,nodev,noexec,mode=1777", "tmpfs", root / target.lstrip("/"))
    if settings["tight"]:
        mount("-o", "remount,bind,ro", root)


def tighten() -> None:
    """From root to nobody in particular, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        assert libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())


def main() -> None:
    """Never returns."""
    settings = json.loads(sys.argv[1])
    root = Path(settings["root"])
    if settings["tight"]:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    furnish(root, settings)
    os.chroot(root)
    os.chdir(settings["cwd"])
    if settings["tight"]:
        tighten()
    os.execvpe(settings["command"][0], settings["command"], settings["env"])


if __name__ == "__main__":
    main()
