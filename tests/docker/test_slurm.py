"""docker/slurm/train.sbatch, run by bash with stand-ins for Slurm's commands that write down what they are asked."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.deployment import DOCKER, torchrun

SCRIPT = DOCKER / "slurm/train.sbatch"
STAND_IN = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv) + "\\n")
if os.path.basename(sys.argv[0]) == "scontrol" and sys.argv[1] == "show":
    print("node7\\nnode9")
if os.path.basename(sys.argv[0]) == "srun":
    sys.exit(int(os.environ["SRUN_STATUS"]))
"""


def submit(folder: Path, *arguments: str, status: int = 0, **environment: str) -> tuple[int, list[list[str]]]:
    """(exit code, the commands it gave: program and arguments)."""
    log = folder / "log"
    for name in ("srun", "scontrol"):
        path = folder / name
        path.write_text(STAND_IN.format(python=sys.executable, log=str(log)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7,9]",
           "SLURM_JOB_NUM_NODES": "2", "RUN": str(folder / "run"), "SRUN_STATUS": str(status),
           **environment}  # fmt: skip
    done = subprocess.run(["bash", SCRIPT, *arguments], env=env, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in log.read_text().splitlines()]


def test_all_nodes_run_our_command_and_meet_at_the_first(tmp_path: Path) -> None:
    code, commands = submit(tmp_path, "starter/clip", "run.steps=7", LAUNCH="apptainer exec --nv vlp-train.sif")
    assert code == 0
    (step,) = (command for command in commands if command[0].endswith("srun"))
    at = step.index("torchrun")
    assert step[1:at] == ["--kill-on-bad-exit=1", "apptainer", "exec", "--nv", "vlp-train.sif"]
    options, values = torchrun(step[at + 1 :])
    assert (options.nnodes, options.rdzv_endpoint, options.rdzv_id) == ("2", "node7:29400", "42")
    assert (values["recipe"], values["overrides"]) == ("starter/clip", ("run.steps=7",))
    assert values["run_dir"] == tmp_path / "run"
    assert values["resume"]


@pytest.mark.parametrize(
    ("finished", "restarts", "again"),
    [(False, "0", True), (False, "19", True), (False, "20", False), (True, "0", False)],
)
def test_what_is_not_finished_is_queued_again(tmp_path: Path, finished: bool, restarts: str, again: bool) -> None:
    (tmp_path / "run").mkdir()
    if finished:
        (tmp_path / "run/summary.json").write_text("{}")
    code, commands = submit(tmp_path, "starter/clip", status=143, SLURM_RESTART_COUNT=restarts)
    assert code == 143
    assert (["requeue", "42"] in [command[1:] for command in commands]) == again


def test_slurm_is_asked_for_a_signal_and_a_place_in_the_queue() -> None:
    asked = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)
