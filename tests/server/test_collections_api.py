"""/v1/collections over a real socket, with embedded collections in engine processes of their own."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from server.app import create_app
from server.catalogue import Collections
from server.engine import BundleEngine
from server.index.stores import FolderStore
from server.settings import Limits, Settings
from vlp.bundle import load_bundle
from vlp.infer import encode_texts
from vlp.testing import WORDS, picture

B64 = Callable[[bytes], str]
LIMITS = Limits(collections=6, points=50, payload_bytes=2000)
FIELDS = {"source": "keyword", "n": "integer", "flag": "bool"}


@pytest.fixture(scope="module")
def url(bundle_folder: Path, serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that keeps collections in a folder."""
    settings = Settings(limits=LIMITS)
    engine = BundleEngine(load_bundle(bundle_folder), settings.limits)
    kept = Collections(FolderStore(tmp_path_factory.mktemp("collections")))
    with serving(create_app(settings, engine, kept=kept)) as found:
        yield found


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=60, base_url=f"{url}/v1") as client:
        yield client


@pytest.fixture(scope="module")
def filled(api: httpx2.Client, b64: B64) -> httpx2.Client:
    """`photos` with forty pictures, of which a quarter has no caption."""
    made = api.post("/collections", json={"name": "photos", "fields": FIELDS})
    assert made.status_code == 201, made.text
    for at in (0, 20):
        points = [
            {
                "id": n,
                "image": b64(picture(n)),
                "payload": {
                    "source": f"s{n % 3}",
                    "n": n,
                    "flag": n % 2 == 0,
                    **({"caption": f"{WORDS[n % 7]} number{n}"} if n % 4 else {}),
                },
            }
            for n in range(at, at + 20)
        ]
        answer = api.post("/collections/photos/points", json={"points": points})
        assert answer.status_code == 200, answer.text
        assert answer.json()["upserted"] == 20
    return api


def vectors_of(api: httpx2.Client) -> np.ndarray[Any, np.dtype[np.float32]]:
    data = api.get("/collections/photos/points", params={"limit": 40, "vectors": True}).json()["data"]
    assert [point["id"] for point in data] == list(range(40))
    return np.array([point["vector"] for point in data], np.float32)


def search(api: httpx2.Client, **asked: Any) -> list[dict[str, Any]]:
    answer = api.post("/collections/photos/search", json=asked)
    assert answer.status_code == 200, answer.text
    hits: list[dict[str, Any]] = answer.json()["hits"]
    return hits


