"""The data sets of the claims, as written from the real packages."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import ConfigError
from vlp.claims import clipart, data


@pytest.fixture(scope="module")
def emoji_shards() -> Path:
    return data.prepared("claims-emoji", progress=False)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_splits_of_the_emoji_share_no_family_and_every_label_is_known(emoji_shards: Path) -> None:
    splits = {split: rows_of(emoji_shards / split) for split in ("train", "val", "test")}
    families = {split: {row["family"] for row in rows} for split, rows in splits.items()}
    assert not families["train"] & families["test"]
    assert not families["train"] & families["val"]
    assert not families["val"] & families["test"]
    known = set((emoji_shards / "labels.txt").read_text().splitlines())
    for rows in splits.values():
        assert all(row["labels"] and set(row["labels"]) <= known for row in rows)
        assert {row["source"] for row in rows} == {"google", "google-2017", "twitter", "fluent"}
    carried = {label for row in splits["train"] for label in row["labels"]}
    assert carried == known
    assert len(splits["test"]) > 800


def test_mentions_hold_a_true_name_and_often_a_foreign_one(emoji_shards: Path) -> None:
    aliases = {name: {name, *found} for name, found in json.loads((emoji_shards / "entities.json").read_text()).items()}
    rows = rows_of(emoji_shards / "train")
    assert all(any(name in row["mentions"] for name in aliases[row["caption"]]) for row in rows)
    alone = sum(row["mentions"] in aliases[row["caption"]] for row in rows) / len(rows)
    assert 0.35 < alone < 0.45


@pytest.mark.slow
def test_keep_lists_of_fashion_have_equal_length_and_a_long_tail() -> None:
    folder = data.prepared("claims-fashion", progress=False)
    label = {row["key"]: row["labels"][0] for row in rows_of(folder / "train")}
    lists = {name: (folder / name).read_text().split() for name in ("longtail.txt", "balanced.txt")}
    assert len(lists["longtail.txt"]) == len(lists["balanced.txt"]) == len(set(lists["balanced.txt"]))
    counts = {
        name: sorted(map([label[key] for key in keys].count, set(label.values()))) for name, keys in lists.items()
    }
    assert counts["longtail.txt"][-1] == data.LARGEST
    assert counts["longtail.txt"][0] == data.LARGEST // data.RATIO
    assert counts["balanced.txt"][-1] - counts["balanced.txt"][0] <= 1


def test_an_unknown_data_set_is_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="data set 'x' of the claims does not exist; there are claims-emoji"):
        data.find("x")


@pytest.mark.slow
def test_keywords_of_clip_art_are_those_of_many_and_titles_are_in_one_split() -> None:
    folder = data.prepared("claims-clipart", progress=False)
    splits = {split: rows_of(folder / split) for split in ("train", "val", "test")}
    titles = {split: {row["caption"] for row in rows} for split, rows in splits.items()}
    assert not titles["train"] & (titles["val"] | titles["test"])
    assert not titles["val"] & titles["test"]
    known = (folder / "labels.txt").read_text().splitlines()
    carried = [label for row in splits["train"] for label in row["labels"]]
    assert min(map(carried.count, known)) >= clipart.LEAST
    assert set(carried) == set(known)
    assert 0 < sum(not row["labels"] for row in splits["train"]) < len(splits["train"]) / 2
    assert len(splits["test"]) > 200
