"""/v1/similarity, /v1/rank, /v1/label-sets and the open set of /v1/classify over a real socket."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from server.app import create_app
from server.engine import BundleEngine
from server.heads import Heads
from server.settings import Limits, Settings
from vlp.bundle import load_bundle
from vlp.infer import classify, encode_images, encode_texts, label_head
from vlp.testing import picture

B64 = Callable[[bytes], str]
Floats = np.ndarray[Any, np.dtype[np.float32]]
LABELS = ["red circle", "green square", "tall tree"]
TEMPLATES = ["{}", "a photo of {}"]


def texts(folder: Path, *given: str) -> Floats:
    found: Floats = encode_texts(load_bundle(folder), given).numpy()
    return found


def images(folder: Path, *given: bytes) -> Floats:
    found: Floats = encode_images(load_bundle(folder), given).numpy()
    return found


def test_similarity_of_pictures_and_texts(live: str, http: httpx2.Client, bundle_folder: Path, b64: B64) -> None:
    left: list[Any] = [{"image": b64(picture(1))}, "red circle"]
    right = ["tall tree", "green square", "red circle"]
    answer = http.post(f"{live}/v1/similarity", json={"left": left, "right": right}).json()
    rows = np.concatenate([images(bundle_folder, picture(1)), texts(bundle_folder, "red circle")])
    np.testing.assert_allclose(answer["cosines"], rows @ texts(bundle_folder, *right).T, atol=1e-5)
    assert answer["errors"] == []


def test_similarity_with_itself_and_with_an_unusable_picture(live: str, http: httpx2.Client, b64: B64) -> None:
    answer = http.post(f"{live}/v1/similarity", json={"left": ["a", {"image": b64(b"no")}, "red"]}).json()
    cosines = answer["cosines"]
    assert cosines[0][0] == pytest.approx(1, abs=1e-5)
    assert cosines[0][2] == pytest.approx(cosines[2][0], abs=1e-6)
    assert cosines[1] == [None] * 3
    assert [row[1] for row in cosines] == [None] * 3
    assert [(error["param"], error["code"]) for error in answer["errors"]] == [("left[1]", "not_an_image")]


def test_rank_orders_documents(live: str, http: httpx2.Client, bundle_folder: Path, b64: B64) -> None:
    pictures = [picture(n) for n in range(6)]
    documents: list[Any] = [{"image": b64(data)} for data in pictures] + [{"image": b64(b"no")}, "red circle"]
    answer = http.post(f"{live}/v1/rank", json={"query": "red circle", "documents": documents}).json()
    query = texts(bundle_folder, "red circle")[0]
    expected = np.concatenate([images(bundle_folder, *pictures) @ query, [1.0]])
    numbers = [*range(6), 7]
    assert [row["index"] for row in answer["data"]] == [numbers[n] for n in np.argsort(-expected)]
    np.testing.assert_allclose([row["cosine"] for row in answer["data"]], np.sort(expected)[::-1], atol=1e-5)
    assert [error["param"] for error in answer["errors"]] == ["documents[6]"]
    best = http.post(f"{live}/v1/rank", json={"query": "red circle", "documents": documents, "top_k": 2}).json()
    assert best["data"] == answer["data"][:2]


def test_rank_by_a_picture(live: str, http: httpx2.Client, b64: B64) -> None:
    given = [b64(picture(n)) for n in (3, 1, 2)]
    body = {"query": b64(picture(1)), "documents": given, "modality": "image"}
    answer = http.post(f"{live}/v1/rank", json=body).json()
    assert answer["data"][0]["index"] == 1
    assert answer["data"][0]["cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("similarity", {}, "left"),
        ("similarity", {"left": []}, "left"),
        ("similarity", {"left": ["a"], "right": []}, "right"),
        ("similarity", {"left": ["a", 5]}, "left[1]"),
        ("similarity", {"left": [{"image": "aGk="}]}, "left[0]"),
        ("similarity", {"left": ["a"] * 800, "right": ["a"] * 800}, "left and right"),
        ("rank", {"query": "a"}, "documents"),
        ("rank", {"documents": ["a"]}, "query"),
        ("rank", {"query": {"image": "aGk="}, "documents": ["a"]}, "query"),
        ("rank", {"query": "a", "documents": [{"image": "aGk="}]}, "documents[0]"),
        ("rank", {"query": "a", "documents": ["a"], "top_k": 0}, "top_k"),
        ("rank", {"query": "", "documents": ["a"]}, "query"),
    ],
)
def test_bad_comparisons(route: str, body: dict[str, Any], param: str, live: str, http: httpx2.Client) -> None:
    answer = http.post(f"{live}/v1/{route}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def judged(http: httpx2.Client, live: str, image: str, unknown: Any) -> dict[str, Any]:
    body = {"image": image, "labels": LABELS, "unknown": unknown}
    answer = http.post(f"{live}/v1/classify", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["data"][0]
    return found


def test_prompts_for_unknown_compete_with_the_labels(
    live: str, http: httpx2.Client, bundle_folder: Path, b64: B64
) -> None:
    bundle = load_bundle(bundle_folder)
    others = ["a blank wall", "noise"]
    head = label_head(bundle, [*LABELS, *others])
    probabilities, cosines = classify(bundle, encode_images(bundle, [picture(1)]), head)
    row = judged(http, live, b64(picture(1)), {"prompts": others})
    by_label = {p["label"]: p["probability"] for p in row["predictions"]}
    assert by_label == pytest.approx(dict(zip(LABELS, probabilities[0, :3].tolist(), strict=True)), abs=1e-5)
    assert row["unknown"]["probability"] == pytest.approx(float(probabilities[0, 3:].sum()), abs=1e-5)
    lost = bool(cosines[0, 3:].max() > cosines[0, :3].max())
    assert row["unknown"]["is_unknown"] is lost
    assert row["label"] == ("unknown" if lost else LABELS[int(cosines[0, :3].argmax())])
    # the best label itself, once more as a prompt for unknown, is never better than the label
    same = judged(http, live, b64(picture(1)), {"prompts": [row["predictions"][0]["label"]]})
    assert same["unknown"]["reason"] in (None, "prompts")


def test_thresholds_for_unknown(live: str, http: httpx2.Client, b64: B64) -> None:
    image = b64(picture(1))
    best = judged(http, live, image, {"min_cosine": -1})
    assert best["unknown"] == {"is_unknown": False, "reason": None, "probability": None}
    first = best["predictions"][0]
    assert best["label"] == first["label"]
    for name, value, reason in (
        ("min_cosine", first["cosine"] + 1e-4, "min_cosine"),
        ("min_cosine", first["cosine"] - 1e-4, None),
        ("min_probability", first["probability"] + 1e-4, "min_probability"),
        ("min_probability", first["probability"] - 1e-4, None),
    ):
        row = judged(http, live, image, {name: value})
        assert (row["unknown"]["reason"], row["label"]) == (reason, "unknown" if reason else first["label"])


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": {}},
        {"unknown": {"prompts": [""]}},
        {"unknown": {"min_cosine": 2}},
        {"unknown": {"min_cosine": 0.1}, "labels": ["unknown", "a"]},
        {"label_set": "animals"},
        {"labels": None, "label_set": "animals", "templates": ["{}"]},
        {"labels": None},
    ],
)
def test_bad_open_sets(change: dict[str, Any], live: str, http: httpx2.Client, b64: B64) -> None:
    answer = http.post(f"{live}/v1/classify", json={"image": b64(picture(1)), "labels": LABELS, **change})
    assert answer.status_code == 400, answer.text


@pytest.fixture
def sets(bundle_folder: Path, tmp_path: Path, serving: Any) -> Iterator[str]:
    """A server that keeps two label sets at most."""
    settings = Settings(label_sets=tmp_path / "sets", limits=Limits(label_sets=2, set_prompts=12))
    with serving(create_app(settings, BundleEngine(load_bundle(bundle_folder), settings.limits))) as url:
        yield url


def test_a_label_set_is_used_by_name(sets: str, http: httpx2.Client, b64: B64) -> None:
    made = http.post(f"{sets}/v1/label-sets", json={"name": "shapes", "labels": LABELS, "templates": TEMPLATES})
    assert made.status_code == 201
    card = made.json()
    assert (card["count"], card["templates"]) == (3, TEMPLATES)
    assert http.get(f"{sets}/v1/label-sets").json()["data"] == [card]
    assert http.get(f"{sets}/v1/label-sets/shapes").json() == {**card, "labels": LABELS}
    image = b64(picture(2))
    named = http.post(f"{sets}/v1/classify", json={"image": image, "label_set": "shapes"}).json()
    spelt = http.post(f"{sets}/v1/classify", json={"image": image, "labels": LABELS, "templates": TEMPLATES}).json()
    assert named == spelt
    raw = http.post(f"{sets}/image-classification?label_set=shapes&top_k=2", content=picture(2)).json()
    assert [row["label"] for row in raw] == [p["label"] for p in named["data"][0]["predictions"][:2]]
    assert http.delete(f"{sets}/v1/label-sets/shapes").json() == {"name": "shapes", "deleted": True}
    gone = http.post(f"{sets}/v1/classify", json={"image": image, "label_set": "shapes"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "label_set_not_found")


def test_label_sets_outlive_the_server_and_are_replaced_on_demand_only(
    sets: str, http: httpx2.Client, tmp_path: Path, bundle_folder: Path, serving: Any
) -> None:
    body = {"name": "a", "labels": ["x"]}
    assert http.post(f"{sets}/v1/label-sets", json=body).status_code == 201
    again = http.post(f"{sets}/v1/label-sets", json={**body, "labels": ["y"]})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "label_set_exists")
    assert http.post(f"{sets}/v1/label-sets", json={**body, "labels": ["y"], "replace": True}).status_code == 200
    settings = Settings(label_sets=tmp_path / "sets")
    with serving(create_app(settings, BundleEngine(load_bundle(bundle_folder), settings.limits))) as other:
        assert http.get(f"{other}/v1/label-sets/a").json()["labels"] == ["y"]
        # what another worker changes is seen at once
        http.post(f"{sets}/v1/label-sets", json={**body, "labels": ["z"], "replace": True})
        assert http.get(f"{other}/v1/label-sets/a").json()["labels"] == ["z"]
        http.delete(f"{sets}/v1/label-sets/a")
        assert http.get(f"{other}/v1/label-sets/a").status_code == 404


def test_workers_without_a_common_folder_keep_no_label_sets(
    http: httpx2.Client, bundle_folder: Path, serving: Any
) -> None:
    settings = Settings(workers=2)
    with serving(create_app(settings, BundleEngine(load_bundle(bundle_folder), settings.limits))) as url:
        refused = http.post(f"{url}/v1/label-sets", json={"name": "a", "labels": ["x"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "label_sets_not_kept")


def test_there_are_only_so_many_label_sets(sets: str, http: httpx2.Client) -> None:
    for name in ("a", "b"):
        assert http.post(f"{sets}/v1/label-sets", json={"name": name, "labels": ["x"]}).status_code == 201
    full = http.post(f"{sets}/v1/label-sets", json={"name": "c", "labels": ["x"]})
    assert (full.status_code, full.json()["error"]["code"]) == (409, "too_many_label_sets")


def test_a_damaged_label_set_is_named_and_can_be_replaced(sets: str, http: httpx2.Client, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir(exist_ok=True)
    (tmp_path / "sets" / "a.json").write_text(json.dumps({"name": "a"})[:-2])
    found = http.get(f"{sets}/v1/label-sets/a")
    assert (found.status_code, found.json()["error"]["code"]) == (409, "label_set_damaged")
    assert str(tmp_path) not in found.text
    assert http.get(f"{sets}/v1/label-sets").json()["data"] == []
    assert http.post(f"{sets}/v1/label-sets", json={"name": "a", "labels": ["x"], "replace": True}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"labels": ["a"]},
        {"name": "../up", "labels": ["a"]},
        {"name": "A", "labels": ["a"]},
        {"name": ".hidden", "labels": ["a"]},
        {"name": "a" * 65, "labels": ["a"]},
        {"name": "a", "labels": []},
        {"name": "a", "labels": ["a", "a"]},
        {"name": "a", "labels": [" "]},
        {"name": "a", "labels": ["a"], "templates": ["no place"]},
        {"name": "a", "labels": [str(n) for n in range(13)]},
        {"name": "a", "labels": ["a"], "model": "other"},
    ],
)
def test_bad_label_sets(body: dict[str, Any], sets: str, http: httpx2.Client, tmp_path: Path) -> None:
    assert http.post(f"{sets}/v1/label-sets", json=body).status_code == 400
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", ["..%2fa", "%00", "A", "nothing"])
def test_names_that_are_no_files(name: str, sets: str, http: httpx2.Client) -> None:
    assert http.get(f"{sets}/v1/label-sets/{name}").status_code == 404


@pytest.mark.parametrize(
    ("query", "content"), [("", b"x"), ("?label_set=no", b"x"), ("?label_set=a&top_k=0", None), ("?label_set=a", b"no")]
)
def test_bad_image_classification(query: str, content: bytes | None, sets: str, http: httpx2.Client) -> None:
    http.post(f"{sets}/v1/label-sets", json={"name": "a", "labels": ["x", "y"]})
    answer = http.post(f"{sets}/image-classification{query}", content=content or picture(1))
    assert answer.status_code in (400, 404)
    assert set(answer.json()) == {"error", "code", "param"}


async def heads_of(embed: Any, *asked: tuple[list[str], list[str]]) -> Heads:
    heads = Heads(embed)
    for labels, templates in asked:
        await heads.get(labels, templates)
    return heads


def test_heads_are_computed_once_in_turns_of_a_few_prompts() -> None:
    import asyncio

    sizes: list[int] = []

    async def embed(texts: Any) -> tuple[Floats, int]:
        sizes.append(len(texts))
        return np.ones((len(texts), 4), np.float32), 0

    long = [str(n) for n in range(100)]
    heads = asyncio.run(heads_of(embed, (long, ["{}", "a {}"]), (["a"], ["{}"] * 70), (long, ["{}", "a {}"])))
    assert heads.computed == 2
    assert max(sizes) <= 64
    assert sum(sizes) == 200 + 70
