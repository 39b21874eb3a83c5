"""POST /v1/classify over a real socket."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from vlp.bundle import load_bundle
from vlp.infer import classify, encode_images, label_head
from vlp.testing import picture

B64 = Callable[[bytes], str]
LABELS = ["red circle", "green square", "tall tree"]


def test_probabilities_and_cosines_are_the_librarys(
    live: str, http: httpx2.Client, bundle_folder: Path, b64: B64
) -> None:
    images, templates = [picture(1), picture(2)], ["{}", "a photo of {}"]
    answer = http.post(
        f"{live}/v1/classify", json={"images": [b64(i) for i in images], "labels": LABELS, "templates": templates}
    ).json()
    bundle = load_bundle(bundle_folder)
    expected = classify(bundle, encode_images(bundle, images), label_head(bundle, LABELS, templates))
    assert [row["index"] for row in answer["data"]] == [0, 1]
    for number, row in enumerate(answer["data"]):
        predictions = row["predictions"]
        assert [p["cosine"] for p in predictions] == sorted((p["cosine"] for p in predictions), reverse=True)
        assert sum(p["probability"] for p in predictions) == pytest.approx(1, abs=1e-5)
        by_label = {p["label"]: (p["probability"], p["cosine"]) for p in predictions}
        found = np.array([by_label[label] for label in LABELS])
        np.testing.assert_allclose(found[:, 0], expected[0][number], atol=1e-5)
        np.testing.assert_allclose(found[:, 1], expected[1][number], atol=1e-6)


def test_top_k_and_a_single_image(live: str, http: httpx2.Client, b64: B64) -> None:
    full = http.post(f"{live}/v1/classify", json={"image": b64(picture(4)), "labels": LABELS}).json()
    best = http.post(f"{live}/v1/classify", json={"image": b64(picture(4)), "labels": LABELS, "top_k": 1}).json()
    assert best["data"][0]["predictions"] == full["data"][0]["predictions"][:1]
    assert len(full["data"]) == 1


def test_one_bad_image_fails_alone(live: str, http: httpx2.Client, b64: B64) -> None:
    given = [b64(picture(1)), b64(b"no picture"), "https://example.com/a.png", b64(picture(2))]
    answer = http.post(f"{live}/v1/classify", json={"images": given, "labels": LABELS})
    assert answer.status_code == 200
    rows = answer.json()["data"]
    assert [row["error"] and (row["error"]["param"], row["error"]["code"]) for row in rows] == [
        None, ("images[1]", "not_an_image"), ("images[2]", "url_not_allowed"), None,
    ]  # fmt: skip
    assert [row["predictions"] is None for row in rows] == [False, True, True, False]
    alone = http.post(f"{live}/v1/classify", json={"image": given[3], "labels": LABELS}).json()["data"][0]
    together = rows[3]["predictions"]
    for mine, other in zip(alone["predictions"], together, strict=True):
        assert mine == pytest.approx(other, abs=1e-6)


def test_only_bad_images_are_a_bad_request(live: str, http: httpx2.Client, b64: B64) -> None:
    answer = http.post(f"{live}/v1/classify", json={"images": [b64(b"no"), b64(b"none")], "labels": LABELS})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "images[0]")


@pytest.mark.parametrize(
    "change",
    [
        {"labels": []},
        {"labels": ["a", ""]},
        {"labels": ["a", "a"]},
        {"labels": "a"},
        {"labels": ["a"] * 0 + [str(n) for n in range(1025)]},
        {"labels": ["a" * 9000]},
        {"templates": ["no place"]},
        {"templates": []},
        {"templates": ["{}" * 4000], "labels": ["abc"]},
        {"images": ["aGk="]},
        {"image": None},
        {"top_k": 0},
        {"model": "other"},
    ],
)
def test_bad_requests(change: dict[str, Any], live: str, http: httpx2.Client, b64: B64) -> None:
    body = {"image": b64(picture(1)), "labels": LABELS, **change}
    answer = http.post(f"{live}/v1/classify", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_template_is_no_format_string(live: str, http: httpx2.Client, b64: B64) -> None:
    """str.format would read attributes and allocate gigabytes for `{:>9999999999}`."""
    body = {"image": b64(picture(1)), "labels": LABELS, "templates": ["{} {0.__class__} {:>9999999999}"]}
    assert http.post(f"{live}/v1/classify", json=body).status_code == 200
