import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_pipelines import sources
from data_pipelines.errors import PipelineError
from data_pipelines.records import Record
from data_pipelines.sources import coco
from data_pipelines.testing import draw
from data_pipelines.write import WriteOptions, write_shards

IMAGES = [
    {"id": n, "file_name": f"{n:03}.jpg", "coco_url": f"https://e.org/{n}.jpg", "width": 40, "height": 20}
    for n in (7, 3, 5, 9)
]
CAPTIONS = [
    {"image_id": number, "caption": caption}
    for number, caption in ((3, "A cat."), (7, " A dog. "), (3, "Two cats."), (3, "A cat."))
]
BOXES: list[dict[str, Any]] = [
    {"image_id": 3, "category_id": 17, "bbox": [10, 5, 20, 10], "segmentation": [[1, 2, 3]]},
    {"image_id": 3, "category_id": 18, "bbox": [30, 10, 20, 20], "iscrowd": 0},
    {"image_id": 3, "category_id": 17, "bbox": [0, 0, 0, 5]},
    {
        "image_id": 5,
        "category_id": 18,
        "bbox": [0, 0, 40, 20],
        "iscrowd": 1,
        "segmentation": {"counts": [1], "size": [20, 40]},
    },
]
CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dining table"}]


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """annotations/ beside train2017/, as COCO comes."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "captions_train2017.json").write_text(json.dumps({"info": {}, "images": IMAGES, "annotations": CAPTIONS}))
    instances = {"images": IMAGES, "annotations": BOXES, "categories": CATEGORIES}
    (folder / "instances_train2017.json").write_text(json.dumps(instances))
    (tmp_path / "train2017").mkdir()
    for image in IMAGES:
        (tmp_path / "train2017" / str(image["file_name"])).write_bytes(draw((40, 20), format="JPEG"))
    return folder


def read(path: Path | str, **settings: Any) -> dict[str, Record]:
    return {record.origin: record for record in coco.iter_records(coco.Config(path=path, **settings))}


def test_captions_in_the_order_of_the_pictures(annotations: Path) -> None:
    found = sources.resolve(str(annotations / "captions_train2017.json"))
    assert found.name == "coco"
    records = read(annotations / "captions_train2017.json")
    assert list(records) == ["007.jpg", "003.jpg", "005.jpg", "009.jpg"]
    assert records["003.jpg"].captions == ("A cat.", "Two cats.")
    assert records["007.jpg"].captions == ("A dog.",)
    assert records["007.jpg"].image == annotations.parent / "train2017" / "007.jpg"
    assert records["007.jpg"].extra == {"image_id": 7}
    assert [record.problem.partition(":")[0] for record in records.values()] == ["", "", "no_caption", "no_caption"]


def test_boxes_become_fractions(annotations: Path) -> None:
    """x, y, width, height in pixels of a 40 x 20 picture; the second hangs over the right and lower edge."""
    records = read(annotations / "instances_train2017.json", template="a photo of a {label}")
    cats = records["003.jpg"]
    assert cats.boxes == ((0.25, 0.25, 0.75, 0.75, "cat"), (0.75, 0.5, 1.0, 1.0, "dining table"))
    assert cats.labels == ("cat", "dining table")
    assert cats.captions == ("a photo of a cat",)
    assert cats.extra == {"image_id": 3, "dropped_boxes": 1}
    crowd = records["005.jpg"]
    assert (crowd.labels, crowd.boxes, crowd.extra["dropped_boxes"]) == (("dining table",), (), 1)


def test_both_files_together_become_shards(annotations: Path, tmp_path: Path) -> None:
    both = f"{annotations}/captions_train2017.json::{annotations}/instances_train2017.json"
    found = sources.resolve(both)
    assert found.name == "coco"
    shard = partial(write_shards, kind="coco", licences={}, progress=False)
    manifest = shard(found.module.iter_records(found.config), tmp_path / "out", WriteOptions())[""]
    assert (manifest.samples, manifest.failures) == (3, {"no_caption": 1})
    row = pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()[1]
    assert (row["captions"], row["labels"]) == (["A cat.", "Two cats."], ["cat", "dining table"])
    assert row["boxes"][0] == {"x0": 0.25, "y0": 0.25, "x1": 0.75, "y1": 0.75, "label": "cat"}


def test_where_the_pictures_are(annotations: Path, tmp_path: Path) -> None:
    path = annotations / "captions_train2017.json"
    records = read(path, image_col="coco_url")
    assert records["https://e.org/3.jpg"].image == "https://e.org/3.jpg"
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(PipelineError, match=r"007\.jpg, the first picture of .* name the folder with --images"):
        read(path)
    assert read(path, images=tmp_path / "elsewhere")["003.jpg"].image == tmp_path / "elsewhere" / "003.jpg"


def test_odd_annotations_spoil_their_own_picture(annotations: Path) -> None:
    odd = [
        {"image_id": 7, "category_id": 99, "bbox": [0, 0, 1, 1]},
        {"image_id": 3, "category_id": 17, "bbox": [0, 0, "x"]},
        {"image_id": 5, "caption": {"a": 1}},
        {"image_id": 9, "caption": "fine"},
    ]
    content = {"images": [*IMAGES, {"id": 11}], "annotations": odd, "categories": CATEGORIES}
    (annotations / "odd_train2017.json").write_text(json.dumps(content))
    problems = [record.problem.partition(":")[0] for record in read(annotations / "odd_train2017.json").values()]
    assert problems == ["bad_box", "bad_box", "bad_text", "", "no_image"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b'{"images": []}', "no COCO annotations"),
        (b'{"images": [{}], "annotations": []}', "no COCO annotations"),
        (b'{"images": [1], "annotations": []}', "no COCO annotations"),
        (b'{"images": [], "annotations": [{"image_id": 1}]}', "no COCO annotations"),
        (b"\xff{}", "is not JSON"),
    ],
)
def test_what_is_no_coco_file_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(PipelineError, match=message):
        read(tmp_path / "a.json")


def test_fingerprint(annotations: Path) -> None:
    config = coco.Config(path=annotations / "captions_train2017.json")
    before = coco.fingerprint(config)
    assert coco.fingerprint(config) == before
    (annotations / "captions_train2017.json").write_text("{}")
    assert coco.fingerprint(config) != before
    with pytest.raises(PipelineError, match="cannot be read"):
        read(annotations / "gone.json")
