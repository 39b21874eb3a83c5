"""Folders of generated pictures and a web server that several test files use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.fetch import close_idle
from data_pipelines.testing import Web, draw, serve


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven pictures with captions beside them, one without, in two folders."""
    root = tmp_path / "photos"
    (root / "trip").mkdir(parents=True)
    for number in range(7):
        folder = root if number < 4 else root / "trip"
        (folder / f"p{number}.png").write_bytes(draw((40 + number, 30), "RGBA", seed=number))
        (folder / f"p{number}.txt").write_text(f"picture {number}\nanother line {number}\n")
    (root / "lonely.jpg").write_bytes(draw(format="JPEG", seed=99))
    return root


@pytest.fixture
def web() -> Iterator[Web]:
    """A web server on the loopback, without pages yet."""
    with serve() as server:
        yield server
        close_idle()
