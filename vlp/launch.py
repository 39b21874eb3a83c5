"""Several processes on this machine for one run: on a CPU, N processes of one thread beat one process of N threads."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.errors import PipelineError

PATIENCE = 60
"""Seconds the other ranks get to leave by themselves once rank 0 is done."""


@contextmanager
def local_ranks(count: int, folder: Path, resume: bool, command: Sequence[str] = ()) -> Iterator[None]:
    """This process becomes rank 0 of `count`; the others run `vlp train` on the recipe that stands in `folder`.

    `command`: what they run instead, as arguments of `vlp`.

    Nothing happens for a single rank, nor below torchrun, which has started all ranks already.
    """
    if count == 1 or "WORLD_SIZE" in os.environ:
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared = {**size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = command or ["train", str(folder / "recipe.yaml"), "--run-dir", str(folder), *["--resume"] * resume]
    others = [
        subprocess.Popen(
            [sys.executable, "-m", "vlp", *command],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(1, count)
    ]
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    done = False
    try:
        yield
        done = True
    except RuntimeError as error:
        dead = [(rank, code) for rank, other in enumerate(others, 1) if (code := _code(other))] if _lost(error) else []
        if not dead:
            raise
        rank, code = dead[0]
        raise PipelineError(
            f"rank {rank} ended with exit code {code} (its message is above); continue with --resume"
        ) from error
    finally:
        for key in (*shared, "RANK", "LOCAL_RANK"):
            os.environ.pop(key)
        for process in others:
            _end(process, PATIENCE if done else 0)


def _lost(error: RuntimeError) -> bool:
    """Whether this is what a broken connection to another rank looks like here; an own error is nobody else's fault."""
    return any(word in str(error).lower() for word in ("connection", "socket", "gloo", "nccl", "timed out", "timeout"))


def _code(process: "subprocess.Popen[bytes]") -> int | None:
    """Exit code of a process that ended or is about to."""
    try:
        return process.wait(15)
    except subprocess.TimeoutExpired:
        return None


def _end(process: "subprocess.Popen[bytes]", patience: float) -> None:
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
