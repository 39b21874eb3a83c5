import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import sources
from data_pipelines.errors import PipelineError, ShardError
from data_pipelines.records import Record
from data_pipelines.shard_set import ShardSet
from data_pipelines.sources import tars
from data_pipelines.testing import draw
from data_pipelines.write import WriteOptions, write_shards

shard = partial(write_shards, kind="test", licences={}, progress=False)


def read(path: Path | str, **settings: Any) -> list[Record]:
    return list(tars.iter_records(tars.Config(path=path, **settings)))


def facts(record: Record) -> dict[str, Any]:
    """All that a copy must keep."""
    names = ("image", "captions", "labels", "boxes", "source", "origin", "split", "extra", "problem")
    return {name: getattr(record, name) for name in names}


@pytest.fixture
def records() -> list[Record]:
    """25 samples with everything a record may hold."""
    return [
        Record(
            image=draw(seed=n),
            captions=(f"one, {n}", f"two\nlines {n}") if n % 5 else (),
            labels=(f"l{n % 3}",),
            boxes=((0.125, 0.25, 0.5, 1.0, "cat"), (0.0, 0.0, 1.0, 1.0, "")) if n % 2 else (),
            source=f"vendor{n % 2}",
            origin=f"some/where/{n}.png",
            extra={"score": n / 4, "count": n, "note": None if n % 2 else "ä"},
        )
        for n in range(25)
    ]


@pytest.fixture
def old(tmp_path: Path, records: list[Record]) -> Path:
    shard(records, tmp_path / "old", WriteOptions(samples_per_shard=10))
    return tmp_path / "old"


def test_nothing_is_lost_on_the_way_through_a_shard(old: Path, tmp_path: Path, records: list[Record]) -> None:
    found = sources.resolve(str(old))
    assert found.name == "tars"
    assert found.module.count(found.config) == 25
    assert [facts(record) for record in read(old)] == [facts(record) for record in records]
    manifest = shard(read(old), tmp_path / "new", WriteOptions(samples_per_shard=7))[""]
    assert (manifest.records, manifest.samples, len(manifest.shards)) == (25, 25, 4)
    assert [facts(record) for record in read(tmp_path / "new")] == [facts(record) for record in records]


def test_a_class_member_becomes_a_column(tmp_path: Path) -> None:
    """The usual layout of class-labelled tars: picture and number, no text."""
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for name, content in (("a.png", draw()), ("a.cls", b"7"), ("b.png", draw(seed=1)), ("b.cls", b"0")):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    shard(read(tmp_path / "plain.tar"), tmp_path / "new", WriteOptions())
    samples = ShardSet(tmp_path / "new")
    assert [samples.read(n).columns["cls"] for n in range(2)] == [7, 0]
    assert read(tmp_path / "new")[0].extra["cls"] == 7, "and stays one"


def test_pictures_are_encoded_anew(old: Path, tmp_path: Path) -> None:
    shard(read(old), tmp_path / "new", WriteOptions(encode_format="jpg", image_size=16, resize_mode="center_crop"))
    assert all(
        bytes(record.image)[:2] == b"\xff\xd8" for record in read(tmp_path / "new") if isinstance(record.image, bytes)
    )
    assert {row["width"] for row in pq.read_table(tmp_path / "new" / "00000.parquet").to_pylist()} == {16}


@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_a_keep_list_selects_by_key(old: Path, tmp_path: Path, kind: str) -> None:
    keys = ["000013", "000001", "000024", "000099"]
    path = tmp_path / ("keys.txt" if kind == "text" else "keys.parquet")
    if kind == "text":
        path.write_text("\n".join(keys) + "\n\n")
    else:
        pq.write_table(pa.table({"key": keys, "why": ["dup"] * 4}), path)
    found = read(old, keys=path)
    assert [record.origin.rpartition("/")[2] for record in found] == ["1.png", "13.png", "24.png", "000099"]
    assert [record.problem.partition(":")[0] for record in found] == ["", "", "", "missing_key"]
    config = tars.Config(path=old, keys=path)
    before = tars.fingerprint(config)
    path.write_bytes(path.read_bytes() + b"000002\n")
    if kind == "text":
        assert tars.fingerprint(config) != before
    else:
        with pytest.raises(PipelineError, match="cannot be read"):
            tars.fingerprint(config)