def text_row(bundle_folder: Path, *texts: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    found: np.ndarray[Any, np.dtype[np.float32]] = encode_texts(load_bundle(bundle_folder), list(texts)).numpy()
    return found


def test_a_collection_is_made_listed_and_dropped(api: httpx2.Client) -> None:
    made = api.post(
        "/collections", json={"name": "brief", "fields": {"a": "float"}, "captions": "", "modality": "text"}
    )
    assert made.status_code == 201
    info = made.json()
    assert (info["name"], info["dimensions"], info["fields"], info["points"]) == ("brief", 16, {"a": "float"}, 0)
    assert (info["captions"], info["modality"], info["model"]) == (None, "text", "micro")
    assert api.get("/collections/brief").json() == info
    assert "brief" in [item["name"] for item in api.get("/collections").json()["data"]]
    again = api.post("/collections", json={"name": "brief"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "collection_exists")
    assert api.delete("/collections/brief").json() == {"name": "brief", "dropped": True}
    for answer in (
        api.get("/collections/brief"),
        api.delete("/collections/brief"),
        api.post("/collections/brief/search", json={"text": "a"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "collection_not_found")
    assert "brief" not in [item["name"] for item in api.get("/collections").json()["data"]]


def test_pictures_find_themselves_and_payloads_come_back(filled: httpx2.Client, b64: B64) -> None:
    (hit,) = search(filled, image=b64(picture(13)), limit=1)
    assert hit["id"] == 13
    assert hit["score"] == hit["cosine"] == pytest.approx(1, abs=1e-5)
    assert hit["payload"] == {"source": "s1", "n": 13, "flag": False, "caption": f"{WORDS[13 % 7]} number13"}
    point = filled.get("/collections/photos/points/13").json()
    assert point["payload"] == hit["payload"]
    np.testing.assert_allclose(np.linalg.norm(point["vector"]), 1, atol=1e-5)
    assert filled.get("/collections/photos").json()["points"] == 40


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        (None, lambda n: True),
        ({"source": ["s0", "s2"], "flag": True}, lambda n: n % 3 != 1 and n % 2 == 0),
        ({"n": {"gte": 5, "lt": 30}, "source": {"not": "s1"}}, lambda n: 5 <= n < 30 and n % 3 != 1),
    ],
)
def test_searches_equal_a_scan(
    where: dict[str, Any] | None, keep: Callable[[int], bool], filled: httpx2.Client, bundle_folder: Path
) -> None:
    vectors = vectors_of(filled)
    red, green = text_row(bundle_folder, "red", "green circle")
    mixed = 2 * red + 0.5 * vectors[4] - 0.7 * green
    mixed /= np.linalg.norm(mixed)
    asked = {
        "queries": [{"text": "red", "weight": 2}, {"id": 4, "weight": 0.5}],
        "negative": [{"text": "green circle", "weight": 0.7}],
        "filter": where,
        "limit": 8,
    }
    scores = vectors @ mixed
    best = sorted((n for n in range(40) if keep(n)), key=lambda n: -scores[n])[:8]
    hits = search(filled, **asked)
    assert [hit["id"] for hit in hits] == best
    np.testing.assert_allclose([hit["score"] for hit in hits], scores[best], atol=1e-5)


def test_pages_follow_each_other(filled: httpx2.Client) -> None:
    whole = [hit["id"] for hit in search(filled, text="red", limit=40)]
    assert sorted(whole) == list(range(40))
    for extra in ({}, {"mmr": {"diversity": 0.4}}, {"keywords": "red blue"}):
        ids: list[int] = []
        offset: int | None = 0
        while offset is not None:
            answer = filled.post(
                "/collections/photos/search", json={"text": "red", "limit": 15, "offset": offset, **extra}
            ).json()
            ids += [hit["id"] for hit in answer["hits"]]
            offset = answer["next"]
        assert sorted(ids) == list(range(40)), extra
        if not extra:
            assert ids == whole


def test_a_threshold_cuts_by_cosine(filled: httpx2.Client) -> None:
    hits = search(filled, text="red", limit=40)
    middle = (hits[9]["cosine"] + hits[10]["cosine"]) / 2
    kept = search(filled, text="red", limit=40, threshold=middle)
    assert [hit["id"] for hit in kept] == [hit["id"] for hit in hits[:10]]
    fused = search(filled, text="red", keywords="number3", limit=40, threshold=middle)
    assert all(hit["cosine"] >= middle for hit in fused)


def test_keywords_alone_and_fused(filled: httpx2.Client) -> None:
    hits = search(filled, keywords="number17")
    assert [hit["id"] for hit in hits] == [17]
    assert hits[0]["cosine"] is None
    assert hits[0]["score"] == hits[0]["bm25"] > 0
    near = [hit["id"] for hit in search(filled, text="red", limit=40)]
    last = next(n for n in reversed(near) if n % 4)
    fused = search(filled, text="red", keywords=f"number{last}", limit=40)
    assert fused[0]["id"] == last, "first by words and last by vector beats first by vector alone"
    # by hand: share 0.5, rank by words 1, rank by vector that of `near`
    expected = 0.5 / 61 + 0.5 / (60 + near.index(last) + 1)
    assert fused[0]["score"] == pytest.approx(expected)
    assert search(filled, text="red", keywords=f"number{last}", share=1.0, limit=1)[0]["id"] == near[0]


def test_diversity_spreads_the_results(api: httpx2.Client) -> None:
    """Two directions near the query, three twins in each: by likeness twins come together, spread out they do not."""
    api.post("/collections", json={"name": "twins"})
    rows = np.zeros((6, 16))
    rows[:, 0] = [2.00, 1.99, 1.98, 1.5, 1.49, 1.48]
    rows[:3, 1] = rows[3:, 2] = 1
    points = [{"id": n, "vector": row.tolist()} for n, row in enumerate(rows)]
    api.post("/collections/twins/points", json={"points": points})
    asked = {"vector": [1.0] + [0.0] * 15, "limit": 4}

    def ids(**extra: Any) -> list[int]:
        return [hit["id"] for hit in api.post("/collections/twins/search", json={**asked, **extra}).json()["hits"]]

    assert ids() == ids(mmr={"diversity": 0}) == [0, 1, 2, 3]
    assert ids(mmr={"diversity": 0.9})[:2] == [0, 3]
    hits = api.post("/collections/twins/search", json={**asked, "mmr": {}}).json()["hits"]
    assert "vector" not in hits[0]
    api.delete("/collections/twins")


def test_points_are_replaced_selected_and_deleted(api: httpx2.Client) -> None:
    api.post("/collections", json={"name": "many", "fields": {"n": "integer"}})
    mine = str(uuid.uuid4())
    points = [{"id": n, "vector": np.eye(16)[n].tolist(), "payload": {"n": n}} for n in range(12)]
    points.append({"id": mine.upper(), "text": "red", "payload": {"deep": {"list": [1, None, "\u732b"]}, "gone": None}})
    points.append({"text": "blue"})
    answer = api.put("/collections/many/points", json={"points": points}).json()
    made = answer["data"][-1]["id"]
    assert answer["data"][-2]["id"] == mine
    assert str(uuid.UUID(made)) == made
    assert api.get("/collections/many/points", params={"ids": f"{mine},3"}).json()["data"] == [
        {"id": mine, "payload": {"deep": {"list": [1, None, "\u732b"]}}},
        {"id": 3, "payload": {"n": 3}},
    ]
    api.post(
        "/collections/many/points", json={"points": [{"id": 3, "vector": [0] * 15 + [2], "payload": {"other": 1}}]}
    )
    point = api.get("/collections/many/points/3").json()
    assert (point["payload"], point["vector"]) == ({"other": 1}, [0] * 15 + [1])
    selected = api.post("/collections/many/points/select", json={"filter": {"n": {"gte": 8}}, "limit": 3}).json()
    assert ([point["id"] for point in selected["data"]], selected["next"]) == ([8, 9, 10], 11)
    rest = api.post(
        "/collections/many/points/select", json={"filter": {"n": {"gte": 8}}, "after": selected["next"]}
    ).json()
    assert ([point["id"] for point in rest["data"]], rest["next"]) == ([11], None)
    body = {"ids": [3, 4, 4, 999, mine]}
    assert api.request("DELETE", "/collections/many/points", json=body).json() == {"deleted": 3}
    assert api.post("/collections/many/points/delete", json={"filter": {"n": {"gte": 8}}}).json() == {"deleted": 4}
    assert api.delete(f"/collections/many/points/{made}").json() == {"deleted": 1}
    assert api.delete(f"/collections/many/points/{made}").status_code == 404
    assert api.get("/collections/many/points/4").status_code == 404
    assert [point["id"] for point in api.get("/collections/many/points").json()["data"]] == [0, 1, 2, 5, 6, 7]
    assert api.get("/collections/many").json()["points"] == 6
    api.delete("/collections/many")


def test_one_bad_point_fails_alone(api: httpx2.Client, b64: B64) -> None:
    api.post("/collections", json={"name": "mixed", "fields": {"n": "integer"}})
    points: list[dict[str, Any]] = [
        {"id": 1, "image": b64(picture(1))},
        {"id": 2, "image": b64(b"no picture at all")},
        {"id": 3, "vector": [1.0] * 15},
        {"id": 4, "text": "red", "payload": {"n": "seven"}},
        {"id": 5, "vector": [0.0] * 16},
        {"id": 6, "text": "red", "image": b64(picture(1))},
        {"id": 7},
        {"id": 8, "text": "red", "payload": {"x": "y" * 3000}},
        {"id": 9, "text": "red", "payload": {"x": 2**70}},
        {"id": 10, "text": "red", "payload": {"caption": 7}},
    ]
    answer = api.post("/collections/mixed/points", json={"points": points})
    assert answer.status_code == 200
    found = [(item["error"] or {}).get("param") for item in answer.json()["data"]]
    assert found == [
        None,
        "points[1].image",
        "points[2].vector",
        "points[3].payload.n",
        "points[4].vector",
        "points[5]",
        "points[6]",
        "points[7].payload",
        "points[8].payload",
        "points[9].payload.caption",
    ]
    assert answer.json()["upserted"] == api.get("/collections/mixed").json()["points"] == 1
    none = api.post("/collections/mixed/points", json={"points": points[1:2]})
    assert (none.status_code, none.json()["error"]["code"]) == (400, "not_an_image")
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    too_deep = api.post("/collections/mixed/points", json={"points": [{"id": 1, "text": "a", "payload": {"x": deep}}]})
    assert (too_deep.status_code, too_deep.json()["error"]["code"]) == (400, "invalid_payload")
    nan = '{"points": [{"id": 1, "text": "a", "payload": {"x": NaN}}]}'
    assert api.post("/collections/mixed/points", content=nan).json()["error"]["param"] == "points[0].payload"
    api.delete("/collections/mixed")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, ""),
        ({"text": "a", "vector": [1.0] * 16}, None),
        ({"text": ""}, "text"),
        ({"vector": [1.0] * 3}, "vector"),
        ({"vector": [float("1e300")] * 16}, "vector"),
        ({"image": "aGk="}, "image"),
        ({"image": {"text": "red"}}, "image"),
        ({"id": -1}, "id"),
        ({"id": 1.5}, "id.int"),
        ({"queries": [{}]}, "queries[0]"),
        ({"queries": [{"text": "a", "weight": -1}]}, "queries[0].weight"),
        ({"queries": [{"text": "a"}] * 33}, "queries"),
        ({"negative": [{"text": "a"}]}, "negative"),
        ({"text": "a", "negative": [{"text": "a"}]}, "negative"),
        ({"text": "a", "filter": {"caption": "x"}}, "filter.caption"),
        ({"text": "a", "filter": {"n": "x"}}, "filter.n"),
        ({"text": "a", "filter": {"n": {"gt": "x"}}}, "filter.n"),
        ({"text": "a", "filter": {"n": {"near": 1}}}, "filter.n"),
        ({"text": "a", "filter": {"n": None}}, "filter.n"),
        ({"text": "a", "filter": {"source": {"gt": 1}}}, "filter.source"),
        ({"text": "a", "filter": {"source": [["x"]]}}, "filter.source"),
        ({"text": "a", "filter": {"source": ["x"] * 10_001}}, "filter.source"),
        ({"text": "a", "filter": {"flag": 1}}, "filter.flag"),
        ({"text": "a", "filter": []}, "filter"),
        ({"text": "a", "limit": 0}, "limit"),
        ({"text": "a", "limit": 1001}, "limit"),
        ({"text": "a", "offset": 999, "limit": 2}, "limit"),
        ({"text": "a", "candidates": 1001}, "candidates"),
        ({"text": "a", "threshold": 2}, "threshold"),
        ({"keywords": "a", "threshold": 0.5}, "threshold"),
        ({"keywords": "a" * 9000}, "keywords"),
        ({"text": "a", "mmr": {"diversity": 2}}, "mmr.diversity"),
        ({"text": "a", "model": "other"}, "model"),
    ],
)
def test_bad_searches(body: dict[str, Any], param: str | None, filled: httpx2.Client) -> None:
    answer = filled.post("/collections/photos/search", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "name"),
        ({"name": "../etc"}, 400, "name"),
        ({"name": ""}, 400, "name"),
        ({"name": "a" * 65}, 400, "name"),
        ({"name": ".hidden"}, 400, "name"),
        ({"name": "x", "fields": {"a": "json"}}, 400, "fields.a"),
        ({"name": "x", "fields": {'a"b': "keyword"}}, 400, 'fields.a"b.[key]'),
        ({"name": "x", "fields": {"caption": "integer"}}, 400, ""),
        ({"name": "x", "language": "klingon"}, 400, "language"),
        ({"name": "x", "model": "other"}, 400, "model"),
    ],
)
def test_bad_collections(body: dict[str, Any], status: int, param: str, api: httpx2.Client) -> None:
    answer = api.post("/collections", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert answer.json()["error"]["code"] != "internal_error"


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/collections/photos/points", {"points": []}, "points"),
        ("POST", "/collections/photos/points", {"points": [{"id": 1, "text": "a"}] * 51}, "points"),
        (
            "POST",
            "/collections/photos/points",
            {"points": [{"id": "seven", "text": "a"}]},
            "points[0].id.function-after[as_id(), union[int,str]]",
        ),
        ("POST", "/collections/photos/points/select", {"ids": [1], "filter": {"n": 1}}, ""),
        ("POST", "/collections/photos/points/select", {"limit": 51}, "limit"),
        ("GET", "/collections/photos/points?limit=x", None, "limit"),
        ("GET", "/collections/photos/points?ids=1,b", None, "ids[1]"),
        ("GET", "/collections/photos/points/seven", None, "id"),
        ("DELETE", "/collections/photos/points", {}, ""),
        ("DELETE", "/collections/photos/points", {"ids": [1], "filter": {"n": 1}}, ""),
        ("DELETE", "/collections/photos/points", {"filter": {}}, "filter"),
        ("DELETE", "/collections/photos/points", {"filter": {"zzz": 1}}, "filter.zzz"),
    ],
)
def test_bad_point_requests(method: str, path: str, body: Any, param: str, filled: httpx2.Client) -> None:
    answer = filled.request(method, path, json=body)
    assert answer.status_code == 400, answer.text
    found = answer.json()["error"]["param"]
    assert found == param or found.startswith(param.split("function")[0].rstrip(".")), found
    assert filled.get("/collections/photos").json()["points"] == 40


def test_a_missing_point_as_query_is_404(filled: httpx2.Client) -> None:
    answer = filled.post("/collections/photos/search", json={"id": 4711})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "point_not_found")


def test_there_may_be_no_more_collections_than_the_limit(api: httpx2.Client) -> None:
    made: list[str] = []
    while (answer := api.post("/collections", json={"name": f"extra{len(made)}"})).status_code == 201:
        made.append(f"extra{len(made)}")
        assert len(made) <= LIMITS.collections
    assert answer.json()["error"]["code"] == "too_many_collections"
    for name in made:
        api.delete(f"/collections/{name}")
