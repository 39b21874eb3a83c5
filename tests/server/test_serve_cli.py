"""`vlp serve` and `vlp index build` as users run them, in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from server.browsers import is_loopback
from server.cli import serve
from server.keys import ENVIRONMENT as KEYS
from vlp.bundle import INFO, save_bundle
from vlp.testing import micro_bundle

ROOT = Path(__file__).parents[2]


def vlp(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "vlp", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_serve_answers_and_stops_gracefully(bundle_folder: Path, embeddings: Path, tmp_path: Path) -> None:
    built = vlp("index", "build", embeddings, "--out", tmp_path / "index", "--json")
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout.splitlines()[-1])["points"] == 60
    command = [
        sys.executable,
        "-m",
        "vlp",
        "serve",
        bundle_folder,
        "--index",
        tmp_path / "index",
        "--port",
        "0",
        "--json",
    ]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        info = json.loads(process.stdout.readline())
        assert (info["model"], info["dim"], info["points"]) == ("micro", 16, 60)
        assert httpx2.get(f"{info['url']}/readyz").status_code == 200
        hits = httpx2.post(f"{info['url']}/v1/search", json={"text": "red", "limit": 3}).json()["hits"]
        assert len(hits) == 3
        locked = vlp("serve", bundle_folder, "--index", tmp_path / "index", "--port", "0")
        assert locked.returncode == 1
        assert "another process has this index open" in locked.stderr
        taken = vlp("serve", bundle_folder, "--port", str(info["port"]))
        assert taken.returncode == 1
        assert f"cannot listen on 127.0.0.1:{info['port']}" in taken.stderr
        assert "Traceback" not in taken.stderr
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def refused(*arguments: str | Path) -> str:
    """What `vlp serve` says when it does not start; in this process, because importing torch takes seconds."""
    done = CliRunner().invoke(serve, [str(argument) for argument in arguments], env={KEYS: ""})
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), "not a readable message"
    return done.output


def test_an_index_of_another_model_is_refused(index_folder: Path, tmp_path: Path) -> None:
    other = save_bundle(micro_bundle(seed=1), tmp_path / "other")
    assert "would not understand it" in refused(other, "--index", index_folder, "--port", "0")


def test_a_bundle_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    newer = save_bundle(micro_bundle(), tmp_path / "newer")
    content: dict[str, Any] = json.loads((newer / INFO).read_text())
    (newer / INFO).write_text(json.dumps({**content, "format": 99}))
    assert "newer vlp" in refused(newer, "--port", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--allow-open"),
        (["--host", "::"], "--allow-open"),
        (["--host", "no.such.host.invalid"], "--allow-open"),
        (["--host", "no.such.host.invalid", "--allow-open"], "--host no.such.host.invalid"),
        (["--index", "nowhere"], "no index here"),
    ],
)
def test_start_refused(arguments: list[str], message: str, bundle_folder: Path) -> None:
    assert message in refused(bundle_folder, "--port", "0", *arguments)


def test_a_missing_bundle_is_refused() -> None:
    assert "no such folder" in refused("nowhere", "--port", "0")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_an_ipv6_address_can_be_served(bundle_folder: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    from server.cli import listen

    try:
        listener = listen("::1", 0)
    except Exception as error:  # noqa: BLE001 - machines without an IPv6 loopback say so in many ways
        pytest.skip(f"no IPv6 loopback here: {error}")
    with listener:
        assert listener.getsockname()[1] > 0


def test_help_shows_an_example_and_loads_no_torch() -> None:
    code = "import sys, server.cli, server.index.build; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode == 0
    for command in (["serve"], ["index", "build"], ["embed"]):
        shown = vlp(*command, "--help")
        assert shown.returncode == 0
        assert f"vlp {' '.join(command)}" in shown.stdout.split("Example")[1]
