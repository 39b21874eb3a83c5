import gc
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from data_pipelines.errors import ConfigError, PipelineError, ShardError
from data_pipelines.records import Manifest, Record, load_manifest, manifest_digest
from data_pipelines.shard_files import INDEX_COLUMNS, index_path, key_digits
from data_pipelines.testing import draw
from data_pipelines.write import WriteOptions, write_shards


def write(records: list[Record] | Iterator[Record], out: Path, **options: Any) -> dict[str, Manifest]:
    return write_shards(records, out, WriteOptions(**options), kind="test", licences={"x": "MIT"}, progress=False)


def make(number: int, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "image": draw((40, 30), seed=number), "captions": (f"caption {number}", f"other {number}"),
        "labels": ("a", "b"), "source": "here", "origin": f"{number}.png", "extra": {"score": number / 2},
    }  # fmt: skip
    return Record(**(fields | changes))


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the statistics, which hold times."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("_stats.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


MIXED = [
    make(0),
    make(1, image=b"not a picture"),
    make(2, image=draw((40, 30), seed=2)[:200]),
    make(3, captions=(), labels=(), problem="no_caption: nothing beside it"),
    make(4, image=Path("/nonexistent/4.png")),
    make(5, image=draw((40, 30), format="JPEG", seed=5)),
    make(6, captions=()),
]
"""Two good records, one with labels only, and one for each way to fail."""


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    manifest = write(MIXED, tmp_path)[""]
    failures = {"no_caption": 1, "not_an_image": 1, "truncated_image": 1, "unreadable": 1}
    assert manifest.failures == failures
    assert (manifest.records, manifest.samples) == (7, 3)
    assert manifest.sources == {"here": 3}
    stats = json.loads((tmp_path / "00000_stats.json").read_text())
    assert stats["status_dict"] == failures | {"success": 3}
    assert (stats["count"], stats["successes"]) == (7, 3)
    assert (stats["failed_to_download"], stats["failed_to_resize"]) == (2, 2)
    assert stats["start_time"] <= stats["end_time"]
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"00000.tar": 3}


def test_parquet_holds_every_row_with_its_reason(tmp_path: Path) -> None:
    write(MIXED, tmp_path)
    table = rows(tmp_path / "00000.parquet")
    outcome = ["success", "failed_to_resize", "failed_to_download"]
    assert [outcome.index(row["status"]) for row in table] == [0, 1, 1, 2, 2, 0, 0]
    assert table[3]["error_message"] == "no_caption: nothing beside it"
    assert table[4]["error_message"].startswith("unreadable: No such file")
    assert "40 x 30 PNG" in table[2]["error_message"]
    assert table[2]["width"] is None
    assert table[0]["error_message"] is None
    assert table[1]["sha256"] == hashlib.sha256(b"not a picture").hexdigest()
    schema = pq.read_schema(tmp_path / "00000.parquet")
    assert [str(schema.field(name).type) for name in ("width", "original_height", "score", "caption")] == [
        "int32", "int32", "double", "string",
    ]  # fmt: skip


def test_layout_is_that_of_img2dataset(tmp_path: Path) -> None:
    write(MIXED, tmp_path, samples_per_shard=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"0000{n}{end}" for n in (0, 1) for end in (".index.npy", ".parquet", ".tar", "_stats.json")),
        "job.json", "manifest.json", "sizes.json",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "00001.tar") as tar:
        members = tar.getmembers()
    # shard 1, one digit for the index in a shard of 4; row 0 failed and leaves a gap; no caption, no txt
    assert [member.name for member in members] == [
        "000011.jpg",
        "000011.json",
        "000011.txt",
        "000012.json",
        "000012.png",
    ]
    assert {(m.mode, m.mtime, m.uid, m.gid, m.uname, m.gname, m.isfile()) for m in members} == {
        (0o444, 0, 0, 0, "bigdata", "bigdata", True)
    }


@pytest.mark.parametrize(
    ("per_shard", "digits"), [(1, 0), (2, 1), (10, 1), (11, 2), (100, 2), (1000, 3), (1001, 4), (10_000, 4)]
)
def test_key_digits(per_shard: int, digits: int) -> None:
    assert key_digits(per_shard) == digits


def test_json_and_txt_members(tmp_path: Path) -> None:
    record = make(1, captions=("naïve \ud800 caption", "two"), boxes=((0.0, 0.1, 0.5, 1.0, "dog"),))
    write([record], tmp_path)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert files["00000000.txt"] == "naïve ? caption".encode()
    assert files["00000000.png"] == record.image
    text = files["00000000.json"].decode()
    assert text.startswith('{\n    "url": "1.png",\n')
    assert json.loads(text) == {
        "url": "1.png", "caption": "naïve ? caption", "captions": ["naïve ? caption", "two"], "labels": ["a", "b"],
        "source": "here", "boxes": [{"x0": 0.0, "y0": 0.1, "x1": 0.5, "y1": 1.0, "label": "dog"}], "score": 0.5,
        "key": "00000000", "status": "success", "error_message": None, "width": 40, "height": 30, "original_width": 40,
        "original_height": 30, "sha256": hashlib.sha256(draw((40, 30), seed=1)).hexdigest(),
    }  # fmt: skip


