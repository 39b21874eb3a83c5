"""Real things for the server's tests: a micro bundle, shards, embeddings, an index, apps behind real sockets."""

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from server.app import create_app
from server.cli import listen
from server.engine import BundleEngine
from server.index.build import build_index
from server.index.edge import open_index
from server.settings import Settings
from server.testing import FakeEngine
from vlp.bundle import load_bundle, save_bundle
from vlp.embed import embed_shards, weights_digest
from vlp.testing import WORDS, micro_bundle, picture

Serving = Callable[[FastAPI], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved bundle of a few thousand parameters."""
    return save_bundle(micro_bundle(), tmp_path_factory.mktemp("bundle") / "micro")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures in three shards, from three sources, each with two labels."""
    out = tmp_path_factory.mktemp("shards")
    records = [
        Record(picture(i), (WORDS[i % 7], "other words"), f"vendor{i % 3}", f"{i}.jpg", labels=(f"class{i % 5}", "all"))
        for i in range(60)
    ]
    write_shards(records, out, WriteOptions(samples_per_shard=25), kind="test", licences={}, progress=False)
    return out


@pytest.fixture(scope="session")
def embeddings(bundle_folder: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedding folder of the shards."""
    out = tmp_path_factory.mktemp("embeddings") / "emb"
    embed_shards(load_bundle(bundle_folder), weights_digest(bundle_folder), shards, out)
    return out


@pytest.fixture(scope="session")
def index_folder(embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished index, free to be opened by one test at a time."""
    out = tmp_path_factory.mktemp("index") / "index"
    build_index(embeddings, out, "image", ["width"], lambda _: None)
    return out


@contextmanager
def _serving(app: FastAPI) -> Iterator[str]:
    """The app behind a real uvicorn on a free port; yields its URL."""
    with listen("127.0.0.1", 0) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started, "the server did not start"
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def serving() -> Serving:
    """Context manager that serves an app over a socket."""
    return _serving


@pytest.fixture(scope="module")
def live(bundle_folder: Path, index_folder: Path) -> Iterator[str]:
    """URL of a server with the micro bundle and the index."""
    settings = Settings()
    engine = BundleEngine(load_bundle(bundle_folder), settings.limits)
    with _serving(create_app(settings, engine, open_index(index_folder))) as url:
        yield url


@pytest.fixture
def http() -> Iterator[httpx2.Client]:
    """A client that waits long enough for a busy machine."""
    with httpx2.Client(timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def b64() -> Callable[[bytes], str]:
    """Bytes as base64 text."""
    return lambda data: base64.b64encode(data).decode()


@pytest.fixture
def fake_engine() -> FakeEngine:
    """An engine that answers at once."""
    return FakeEngine()
