"""POST /v1/search over a real socket and a real Qdrant Edge index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow.parquet as pq
import pytest

from server.app import create_app
from server.engine import BundleEngine
from server.settings import Settings
from vlp.bundle import load_bundle
from vlp.infer import encode_texts
from vlp.testing import WORDS, picture

B64 = Callable[[bytes], str]


@pytest.fixture(scope="module")
def stored(embeddings: Path) -> tuple[np.ndarray[Any, np.dtype[np.float32]], list[dict[str, Any]]]:
    """All vectors and metadata rows in id order, read back from the embedding folder."""
    arrays = [np.load(path) for path in sorted((embeddings / "img_emb").glob("*.npy"))]
    tables = [pq.read_table(path).to_pylist() for path in sorted((embeddings / "metadata").glob("*.parquet"))]
    return np.concatenate(arrays), [row for table in tables for row in table]


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        (None, lambda row: True),
        ({"source": "vendor1"}, lambda row: row["source"] == "vendor1"),
        ({"labels": "class3"}, lambda row: "class3" in row["labels"]),
        ({"labels": ["class3", "class4"]}, lambda row: {"class3", "class4"} & set(row["labels"])),
        (
            {"labels": "class2", "source": "vendor0"},
            lambda row: "class2" in row["labels"] and row["source"] == "vendor0",
        ),
        ({"width": 40}, lambda row: row["width"] == 40),
        ({"width": 41}, lambda row: False),
    ],
)
def test_hits_equal_a_filtered_scan(
    where: dict[str, Any] | None,
    keep: Callable[[dict[str, Any]], bool],
    live: str,
    http: httpx2.Client,
    bundle_folder: Path,
    stored: tuple[np.ndarray[Any, np.dtype[np.float32]], list[dict[str, Any]]],
) -> None:
    answer = http.post(f"{live}/v1/search", json={"text": "red circle", "limit": 7, "filter": where}).json()
    vectors, rows = stored
    scores = vectors @ encode_texts(load_bundle(bundle_folder), ["red circle"]).numpy()[0]
    best = sorted((n for n, row in enumerate(rows) if keep(row)), key=lambda n: -scores[n])[:7]
    assert [hit["id"] for hit in answer["hits"]] == best
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], scores[best], atol=1e-5)
    for hit in answer["hits"]:
        row = rows[hit["id"]]
        assert (hit["key"], hit["caption"], hit["source"]) == (row["image_path"], row["caption"], row["source"])
        assert hit["labels"] == row["labels"]


def test_a_stored_picture_finds_itself(live: str, http: httpx2.Client, b64: B64) -> None:
    hit = http.post(f"{live}/v1/search", json={"image": b64(picture(33)), "limit": 1}).json()["hits"][0]
    assert hit["score"] == pytest.approx(1, abs=1e-5)
    assert (hit["id"], hit["caption"]) == (33, WORDS[33 % 7])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"filter": {"caption": "x"}}, "filter.caption"),
        ({"filter": {"width": "40"}}, "filter.width"),
        ({"filter": {"width": True}}, "filter.width"),
        ({"filter": {"width": 2**70}}, "filter.width"),
        ({"filter": {"source": []}}, "filter.source"),
        ({"filter": {"source": 4}}, "filter.source"),
        ({"filter": "source"}, "filter"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"text": ""}, ""),
        ({"image": "aGk="}, ""),
        ({"text": None}, ""),
        ({"text": None, "image": "aGk="}, "image"),
        ({"text": "a" * 9000}, "text"),
        ({"model": "x"}, "model"),
    ],
)
def test_bad_requests(change: dict[str, Any], param: str, live: str, http: httpx2.Client) -> None:
    answer = http.post(f"{live}/v1/search", json={"text": "red", **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_without_an_index_the_answer_says_how_to_get_one(
    serving: Any, bundle_folder: Path, http: httpx2.Client
) -> None:
    settings = Settings()
    with serving(create_app(settings, BundleEngine(load_bundle(bundle_folder), settings.limits))) as url:
        answer = http.post(f"{url}/v1/search", json={"text": "red"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_index")
    assert "vlp index build" in answer.json()["error"]["message"]
