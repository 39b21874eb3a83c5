"""The audit log: a chain that shows every change, written before the answer, by several processes at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import PipelineError
from server.audit import AuditLog, verify

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    for number in range(5):
        AuditLog(path).append({"client": "a", "number": number})
    return path


def test_a_whole_chain(log: Path) -> None:
    assert verify(log) == 5
    assert log.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("number", range(5))
def test_a_changed_line_is_found(number: int, log: Path) -> None:
    lines = log.read_text().splitlines()
    lines[number] = lines[number].replace('"client":"a"', '"client":"b"')
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(PipelineError, match=f"line {number + 1}"):
        verify(log)


@pytest.mark.parametrize("number", range(4))
def test_a_dropped_line_is_found(number: int, log: Path) -> None:
    lines = log.read_text().splitlines()
    del lines[number]
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(PipelineError, match=f"line {number + 1}"):
        verify(log)


def test_swapped_and_foreign_lines_are_found(log: Path) -> None:
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(PipelineError, match="line 1"):
        verify(log)
    log.write_text("\n".join([*lines, "[]"]) + "\n")
    with pytest.raises(PipelineError, match="line 6"):
        verify(log)


def test_after_a_torn_line_the_chain_goes_on_and_the_tear_shows(log: Path) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    AuditLog(log).append({"client": "a", "number": 5})
    lines = log.read_bytes().splitlines()
    assert json.loads(lines[5])["previous"] == json.loads(lines[3])["hash"]
    with pytest.raises(PipelineError, match="line 5"):
        verify(log)


def test_several_processes_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    code = (
        "import sys; from pathlib import Path; from server.audit import AuditLog\n"
        "for n in range(30): AuditLog(Path(sys.argv[1])).append({'by': sys.argv[2], 'n': n})"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, path, str(who)], cwd=ROOT) for who in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert verify(path) == 90