TURNED = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""EXIF orientation -> how a picture is stored that it turns upright."""


def red_box(picture: bytes) -> tuple[float, float, float, float]:
    """Where the red pixels are, as fractions."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    found = (pixels[..., 0] > 200) & (pixels[..., 1] < 100)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    height, width = found.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


@pytest.mark.parametrize("turn", [1, 6, 8])
@pytest.mark.parametrize("mode", ["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"])
@pytest.mark.parametrize("size", [(320, 200), (200, 320)])
def test_boxes_follow_the_picture(tmp_path: Path, mode: str, turn: int, size: tuple[int, int]) -> None:
    """A red rectangle, found again in the stored picture; a second box lies in the corner that a crop cuts away."""
    upright = Image.new("RGB", size, "white")
    upright.paste((255, 0, 0), (80, 60, 160, 140))
    stored = upright.transpose(TURNED[turn]) if turn > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=95, exif=exif)
    boxes = ((80 / size[0], 60 / size[1], 160 / size[0], 140 / size[1], "red"), (0.0, 0.0, 0.02, 0.02, "corner"))
    write([make(0, image=buffer.getvalue(), boxes=boxes)], tmp_path, resize_mode=mode,
          image_size=None if mode == "no" else 100)  # fmt: skip
    with tarfile.open(tmp_path / "00000.tar") as tar:
        picture, text = (tar.extractfile(f"00000000.{kind}").read() for kind in ("jpg", "json"))  # type: ignore[union-attr]
    found = {box.pop("label"): tuple(box.values()) for box in json.loads(text)["boxes"]}
    assert found["red"] == pytest.approx(red_box(picture), abs=0.02)
    assert ("corner" in found) == (mode != "center_crop")
    assert rows(tmp_path / "00000.parquet")[0]["boxes"] == json.loads(text)["boxes"]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_it(tmp_path: Path) -> None:
    write([make(n) for n in range(25)], tmp_path, samples_per_shard=10)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    gc.collect()  # webdataset leaves its files to the collector, whose complaint must not hit a later test
    assert [sample["__key__"] for sample in samples] == [f"0000{n // 10}{n % 10}" for n in range(25)]
    assert [sample["txt"] for sample in samples] == [f"caption {n}" for n in range(25)]
    assert all(sample["png"].shape == (30, 40, 3) for sample in samples)
    assert samples[7]["json"]["score"] == 3.5


def test_index_points_at_the_members(tmp_path: Path) -> None:
    write(MIXED, tmp_path)
    tar_path = tmp_path / "00000.tar"
    index = np.load(index_path(tar_path))
    assert index.dtype == np.int64
    assert index.shape == (3, len(INDEX_COLUMNS))
    with tarfile.open(tar_path) as tar:
        expected = {member.name: (member.offset_data, member.size) for member in tar}
    keys = ("00000000", "00000005", "00000006")
    for key, extension, row in zip(keys, ("png", "jpg", "png"), index, strict=True):
        for position, suffix in enumerate((extension, "json", "txt")):
            offset, size = row[2 * position : 2 * position + 2]
            assert (offset, size) == expected.get(f"{key}.{suffix}", (0, 0))
    assert index[2, 4:].tolist() == [0, 0]  # no caption, no txt


def test_equal_input_gives_equal_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    options = {"image_size": 20, "resize_mode": "keep_ratio", "encode_format": "jpg", "samples_per_shard": 3}
    for workers in (1, 2, 7):
        write(MIXED * 3, tmp_path / str(workers), workers=workers, **options)
    first = contents(tmp_path / "1")
    assert contents(tmp_path / "2") == first
    assert contents(tmp_path / "7") == first
    assert len(first) == 7 * 3 + 3


