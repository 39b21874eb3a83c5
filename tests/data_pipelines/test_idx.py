import gzip
import io
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipelines import sources
from data_pipelines.errors import PipelineError
from data_pipelines.records import Record
from data_pipelines.sources import fashion_mnist, idx


def encode(array: NDArray[np.uint8]) -> bytes:
    """An IDX file: magic, dimensions, data."""
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def pixels(record: Record) -> NDArray[np.uint8]:
    assert isinstance(record.image, bytes)
    with Image.open(io.BytesIO(record.image)) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        return np.asarray(image)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(encode(pictures))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(encode(np.array([0, 1, 2, 1, 0], np.uint8)))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(encode(pictures[:2])))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(encode(np.array([2, 2], np.uint8))))
    return tmp_path


def test_pictures_labels_and_splits(folder: Path) -> None:
    found = sources.resolve(str(folder), names=("zero", "one", "two"), template="the digit {label}")
    assert found.name == "idx"
    records = list(found.module.iter_records(found.config))
    assert len(records) == found.module.count(found.config) == 7
    assert [(record.split, record.labels) for record in records] == [
        ("train", ("zero",)), ("train", ("one",)), ("train", ("two",)), ("train", ("one",)), ("train", ("zero",)),
        ("test", ("two",)), ("test", ("two",)),
    ]  # fmt: skip
    assert records[1].captions == ("the digit one",)
    assert records[1].extra == {"class_index": 1}
    np.testing.assert_array_equal(pixels(records[1]), np.arange(12, 24, dtype=np.uint8).reshape(4, 3))
    alone = sources.resolve(str(folder / "t10k-images-idx3-ubyte.gz"))
    assert [(r.split, r.labels, r.captions) for r in alone.module.iter_records(alone.config)] == [("", ("2",), ())] * 2


def test_damage_is_explained(folder: Path) -> None:
    def read(path: Path = folder, **settings: object) -> list[Record]:
        return list(idx.iter_records(idx.Config(path=path, **settings)))

    before = idx.fingerprint(idx.Config(path=folder))
    with pytest.raises(PipelineError, match="class 2 has no name"):
        read(names=("a", "b"))
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(encode(np.zeros(4, np.uint8)))
    assert idx.fingerprint(idx.Config(path=folder)) != before
    with pytest.raises(PipelineError, match=r"pictures \(5, 4, 3\) and classes \(4,\) do not belong together"):
        read()
    for content in (
        b"",
        b"\0\0\x08",
        b"\0\0\x08\x01\0\0\0\x09abc",
        b"\0\0\x0d\x01\0\0\0\x01abcd",
        b"\0\0\x08\xff\0\0\0",
        struct.pack(">BBBB2i", 0, 0, 8, 2, -1, -4) + b"abcd",
    ):
        labels.write_bytes(content)
        with pytest.raises(PipelineError, match="no IDX file of bytes"):
            read()
    labels.write_bytes(gzip.compress(encode(np.zeros(5, np.uint8)))[:-9])
    with pytest.raises(PipelineError, match="damaged gzip file"):
        read()
    labels.unlink()
    with pytest.raises(PipelineError, match="come in pairs"):
        read()
    with pytest.raises(PipelineError, match="no NAME-images-idx3-ubyte"):
        read(folder / "t10k-labels-idx1-ubyte.gz")


def test_fashion_mnist_by_name() -> None:
    found = sources.resolve("fashion-mnist")
    assert len(found.packages) == 1
    assert found.module.count(found.config) == 70_000
    first = next(found.module.iter_records(found.config))
    assert first.captions[0] == "a photo of an ankle boot"
    assert first.origin == "dataset-fashion-mnist=0.0~git20200523.55506a9-1/train#0"
    assert pixels(first).shape == (28, 28)


@pytest.mark.slow
def test_fashion_mnist_is_whole() -> None:
    """The published counts: 7,000 pictures per class, the test part 1,000 each."""
    counts: Counter[tuple[str, str]] = Counter()
    for record in fashion_mnist.iter_records(fashion_mnist.Config()):
        counts[record.split, record.labels[0]] += 1
    totals = {split: sum(n for (part, _), n in counts.items() if part == split) for split in ("train", "val", "test")}
    assert totals == {"train": 50_000, "val": 10_000, "test": 10_000}
    assert {counts["test", name] for name in fashion_mnist.CLASSES} == {1000}
    assert {counts["train", name] + counts["val", name] for name in fashion_mnist.CLASSES} == {6000}
