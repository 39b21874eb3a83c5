"""clip-retrieval's routes as clip-front and scripts use them; its own client asks in test_foreign_clients.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow.parquet as pq
import pytest

from server.index import Hit
from server.routes.clip_retrieval import _distinct
from vlp.bundle import load_bundle
from vlp.infer import encode_texts
from vlp.testing import picture

B64 = Callable[[bytes], str]
FRONT: dict[str, Any] = {
    "text": "red circle", "image": None, "image_url": None, "embedding_input": None, "deduplicate": False,
    "use_safety_model": True, "use_violence_detector": True, "indice_name": "default", "use_mclip": False,
    "aesthetic_score": "9", "aesthetic_weight": "0.5", "modality": "image", "num_images": 3, "num_result_ids": 60,
}  # fmt: skip
"""What clip-front sends, its numbers as words."""


@pytest.fixture(scope="module")
def vectors(embeddings: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.concatenate([np.load(path) for path in sorted((embeddings / "img_emb").glob("*.npy"))]).astype(np.float32)


def post(http: httpx2.Client, live: str, route: str, body: Any, kind: str = "text/plain") -> httpx2.Response:
    return http.post(f"{live}/{route}", content=json.dumps(body), headers={"Content-Type": kind})


def test_the_first_index_is_the_default(live: str, http: httpx2.Client) -> None:
    assert http.get(f"{live}/indices-list").json() == ["default"]
    named = post(http, live, "knn-service", FRONT).json()
    assert post(http, live, "knn-service", {**FRONT, "indice_name": None}).json() == named


def test_rows_past_num_images_have_no_metadata(
    live: str, http: httpx2.Client, bundle_folder: Path, vectors: Any, embeddings: Path
) -> None:
    rows = post(http, live, "knn-service", FRONT).json()
    scores = vectors @ encode_texts(load_bundle(bundle_folder), ["red circle"]).numpy()[0]
    assert [row["id"] for row in rows] == np.argsort(-scores).tolist()
    np.testing.assert_allclose([row["similarity"] for row in rows], np.sort(scores)[::-1], atol=1e-5)
    assert all("caption" in row for row in rows[:3])
    assert all(set(row) == {"id", "similarity"} for row in rows[3:])
    ids = [row["id"] for row in rows[3:9]]
    completed = post(http, live, "metadata", {"indice_name": "default", "ids": [*ids, 10_000]}).json()
    tables = [pq.read_table(path).to_pylist() for path in sorted((embeddings / "metadata").glob("*.parquet"))]
    stored = [row for table in tables for row in table]
    assert [(row["id"], row["metadata"]["caption"]) for row in completed] == [(n, stored[n]["caption"]) for n in ids]
    assert post(http, live, "metadata", {"ids": []}).json() == []


def test_empty_words_count_as_absent(live: str, http: httpx2.Client, b64: B64) -> None:
    body = {
        **FRONT,
        "text": "",
        "image": b64(picture(1)),
        "aesthetic_score": "",
        "aesthetic_weight": "",
        "modality": None,
    }
    assert len(post(http, live, "knn-service", body).json()) == 60
    least = {"text": "a", "num_images": 2}
    assert len(post(http, live, "knn-service", least).json()) == 2
    assert post(http, live, "knn-service", {**least, "num_images": 0}).json() == []


def test_text_comes_before_a_picture(live: str, http: httpx2.Client, b64: B64) -> None:
    both = post(http, live, "knn-service", {**FRONT, "image": b64(picture(1))}).json()
    assert both == post(http, live, "knn-service", FRONT).json()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"text": None}, 400),
        ({"text": None, "image": "aGk="}, 400),
        ({"text": None, "image_url": "https://example.com/a.jpg"}, 400),
        ({"text": None, "embedding_input": [1.0, 2.0]}, 400),
        ({"text": None, "embedding_input": [0.0] * 16}, 400),
        ({"text": None, "embedding_input": [float("nan")] * 16}, 400),
        ({"text": None, "embedding_input": []}, 400),
        ({"modality": "text"}, 400),
        ({"modality": "smell"}, 400),
        ({"num_images": -1}, 400),
        ({"num_images": "many"}, 400),
        ({"aesthetic_score": "high"}, 400),
        ({"indice_name": "other"}, 404),
        ({"text": "a" * 9000}, 400),
    ],
)
def test_bad_requests(change: dict[str, Any], status: int, live: str, http: httpx2.Client) -> None:
    answer = post(http, live, "knn-service", {**FRONT, **change})
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "code", "param"}


@pytest.mark.parametrize("ids", [["one"], [-1], [2**64], [1.5], None, list(range(1001))])
def test_bad_ids(ids: Any, live: str, http: httpx2.Client) -> None:
    assert post(http, live, "metadata", {"ids": ids}).status_code == 400


def test_a_big_vector_is_normalised_without_overflow(live: str, http: httpx2.Client) -> None:
    small, big = ([scale] + [0.0] * 15 for scale in (1.0, 1e300))
    bodies = [{**FRONT, "text": None, "embedding_input": given} for given in (small, big)]
    rows = [post(http, live, "knn-service", body).json() for body in bodies]
    assert rows[0] == rows[1]


def test_groups_of_likeness_keep_their_best() -> None:
    """Angles 0, 15, 30, 90 degrees: neighbours of 15 have cosine .966 and hang together, 0 and 30 (.866) over 15."""
    turns = np.radians([0, 30, 90, 15])
    hits = [Hit(n, 1 - n / 10, {}, np.array([np.cos(t), np.sin(t)], np.float32)) for n, t in enumerate(turns)]
    assert [hit.id for hit in _distinct(hits)] == [0, 2]
    assert [hit.id for hit in _distinct(hits[:3])] == [0, 1, 2]
    assert _distinct([]) == []
