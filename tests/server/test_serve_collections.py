"""`vlp serve --collections` as a process: kill -9 of server and engines, and what its answers promised."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner

from server.cli import serve

ROOT = Path(__file__).parents[2]


@contextmanager
def served(bundle: Path, kept: Path) -> Iterator[str]:
    """The URL of a server in a session of its own, which is killed at the end with all its engines."""
    arguments = [sys.executable, "-m", "vlp", "serve", bundle, "--collections", kept, "--port", "0", "--json"]
    process = subprocess.Popen(
        [str(argument) for argument in arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_acknowledged_points_survive_kill_9_of_the_server(bundle_folder: Path, tmp_path: Path) -> None:
    with served(bundle_folder, tmp_path / "kept") as url, httpx2.Client(base_url=f"{url}/v1", timeout=60) as api:
        assert api.post("/collections", json={"name": "photos", "fields": {"n": "integer"}}).status_code == 201
        points = [{"id": n, "text": f"red {n}", "payload": {"n": n, "caption": f"word{n}"}} for n in range(40)]
        assert api.post("/collections/photos/points", json={"points": points}).json()["upserted"] == 40
        assert api.request("DELETE", "/collections/photos/points", json={"ids": [3, 4]}).json() == {"deleted": 2}
    with served(bundle_folder, tmp_path / "kept") as url, httpx2.Client(base_url=f"{url}/v1", timeout=60) as api:
        asked = {"text": "red 7", "filter": {"n": {"lte": 7}}, "limit": 40}
        hits = api.post("/collections/photos/search", json=asked).json()["hits"]
        assert sorted(hit["id"] for hit in hits) == [0, 1, 2, 5, 6, 7]
        assert hits[0]["id"] == 7
        assert api.post("/collections/photos/search", json={"keywords": "word39"}).json()["hits"][0]["id"] == 39
        assert api.get("/collections/photos").json()["points"] == 38


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--collections", "kept", "--qdrant", "http://127.0.0.1:9"], "either in a folder"),
        (["--qdrant", "http://127.0.0.1:9"], "no Qdrant server answers there"),
        (["--collections", "kept", "--workers", "2"], "open in one process only"),
    ],
)
def test_start_refused(arguments: list[str], message: str, bundle_folder: Path, tmp_path: Path) -> None:
    given = [str(tmp_path / "kept") if argument == "kept" else argument for argument in arguments]
    done = CliRunner().invoke(serve, [str(bundle_folder), "--port", "0", *given])
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), "not a readable message"
    assert message in done.output
