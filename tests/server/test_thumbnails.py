"""Thumbnails: made by the commands from tars and files, over HTTP from upserted pictures, and given out again."""

import base64
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from data_pipelines.reader import open_shards
from server.app import create_app
from server.catalogue import Collections
from server.engine import BundleEngine
from server.index import build as building
from server.index.build import build_index
from server.index.cluster import ClusterStore
from server.index.edge import open_index
from server.index.pictures import Thumbnailer
from server.index.stores import FolderStore
from server.index.thumbs import FILE
from server.index.transfer import pages, put
from server.index_cli import index as command
from server.settings import Key, Settings, hash_key
from vlp.bundle import load_bundle
from vlp.testing import picture

B64 = Callable[[bytes], str]
POINTS = "/collections/photos/points"


def run(*arguments: object) -> dict[str, Any]:
    """What a command that succeeds says with --json."""
    done = CliRunner().invoke(command, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def refused(*arguments: object) -> str:
    """What a command that is refused says."""
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert done.exit_code in (1, 2), done.output
    return done.output


def size_of(jpeg: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(jpeg)) as opened:
        assert opened.format == "JPEG"
        opened.load()
        return opened.width, opened.height


def grey(data: bytes) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Eight by eight means, by which pictures are told apart."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((8, 8), Image.Resampling.BOX), np.float32)


def foreign(folder: Path, keys: list[str]) -> Path:
    """An embedding folder as clip-retrieval writes it, which does not say what it was made of."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    rows = np.random.default_rng(0).standard_normal((len(keys), 8)).astype(np.float32)
    np.save(folder / "img_emb" / "img_emb_0.npy", rows)
    pq.write_table(pa.table({"image_path": keys}), folder / "metadata" / "metadata_0.parquet")
    return folder


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """The shards, with the picture of row 30 zeroed in its tar."""
    copied = shutil.copytree(shards, tmp_path / "damaged")
    shard = open_shards(copied)[1]
    content = bytearray(shard.path.read_bytes())
    image = shard.read(5).image
    at = content.index(image)
    content[at : at + len(image)] = bytes(len(image))
    shard.close()
    shard.path.write_bytes(content)
    return copied


def test_an_index_is_built_with_thumbnails_of_its_shards(embeddings: Path, damaged: Path, tmp_path: Path) -> None:
    made = run("build", embeddings, "--out", tmp_path / "index", "--thumbnails", 24, "--pictures", damaged)
    assert (made["points"], made["thumbnails"], made["thumbnails_made"]) == (60, 24, 59)
    assert made["without_thumbnail"] == {"not_an_image": 1}
    index = open_index(tmp_path / "index")
    found = index.thumbnails(range(60))
    assert sorted(found) == [n for n in range(60) if n != 30]
    assert {size_of(jpeg) for jpeg in found.values()} == {(24, 19)}
    for n in (0, 24, 25, 59):  # of every shard, at its edges
        errors = {m: float(np.abs(grey(found[n]) - grey(picture(m))).mean()) for m in range(60)}
        assert min(errors, key=lambda m: errors[m]) == n
    assert index.get([30])[0].payload["key"]
    index.close()
    bare = run("build", embeddings, "--out", tmp_path / "index")
    assert (bare["thumbnails"], (tmp_path / "index" / FILE).exists()) == (0, False)


def test_a_build_goes_on_and_counts_all_the_same(
    embeddings: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.index.folders.BATCH", 10)
    monkeypatch.setattr(building, "SAVE_EVERY", 1)
    done: list[int] = []

    def interrupt(rows: int) -> None:
        done.append(rows)
        if sum(done) >= 45:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(
            embeddings, tmp_path / "index", "image", [], interrupt, Thumbnailer(damaged, embeddings, "image", 32)
        )
    done.clear()
    again = Thumbnailer(damaged, embeddings, "image", 32)
    build_index(embeddings, tmp_path / "index", "image", [], done.append, again)
    assert done[0] == 45, "it began again"
    assert (again.made, dict(again.lacking)) == (59, {"not_an_image": 1})
    index = open_index(tmp_path / "index")
    assert len(index.thumbnails(range(60))) == 59
    index.close()


def test_pictures_that_a_folder_names_are_read_from_that_folder_alone(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    (root / "below").mkdir(parents=True)
    for place in (root / "a.jpg", root / "below" / "b.jpg", tmp_path / "secret.jpg"):
        place.write_bytes(picture(1, (200, 100)))
    (root / "broken.jpg").write_bytes(picture(1)[:-200])
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    keys = ["a.jpg", str(root / "below" / "b.jpg"), "broken.jpg", "gone.jpg", "nul\0.jpg", "", "../secret.jpg"]
    source = foreign(tmp_path / "emb", [*keys, str(tmp_path / "secret.jpg"), "link.jpg"])
    kept = ("--collections", tmp_path / "kept", "--name", "photos")
    made = run("import", source, *kept, "--thumbnails", "--pictures", root)
    lacking = {"truncated_image": 1, "no_picture": 3, "outside_of_pictures": 3}
    assert made == {
        "name": "photos", "written": 9, "points": 9, "thumbnails_made": 2, "without_thumbnail": lacking
    }  # fmt: skip
    index = open_index(tmp_path / "kept" / "photos")
    assert {id: size_of(jpeg) for id, jpeg in index.thumbnails(range(9)).items()} == {0: (128, 64), 1: (128, 64)}
    index.close()
    assert run("import", source, *kept, "--thumbnails", "--pictures", root)["thumbnails_made"] == 0
    assert "made for 128" in refused("import", source, *kept, "--thumbnails", "64", "--pictures", root)
    done = CliRunner().invoke(
        command, [str(a) for a in ("export", tmp_path / "kept" / "photos", "--out", tmp_path / "x")]
    )
    assert "thumbnails are not among it" in done.output
    done = CliRunner().invoke(command, [str(a) for a in ("import", source, *kept, "--overwrite")])
    assert "have no thumbnails" in done.output


def test_keys_of_unknown_tars_are_looked_up_and_doubtful_ones_left_out(tmp_path: Path) -> None:
    root = tmp_path / "tars"
    root.mkdir()
    for shard, keys in enumerate((["one", "same"], ["two", "same"])):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for n, key in enumerate(keys):
                data = picture(10 * shard + n)
                member = tarfile.TarInfo(f"{key}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = foreign(tmp_path / "emb", ["two", "same", "one", "none"])
    maker = Thumbnailer(root, source, "image", 64)
    found = maker(range(4), [{"key": key} for key in ("two", "same", "one", "none")])
    assert [jpeg is not None for jpeg in found] == [True, False, True, False]
    assert found[0] is not None
    assert np.abs(grey(found[0]) - grey(picture(10))).mean() < 4
    assert dict(maker.lacking) == {"ambiguous_key": 1, "no_picture": 1}


def test_what_cannot_be_done_is_said(embeddings: Path, shards: Path, tmp_path: Path) -> None:
    build = ("build", embeddings, "--out", tmp_path / "index")
    for side in (0, 15, 5000):
        assert "16<=x<=512" in refused(*build, "--thumbnails", side, "--pictures", shards)
    assert "go together" in refused(*build, "--thumbnails")
    assert "go together" in refused(*build, "--pictures", shards)
    assert "no such folder" in refused(*build, "--thumbnails", "--pictures", tmp_path / "nowhere")
    other = shutil.copytree(shards, tmp_path / "other")
    (other / "manifest.json").unlink()
    next(iter(sorted(other.glob("*.tar")))).unlink()
    assert "other shards" in refused(*build, "--thumbnails", "--pictures", other)
    kept = ("--collections", tmp_path / "kept", "--name", "photos")
    run("import", embeddings, *kept)
    assert "made for none" in refused("import", embeddings, *kept, "--thumbnails", "--pictures", shards)


def test_a_cluster_gets_them_too(embeddings: Path, shards: Path, tmp_path: Path) -> None:
    """`vlp index push` is these calls."""
    run("build", embeddings, "--out", tmp_path / "index", "--thumbnails", "--pictures", shards)
    source = open_index(tmp_path / "index")
    store = ClusterStore(":memory:")
    target = store.create("photos", source.info)
    put(pages(source), target, lambda _: None, illustrate=lambda ids, _: list(map(source.thumbnails(ids).get, ids)))
    assert target.thumbnails(range(60)) == source.thumbnails(range(60))
    assert store.names() == ["photos"]
    store.drop("photos")
    again = store.create("photos", source.info)
    assert again.thumbnails([1]) == {}
    source.close()
    store.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collections")


@pytest.fixture(scope="module")
def url(bundle_folder: Path, serving: Any, kept: Path) -> Iterator[str]:
    keys = tuple(Key(name=scope, sha256=hash_key(scope), scope=scope) for scope in ("read", "write"))
    settings = Settings(keys=keys)
    engine = BundleEngine(load_bundle(bundle_folder), settings.limits)
    with serving(create_app(settings, engine, kept=Collections(FolderStore(kept)))) as found:
        yield found


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=60, base_url=f"{url}/v1", headers={"Authorization": "Bearer write"}) as client:
        yield client


@pytest.fixture(scope="module")
def photos(api: httpx2.Client, b64: B64) -> httpx2.Client:
    """Three pictures, one of them transparent, a text, a vector and a picture that is none."""
    made = api.post("/collections", json={"name": "photos", "thumbnails": 48})
    assert (made.status_code, made.json()["thumbnails"]) == (201, 48)
    sent = [
        {"id": 1, "image": b64(picture(1, (300, 200))), "payload": {"key": "one.jpg"}},
        {"id": 2, "image": "data:image/png;base64," + b64(picture(2, (20, 30), "PNG"))},
        {"id": 3, "text": "red circle"},
        {"id": 4, "image": b64(b"no picture")},
        {"id": 5, "vector": [1.0] * 16},
        {"id": "00000000-0000-0000-0000-000000000001", "image": b64(picture(3))},
    ]
    answer = api.post(POINTS, json={"points": sent}).json()
    assert [item["thumbnail"] for item in answer["data"]] == [True, True, False, False, False, True]
    assert answer["upserted"] == 5
    return api


def test_a_thumbnail_is_given_out_and_asked_for_again(photos: httpx2.Client) -> None:
    answer = photos.get(f"{POINTS}/1/thumbnail", headers={"Authorization": "Bearer read"})
    assert (answer.status_code, answer.headers["content-type"], size_of(answer.content)) == (
        200,
        "image/jpeg",
        (48, 32),
    )
    assert answer.headers["cache-control"] == "private, no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    again = photos.get(f"{POINTS}/1/thumbnail", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
    assert size_of(photos.get(f"{POINTS}/2/thumbnail").content) == (20, 30), "smaller pictures keep their size"
    assert photos.get(f"{POINTS}/00000000-0000-0000-0000-000000000001/thumbnail").status_code == 200
    assert photos.get("/collections/photos").json()["thumbnails"] == 48
    assert "thumbnail" not in photos.get(f"{POINTS}/1").text


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("photos/points/3", 404, "no_thumbnail"),
        ("photos/points/5", 404, "no_thumbnail"),
        ("photos/points/4", 404, "point_not_found"),
        ("photos/points/..%2f..%2fthumbnails", 404, "not_found"),
        ("photos/points/..", 404, "not_found"),
        ("photos/points/thumbnails.sqlite", 400, "invalid_value"),
        ("%2e%2e/points/1", 404, "collection_not_found"),
        ("nothing/points/1", 404, "collection_not_found"),
        ("bare/points/1", 404, "no_thumbnails"),
    ],
)
def test_where_there_is_none(path: str, status: int, code: str, photos: httpx2.Client) -> None:
    photos.post("/collections", json={"name": "bare"})
    answer = photos.get(f"/collections/{path}/thumbnail")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


def test_a_key_is_needed(url: str, photos: httpx2.Client) -> None:
    assert httpx2.get(f"{url}/v1{POINTS}/1/thumbnail").status_code == 401
    assert httpx2.get(f"{url}/v1{POINTS}/1/thumbnail", headers={"Authorization": "Bearer x"}).status_code == 401


@pytest.mark.parametrize("side", [0, 15, 513, 5000, -1, True, "96", 96.5])
def test_sides_that_cannot_be(side: object, api: httpx2.Client) -> None:
    answer = api.post("/collections", json={"name": "never", "thumbnails": side})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "thumbnails")
    assert api.get("/collections/never").status_code == 404


def test_clip_retrievals_clients_get_them_as_image(url: str, photos: httpx2.Client) -> None:
    asked = {"indice_name": "photos", "text": "red circle", "num_images": 4, "num_result_ids": 5}
    rows = photos.post(f"{url}/knn-service", json=asked).json()
    assert len(rows) == 5
    assert "image" not in rows[4]
    shown = {row["id"]: row.get("image") for row in rows[:4]}
    for id, image in shown.items():
        jpeg = photos.get(f"{POINTS}/{id}/thumbnail")
        assert image == (base64.b64encode(jpeg.content).decode() if jpeg.status_code == 200 else None)
    (one, three) = photos.post(f"{url}/metadata", json={"indice_name": "photos", "ids": [1, 3]}).json()
    assert size_of(base64.b64decode(one["metadata"]["image"])) == (48, 32)
    assert one["metadata"]["image_path"] == "one.jpg"
    assert "image" not in three["metadata"]


def test_they_go_with_their_points_and_their_collection(api: httpx2.Client, kept: Path, b64: B64) -> None:
    api.post("/collections", json={"name": "brief", "thumbnails": 16, "fields": {"n": "integer"}})
    points = "/collections/brief/points"
    sent = [{"id": n, "image": b64(picture(n)), "payload": {"n": n}} for n in range(4)]
    assert api.post(points, json={"points": sent}).json()["upserted"] == 4
    tags = [api.get(f"{points}/{n}/thumbnail").headers["etag"] for n in range(4)]
    assert len({*tags}) == 4
    api.post(points, json={"points": [{"id": 3, "image": b64(picture(0))}]})
    assert api.get(f"{points}/3/thumbnail").headers["etag"] == tags[0]
    api.post(points, json={"points": [{"id": 3, "text": "now a text"}]})
    api.delete(f"{points}/0")
    api.post(f"{points}/delete", json={"filter": {"n": 1}})
    codes = [api.get(f"{points}/{n}/thumbnail").json()["error"]["code"] for n in (0, 1, 3)]
    assert codes == ["point_not_found", "point_not_found", "no_thumbnail"]
    api.post(points, json={"points": [{"id": 0, "text": "the same id, another point"}]})
    assert api.get(f"{points}/0/thumbnail").status_code == 404
    assert (kept / "brief" / FILE).is_file()
    api.delete("/collections/brief")
    assert not (kept / "brief").exists()
    assert api.get(f"{points}/2/thumbnail").json()["error"]["code"] == "collection_not_found"
    api.post("/collections", json={"name": "brief", "thumbnails": 16})
    assert api.get(f"{points}/2/thumbnail").json()["error"]["code"] == "point_not_found"
    api.delete("/collections/brief")


def test_a_damaged_file_is_told_to_the_log_alone(
    bundle_folder: Path, serving: Any, tmp_path: Path, http: httpx2.Client, b64: B64
) -> None:
    """Thumbnails outlive the server; what is no database any more costs their routes, not the searches."""
    engine = BundleEngine(load_bundle(bundle_folder), Settings().limits)
    for turn in ("whole", "damaged"):
        with serving(create_app(Settings(), engine, kept=Collections(FolderStore(tmp_path)))) as url:
            if turn == "whole":
                http.post(f"{url}/v1/collections", json={"name": "photos", "thumbnails": 32})
                http.post(f"{url}/v1{POINTS}", json={"points": [{"id": 1, "image": b64(picture(1))}]})
            else:
                (tmp_path / "photos" / FILE).write_bytes(b"no database" * 1000)
            answer = http.get(f"{url}/v1{POINTS}/1/thumbnail")
            if turn == "whole":
                assert size_of(answer.content) == (32, 26)
                continue
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "index_unavailable")
            assert FILE not in answer.text
            found = http.post(f"{url}/v1/collections/photos/search", json={"text": "red"}).json()
            assert [hit["id"] for hit in found["hits"]] == [1]