def test_splits_merging_and_patterns(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            place = tmp_path / "set" / split
            place.mkdir(parents=True, exist_ok=True)
            picture = {f"{name}{split}.png": draw(), f"{name}{split}.txt": b"a text"}
            (place / f"{name}.tar").write_bytes(tar(picture))
    found = sources.resolve(str(tmp_path / "set"))
    assert (found.name, found.module.count(found.config)) == ("tars", None)
    assert [(record.split, record.origin, record.source) for record in read(tmp_path / "set")] == [
        (split, f"{split}/{name}.tar#{name}{split}", "set") for split in ("train", "val") for name in ("a", "b")
    ]
    merged = f"{tmp_path}/set/val::{tmp_path}/set/train/b.tar"
    assert sources.resolve(merged).name == "tars"
    assert [record.origin for record in read(merged)] == ["a.tar#aval", "b.tar#bval", "b.tar#btrain"]
    assert [record.source for record in read(merged)] == ["val", "val", "train"]
    for pattern in (f"{tmp_path}/set/train/*.tar", f"{tmp_path}/set/train/{{a..b}}.tar"):
        found = sources.resolve(pattern)
        assert found.name == "tars"
        assert len(list(found.module.iter_records(found.config))) == 2
    for nothing in (tmp_path / "set" / "train" / "c*.tar", tmp_path / "none", tmp_path):
        with pytest.raises(PipelineError, match="no .tar there"):
            read(nothing)


def tar(members: dict[str, bytes]) -> bytes:
    """A tar as any tool would write it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_tars_of_other_tools(tmp_path: Path) -> None:
    columns = {
        "url": "https://e.org/1.jpg",
        "alt": ["a", "b"],
        "label": "dog",
        "status": "success",
        "md5": "0f",
        "fold": "val",
    }
    members = {
        "1.jpg": draw(format="JPEG"), "1.json": json.dumps(columns).encode(), "1.txt": b"plain",
        "2.jpg": draw(format="JPEG"), "2.txt": b"alone", "3.txt": b"no picture", "4.png": draw(), "4.json": b"{",
    }  # fmt: skip
    (tmp_path / "00000.tar").write_bytes(tar(members))
    found = read(tmp_path)
    assert [record.problem.partition(":")[0] for record in found][:3] == ["", "", "no_image"]
    assert found[3].problem
    assert (found[0].captions, found[0].labels, found[0].origin) == (("plain",), ("dog",), "https://e.org/1.jpg")
    assert found[0].extra == {"alt": '["a", "b"]', "md5": "0f", "fold": "val"}
    assert (found[1].captions, found[1].origin) == (("alone",), "00000.tar#2")
    chosen = read(tmp_path, caption_col=("alt",), columns=("md5",), split_by="fold")[:2]
    assert [(record.captions, record.extra, record.split) for record in chosen] == [
        (("a", "b"), {"md5": "0f"}, "val"), ((), {"md5": None}, ""),
    ]  # fmt: skip
    assert chosen[1].problem.startswith("bad_split")
    assert read(tmp_path, caption_col=("gone",), template="a {label}")[0].captions == ("a dog",)


@pytest.mark.parametrize("fault", ["cut", "header", "empty"])
def test_a_damaged_tar_stops_or_is_counted_but_never_passes(old: Path, fault: str) -> None:
    path = old / "00001.tar"
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    path.write_bytes({"cut": content[: len(content) // 2], "header": flipped, "empty": b""}[fault])
    path.with_name("00001.index.npy").unlink()
    with pytest.raises(ShardError, match=r"00001\.tar.*--damaged count"):
        read(old)
    found = read(old, damaged="count")
    assert len(found) == 16
    assert [record.problem.partition(":")[0] for record in found if record.problem] == ["damaged_shard"]


def test_tars_in_an_object_store(old: Path, records: list[Record]) -> None:
    fsspec.filesystem("memory").put(str(old), "/bucket/tars", recursive=True)
    found = sources.resolve("memory://bucket/tars")
    assert found.name == "tars"
    assert [facts(record) for record in found.module.iter_records(found.config)] == [
        facts(record) for record in records
    ]
    assert len(found.module.fingerprint(found.config)) == 64
    assert found.module.count(found.config) == 25
    assert len(read("memory://bucket/tars/00001.tar::memory://bucket/tars/00002.tar")) == 15
