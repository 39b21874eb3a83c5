"""Equal and near copies among real pictures, and the lookup against brute force."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_pipelines.dedup import dedup, lines, near_pairs, perceptual_hash
from data_pipelines.errors import ConfigError
from data_pipelines.records import Record
from data_pipelines.testing import draw
from data_pipelines.write import WriteOptions, write_shards


def encode(image: Image.Image, format: str = "JPEG", **options: int) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, format, **options)
    return stream.getvalue()


def variants(seed: int) -> list[bytes]:
    """A picture, then the same smaller, in another format, at a low quality, a little brighter."""
    image = Image.open(io.BytesIO(draw((200, 150), seed=seed)))
    return [
        encode(image, quality=95),
        encode(image.resize((100, 75))),
        encode(image, "PNG"),
        encode(image, quality=20),
        encode(ImageEnhance.Brightness(image).enhance(1.1), "WEBP"),
    ]


def write(out: Path, images: dict[str, list[bytes]]) -> Path:
    records = [
        Record(image=data, captions=("x",), source="s", origin=str(n), split=split)
        for split, datas in images.items()
        for n, data in enumerate(datas)
    ]
    write_shards(records, out, WriteOptions(samples_per_shard=4), kind="t", licences={}, progress=False)
    return out


def test_copies_are_found_and_the_keep_list_is_without_them(tmp_path: Path) -> None:
    first, second = variants(1), variants(2)
    out = write(tmp_path / "out", {"": [first[0], second[0], first[0], *first[1:], draw((60, 60), seed=3)]})
    result = dedup(out, progress=False)
    assert (result["samples"], result["exact"], result["near"], result["kept"]) == (8, 1, 4, 3)
    (group,) = result["groups"]
    assert group["kept"] == "000000"
    assert [(row["key"], row["exact"]) for row in group["dropped"]] == [
        ("000002", True), ("000003", False), ("000010", False), ("000011", False), ("000012", False),
    ]  # fmt: skip
    assert (out / "keep.txt").read_text().split() == ["000000", "000001", "000013"]
    exact = dedup(out, exact_only=True, keep="exact.txt", progress=False)
    assert (exact["exact"], exact["near"]) == (1, 0)
    assert len((out / "exact.txt").read_text().split()) == 7
    assert "000000: 000002 (equal)" in "\n".join(lines(result))


def test_a_test_picture_is_dropped_from_training(tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"train": [draw(seed=1), draw(seed=2)], "val": [draw(seed=2)]})
    result = dedup(out, progress=False)
    assert [(group["kept"], group["dropped"][0]["key"]) for group in result["groups"]] == [
        ("val/000000", "train/000001")
    ]
    assert (out / "train" / "keep.txt").read_text() == "000000\n"
    assert (out / "val" / "keep.txt").read_text() == "000000\n"


def test_hash_of_copies_is_near_and_of_others_far() -> None:
    own = [perceptual_hash(data) for data in variants(5)]
    others = [perceptual_hash(draw((200, 150), seed=seed)) for seed in range(10, 40)]
    assert all(value is not None for value in (*own, *others))
    assert max((own[0] ^ value).bit_count() for value in own) <= 4  # type: ignore[operator]
    assert min((own[0] ^ value).bit_count() for value in others) >= 10  # type: ignore[operator]
    assert perceptual_hash(encode(Image.new("RGB", (64, 64), (9, 200, 30)))) is None


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7])
def test_near_pairs_are_those_of_all_pairs(distance: int) -> None:
    rng = np.random.default_rng(distance)
    seeds = rng.integers(0, 2**63, 40, dtype=np.uint64)
    flips = np.array([np.uint64(sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 10), replace=False)))
                      for _ in range(400)])  # fmt: skip
    unique = np.unique(np.repeat(seeds, 10) ^ flips)
    distances = np.bitwise_count(unique[:, None] ^ unique[None])
    expected = {(a, b) for a, b in np.argwhere(distances <= distance).tolist() if a < b}
    assert {(a, b) for a, b in near_pairs(unique, distance)} == expected
    assert bool(expected) == (distance > 0)


def test_a_distance_beyond_the_lookup_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="distance 8: must be 0 to 7"):
        dedup(tmp_path, distance=8, progress=False)
