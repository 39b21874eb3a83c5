"""Collections over the life of servers, and a server that keeps none."""

import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.app import create_app
from server.catalogue import Collections
from server.engine import BundleEngine
from server.index.edge import open_index
from server.index.stores import FolderStore
from server.settings import Settings
from vlp.bundle import load_bundle


def test_collections_outlive_the_server(bundle_folder: Path, serving: Any, tmp_path: Path, http: httpx2.Client) -> None:
    settings = Settings()
    engine = BundleEngine(load_bundle(bundle_folder), settings.limits)
    for turn in range(2):
        with serving(create_app(settings, engine, kept=Collections(FolderStore(tmp_path)))) as url:
            if turn == 0:
                http.post(f"{url}/v1/collections", json={"name": "default"})
                http.post(f"{url}/v1/collections/default/points", json={"points": [{"id": 1, "text": "red"}]})
            listed = http.get(f"{url}/v1/collections").json()["data"]
            assert [(item["name"], item["default"], item["points"]) for item in listed] == [("default", True, 1)]
            # the older route searches in the default collection
            hit = http.post(f"{url}/v1/search", json={"text": "red"}).json()["hits"][0]
            assert (hit["id"], hit["score"]) == (1, pytest.approx(1, abs=1e-5))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_without_a_store_collections_cannot_be_made(
    bundle_folder: Path, index_folder: Path, serving: Any, http: httpx2.Client, tmp_path: Path
) -> None:
    settings = Settings()
    engine = BundleEngine(load_bundle(bundle_folder), settings.limits)
    folder = shutil.copytree(index_folder, tmp_path / "index")  # the other one may be open
    with serving(create_app(settings, engine, open_index(folder))) as url:
        answer = http.post(f"{url}/v1/collections", json={"name": "new"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_store")
        assert "--collections" in answer.json()["error"]["message"]
        answer = http.delete(f"{url}/v1/collections/default")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_droppable")
        assert http.get(f"{url}/v1/collections/default").json()["points"] == 60
        body = {"points": [{"id": 1000, "text": "red", "payload": {"key": "new"}}]}
        assert http.post(f"{url}/v1/collections/default/points", json=body).json()["upserted"] == 1
        (hit,) = http.post(f"{url}/v1/search", json={"text": "red", "filter": {"key": "new"}}).json()["hits"]
        assert hit["id"] == 1000
