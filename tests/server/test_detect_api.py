"""Detection over a real socket: /v1/detect and Hugging Face's zero-shot object detection, against the library."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from server.app import create_app
from server.engine import BundleEngine
from server.settings import Limits, Settings
from vlp.bundle import load_bundle, save_bundle
from vlp.testing import WORDS, micro_bundle, picture

B64 = Callable[[bytes], str]
LABELS = ["red circle", "bear"]
ANYTHING = {"labels": LABELS, "threshold": 0.0, "top_k": 20}


def detector_folder(folder: Path, stage: str) -> Path:
    """A micro bundle with fresh parts of a detector that claim a stage, its dense head stirred a bit."""
    model = importlib.import_module("vlp.detection.model")
    testing = importlib.import_module("vlp.testing")
    bundle: Any = micro_bundle()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = model.make_parts(model.PartsConfig(**testing.MICRO_PARTS), bundle.model, 16)
        torch.nn.init.normal_(parts.dense.centre.weight, std=1.0)
        torch.nn.init.normal_(parts.dense.sides.weight, std=0.5)
    changed = {"stage": stage, "base_labels": WORDS[:2] if stage == "finetune" else ()}
    parts.info = parts.info.model_copy(update=changed)
    bundle.parts["detection"] = parts.eval()
    return save_bundle(bundle, folder / "micro")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detector_folder(tmp_path_factory.mktemp("detector"), "finetune")


@pytest.fixture(scope="module")
def finder(folder: Path, serving: Any) -> Iterator[str]:
    settings = Settings(limits=Limits(detect_prompts=4, detections=50))
    with serving(create_app(settings, BundleEngine(load_bundle(folder), settings.limits))) as url:
        yield url


def library(folder: Path, data: bytes, **options: Any) -> list[Any]:
    infer, scores = (importlib.import_module(f"vlp.detection.{name}") for name in ("infer", "scores"))
    (found,) = infer.load_detector(folder).detect([data], LABELS, scores.Options(**options))
    return list(found)


def test_boxes_are_the_librarys_in_pixels_of_the_picture(
    finder: str, http: httpx2.Client, b64: B64, folder: Path
) -> None:
    data = picture(1, (97, 61))
    answer = http.post(f"{finder}/v1/detect", json={**ANYTHING, "image": b64(data)})
    assert answer.status_code == 200, answer.text
    (row,) = answer.json()["data"]
    expected = library(folder, data, threshold=0.0, top_k=20)
    assert expected
    assert (row["index"], row["width"], row["height"], row["error"]) == (0, 97, 61, None)
    assert [one["label"] for one in row["detections"]] == [one.label for one in expected]
    for mine, other in zip(row["detections"], expected, strict=True):
        assert mine["score"] == pytest.approx(other.score, abs=1e-5)
        sides = [mine["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")]
        assert sides == pytest.approx(list(other.box), abs=1e-2)


def test_one_bad_picture_fails_alone(finder: str, http: httpx2.Client, b64: B64) -> None:
    images = [b64(picture(1)), b64(b"no"), "https://example.com/a.jpg", b64(picture(2))]
    rows = http.post(f"{finder}/v1/detect", json={**ANYTHING, "images": images}).json()["data"]
    assert [row["error"] and row["error"]["code"] for row in rows] == [None, "not_an_image", "url_not_allowed", None]
    assert [row["detections"] is None for row in rows] == [False, True, True, False]
    alone = http.post(f"{finder}/v1/detect", json={**ANYTHING, "image": images[3]}).json()["data"][0]
    assert alone["detections"] == rows[3]["detections"]


def test_hugging_faces_envelope(finder: str, http: httpx2.Client, b64: B64, folder: Path) -> None:
    data = picture(1, (97, 61))
    route = f"{finder}/zero-shot-object-detection"
    parameters = {"candidate_labels": LABELS, "threshold": 0.0, "top_k": 5}
    body: dict[str, Any] = {"inputs": b64(data), "parameters": parameters}
    found = http.post(route, json=body).json()
    expected = library(folder, data, threshold=0.0, top_k=5)
    assert [one["label"] for one in found] == [one.label for one in expected]
    for mine, other in zip(found, expected, strict=True):
        assert list(mine["box"]) == ["xmin", "ymin", "xmax", "ymax"]
        assert all(type(side) is int for side in mine["box"].values())
        assert list(mine["box"].values()) == pytest.approx(list(other.box), abs=0.51)
    assert http.post(f"{finder}/", json=body).json() == found
    assert http.post(route, json={**body, "inputs": {"image": body["inputs"]}}).json() == found
    words = {"text_queries": LABELS, "threshold": 0.0, "top_k": 5}
    assert http.post(route, json={**body, "parameters": words}).json() == found
    assert http.post(route, json={**body, "inputs": [body["inputs"]] * 2}).json() == [found, found]
    by_default = http.post(route, json={**body, "parameters": {"candidate_labels": LABELS}}).json()
    assert len(by_default) == len(library(folder, data, threshold=0.1))


def test_a_label_set_names_what_to_look_for(finder: str, http: httpx2.Client, b64: B64) -> None:
    made = http.post(f"{finder}/v1/label-sets", json={"name": "things", "labels": LABELS, "templates": ["a {}"]})
    assert made.status_code == 201
    named = {"label_set": "things", "threshold": 0.0, "image": b64(picture(1))}
    spelt = {"labels": LABELS, "templates": ["a {}"], "threshold": 0.0, "image": b64(picture(1))}
    answers = [http.post(f"{finder}/v1/detect", json=body).json() for body in (named, spelt)]
    assert answers[0] == answers[1]
    assert answers[0]["data"][0]["detections"]


@pytest.mark.parametrize(
    "change",
    [
        {"labels": []},
        {"labels": ["  "]},
        {"labels": list("abcde")},
        {"label_set": "nothing", "labels": LABELS},
        {"threshold": 1},
        {"threshold": -0.1},
        {"nms": 2},
        {"top_k": 0},
        {"top_k": 51},
        {"image": "aGk="},
        {"model": "other"},
    ],
)
def test_bad_requests(change: dict[str, Any], finder: str, http: httpx2.Client, b64: B64) -> None:
    answer = http.post(f"{finder}/v1/detect", json={**ANYTHING, "image": b64(picture(1)), **change})
    assert answer.status_code == 400, answer.text


def test_a_bundle_without_parts_is_told_so(live: str, http: httpx2.Client, b64: B64) -> None:
    answer = http.post(f"{live}/v1/detect", json={**ANYTHING, "image": b64(picture(1))})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_detection_parts")
    assert "no detection parts" in answer.json()["message"]
    body = {"inputs": b64(picture(1)), "parameters": {"candidate_labels": LABELS}}
    other = http.post(f"{live}/zero-shot-object-detection", json=body)
    assert (other.status_code, other.json()["code"]) == (400, "no_detection_parts")


def test_parts_that_never_saw_a_box_are_refused(http: httpx2.Client, b64: B64, tmp_path: Path, serving: Any) -> None:
    settings = Settings()
    bundle = load_bundle(detector_folder(tmp_path, "pretrain"))
    with serving(create_app(settings, BundleEngine(bundle, settings.limits))) as url:
        answer = http.post(f"{url}/v1/detect", json={**ANYTHING, "image": b64(picture(1))})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_detection_parts")