def test_original_bytes_are_kept_unless_something_changes(tmp_path: Path) -> None:
    small, large = draw((40, 30), format="JPEG"), draw((80, 60), format="JPEG")
    gif = draw((40, 30), format="GIF")
    write(
        [make(n, image=data) for n, data in enumerate((small, large, gif))],
        tmp_path,
        image_size=30,
        resize_mode="keep_ratio",
    )
    with tarfile.open(tmp_path / "00000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert files["00000000.jpg"] == small
    assert files["00000001.jpg"] != large
    assert Image.open(io.BytesIO(files["00000001.jpg"])).size == (40, 30)
    assert Image.open(io.BytesIO(files["00000002.png"])).format == "PNG"
    table = rows(tmp_path / "00000.parquet")
    assert [(row["width"], row["original_width"]) for row in table] == [(40, 40), (40, 80), (40, 40)]
    assert table[1]["sha256"] == hashlib.sha256(large).hexdigest()


def test_a_turned_photograph_is_stored_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    write([make(0, image=buffer.getvalue())], tmp_path)
    (row,) = rows(tmp_path / "00000.parquet")
    assert (row["width"], row["height"], row["original_width"]) == (20, 40, 40)


def test_splits_become_folders(tmp_path: Path) -> None:
    manifests = write([make(n, split=("train", "val")[n % 2]) for n in range(9)], tmp_path, samples_per_shard=2)
    assert {split: (m.samples, len(m.shards)) for split, m in manifests.items()} == {"train": (5, 3), "val": (4, 2)}
    captions = [row["caption"] for path in sorted((tmp_path / "val").glob("*.parquet")) for row in rows(path)]
    assert captions == ["caption 1", "caption 3", "caption 5", "caption 7"]
    with pytest.raises(ValueError, match=r"split '\.\./x'"):
        write([make(0, split="../x")], tmp_path / "evil")


def test_manifest_vouches_for_the_files(tmp_path: Path) -> None:
    written = write([make(n) for n in range(5)], tmp_path, samples_per_shard=3)[""]
    manifest = load_manifest(tmp_path)
    assert manifest == written
    for shard in manifest.shards:
        data = (tmp_path / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [shard.samples for shard in manifest.shards] == [3, 2]
    assert manifest.licences == {"x": "MIT"}
    assert "workers" not in manifest.options
    assert manifest_digest(tmp_path) == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()


def test_source_digest_depends_on_content_and_order(tmp_path: Path) -> None:
    records = [make(n) for n in range(3)]
    variants = {"same": records, "order": records[::-1], "content": [*records[:2], make(2, image=draw(seed=77))]}
    digests = {name: write(variant, tmp_path / name)[""].source_digest for name, variant in variants.items()}
    assert len(set(digests.values())) == 3
    assert write(records, tmp_path / "again")[""].source_digest == digests["same"]


def test_passthrough_columns_widen_and_stay(tmp_path: Path) -> None:
    extras: list[dict[str, Any]] = [{"a": 1, "b": None}, {"a": 2.5, "c": "x"}, {"a": None, "c": 3}, {"a": 2**70}]
    write([make(n, extra=extra) for n, extra in enumerate(extras)], tmp_path, samples_per_shard=2)
    assert [(row["a"], row["b"], row["c"]) for row in rows(tmp_path / "00000.parquet")] == [
        (1.0, None, None), (2.5, None, "x"),
    ]  # fmt: skip
    assert [(row["a"], row["c"]) for row in rows(tmp_path / "00001.parquet")] == [(None, "3"), (str(2**70), None)]
    with pytest.raises(ValueError, match="computes: sha256"):
        write([make(0, extra={"sha256": "forged"})], tmp_path / "clash")


def test_nothing_written_is_an_error_with_reasons(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"none of 2 records became a sample \(not_an_image 2\); the first: 0.png"):
        write([make(0, image=b"x"), make(1, image=b"y")], tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(PipelineError, match="no records"):
        write([], tmp_path / "empty")


def test_existing_shards_are_not_overwritten(tmp_path: Path) -> None:
    write([make(0)], tmp_path)
    before = contents(tmp_path)
    with pytest.raises(PipelineError, match="already holds shards"):
        write([make(1)], tmp_path)
    before.pop("job.json")
    assert {name: data for name, data in contents(tmp_path).items() if name in before} == before


def test_an_error_in_the_source_leaves_no_half_file(tmp_path: Path) -> None:
    def records() -> Iterator[Record]:
        yield from (make(n) for n in range(25))
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        write(records(), tmp_path, samples_per_shard=2, workers=2)
    assert not list(tmp_path.rglob("manifest.json"))
    shards = list(tmp_path.glob("*.tar"))
    assert len(shards) >= 6
    for path in shards:
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 3 * 2
    assert [path.name for path in (tmp_path / "_tmp").rglob("*")] == ["job.json"]


def test_records_are_taken_one_by_one(tmp_path: Path) -> None:
    drawn = 0

    def records() -> Iterator[Record]:
        nonlocal drawn
        for number in range(60):
            drawn += 1
            yield make(number % 5)
            done = len(list(tmp_path.glob("*.tar")))
            assert drawn - done <= 20, "the writer pulls far more records than it writes"

    write(records(), tmp_path, samples_per_shard=1, workers=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 10}, "give both or neither"),
        ({"resize_mode": "border"}, "give both or neither"),
        ({"encode_quality": 50}, "no effect without encode_format"),
        ({"encode_format": "png", "encode_quality": 50}, "compression level of 0 to 9"),
        ({"encode_format": "bmp"}, "jpg"),
        ({"samples_per_shard": 0}, "greater than or equal to 1"),
        ({"image_sise": 10}, "Extra inputs"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        WriteOptions(**options)


def test_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no manifest.json"):
        load_manifest(tmp_path)
    write([make(0, split="train")], tmp_path)
    with pytest.raises(ShardError, match="its splits are folders: train"):
        manifest_digest(tmp_path)
    path = tmp_path / "train" / "manifest.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"format": 99}))
    with pytest.raises(ShardError, match="format 99, this version reads up to 1"):
        load_manifest(tmp_path / "train")
    path.write_text("{")
    with pytest.raises(ShardError, match="is damaged"):
        load_manifest(tmp_path / "train")
