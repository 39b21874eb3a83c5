"""`vlp health`, the check of a container."""

import json
import socket

import pytest
from click.testing import CliRunner

from server.app import create_app
from server.health_cli import health
from server.settings import Settings
from server.testing import FakeEngine
from tests.server.conftest import Serving
from tests.test_imports import loaded


def test_a_ready_server_is_healthy(serving: Serving) -> None:
    with serving(create_app(Settings(), FakeEngine())) as url:
        result = CliRunner().invoke(health, ["--url", f"{url}/readyz", "--json"])
        assert json.loads(result.stdout) == {"url": f"{url}/readyz", "status": 200}
        assert CliRunner().invoke(health, ["--url", f"{url}/healthz"]).stdout == f"{url}/healthz: ready\n"


def test_a_server_whose_model_fails_is_not_and_says_why(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.model.CANARY_REST", 0.0)
    engine = FakeEngine()
    with serving(create_app(Settings(), engine)) as url:
        engine.mood = "fails"  # one that fails from the start does not start
        result = CliRunner().invoke(health, ["--url", f"{url}/readyz"])
    assert result.exit_code == 1
    assert "503" in result.stderr
    assert "reason" in result.stderr


def test_nobody_there_and_no_url() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"http://127.0.0.1:{free.getsockname()[1]}/readyz"
        result = CliRunner().invoke(health, ["--url", where])
    assert (result.exit_code, "no answer" in result.stderr) == (1, True)
    result = CliRunner().invoke(health, ["--url", "file:///etc/passwd"])
    assert (result.exit_code, "expected http://" in result.stderr) == (1, True)


def test_it_loads_nothing_heavy() -> None:
    """It runs every few seconds."""
    assert loaded("import server.health_cli", "torch", "fastapi", "numpy", "uvicorn", "asyncio") == set()
