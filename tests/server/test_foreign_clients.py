"""Clients that want an environment of their own (`make clients`) against a real socket: LangChain's and LlamaIndex'
wrappers, Voyage's client, an older one of Cohere, clip-retrieval's ClipClient. None of them is changed for us.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.app import create_app
from server.engine import BundleEngine
from server.index.edge import open_index
from server.model import Loaded
from server.registry import Source
from server.settings import Settings
from vlp.bundle import load_bundle
from vlp.infer import encode_images, encode_texts
from vlp.testing import picture

SCRIPT = Path(__file__).parent / "foreign_clients.py"
PYTHON = Path(sys.prefix) / "peers" / "clients" / "bin" / "python"
TEXTS = ["red circle", "tall tree"]
Floats = np.ndarray[Any, np.dtype[np.float32]]

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no environment with other clients: make clients")


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "a.jpg"
    path.write_bytes(picture(3))
    return path


@pytest.fixture(scope="module")
def both(bundle_folder: Path, index_folder: Path, serving: Any) -> Iterator[str]:
    """The same bundle under two names: one wrapper sends pictures only to a name it knows."""
    settings, bundle = Settings(), load_bundle(bundle_folder)
    engines = [BundleEngine(bundle, settings.limits, name) for name in ("micro", "embed-english-v3.0")]
    index = open_index(index_folder)
    with serving(create_app(settings, [Source(Loaded(engine)) for engine in engines], index)) as url:
        yield url


@pytest.fixture(scope="module")
def got(both: str, jpeg: Path) -> dict[str, Any]:
    """What every client got."""
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(PYTHON), "-W", "ignore", str(SCRIPT), both, str(jpeg)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def texts(bundle_folder: Path) -> Floats:
    found: Floats = encode_texts(load_bundle(bundle_folder), TEXTS).numpy()
    return found


@pytest.fixture(scope="module")
def image(bundle_folder: Path) -> Floats:
    found: Floats = encode_images(load_bundle(bundle_folder), [picture(3)]).numpy()
    return found


@pytest.mark.parametrize(
    "name",
    [
        "langchain_openai", "langchain_cohere", "llama_index_openai", "llama_index_jina", "llama_index_tei",
        "llama_index_cohere", "voyage", "cohere_5",
    ],
)  # fmt: skip
def test_vectors_are_the_librarys(name: str, got: dict[str, Any], texts: Floats, image: Floats) -> None:
    found = got[name]
    assert "error" not in found, found
    np.testing.assert_allclose(found["documents"], texts, atol=1e-6)
    np.testing.assert_allclose(found["query"], texts[0], atol=1e-6)
    if "pictures" in found:
        np.testing.assert_allclose(found["pictures"], image, atol=1e-6)
    if "lossless" in found:  # decoded by the client and encoded again
        np.testing.assert_allclose(found["lossless"], image, atol=1e-2)


def test_jinas_bits_are_the_signs(got: dict[str, Any], texts: Floats) -> None:
    found = got["llama_index_jina_binary"]
    assert "error" not in found, found
    np.testing.assert_array_equal(found["documents"], texts > 0)
    np.testing.assert_array_equal(found["query"], texts[0] > 0)


def test_what_clients_show_of_our_errors(got: dict[str, Any]) -> None:
    assert "fetches no URLs" in got["llama_index_jina_by_url"]["error"]
    assert "check_embedding_ctx_length=False" in got["langchain_openai_sends_token_ids"]["error"]


def test_clip_retrievals_client(got: dict[str, Any], texts: Floats, image: Floats, embeddings: Path) -> None:
    found = got["clip_client"]
    assert "error" not in found, found
    arrays = [np.load(path) for path in sorted((embeddings / "img_emb").glob("*.npy"))]
    vectors = np.concatenate(arrays).astype(np.float32)
    axis = np.eye(16, dtype=np.float32)[0]
    for name, query in (("text", texts[0]), ("image", image[0]), ("vector", axis)):
        scores = vectors @ query
        assert [row["id"] for row in found[name]] == np.argsort(-scores)[:5].tolist()
        np.testing.assert_allclose([row["similarity"] for row in found[name]], np.sort(scores)[::-1][:5], atol=1e-5)
        assert all(row["caption"] and row["image_path"] == row["key"] for row in found[name])
    assert 0 < len(found["distinct"]) < 60
    assert "laion5B" in found["unknown"]["error"]
    assert "fetches no URLs" in found["by_url"]["error"]
