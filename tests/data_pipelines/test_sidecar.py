"""Sidecar files: what is written is found by key again, and a file that cannot be meant is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_pipelines.errors import ConfigError
from data_pipelines.loader import DataConfig, Loader
from data_pipelines.sidecar import CLUSTERS, load_sidecar, write_sidecar
from data_pipelines.tokens import Tokenizer, learn_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn_tokenizer(["red apple", "face", "tool", "animal"], vocab_size=400, context_length=16)


def load(folder: Path, tokenizer: Tokenizer, **changes: object) -> Loader:
    settings = {"train": folder, "batch_size": 32, "image": {"size": 16, "resize": "longest"}}
    return Loader(DataConfig.model_validate({**settings, **changes}), tokenizer, seed=0)


def test_lists_are_found_by_key_whatever_the_order(tmp_path: Path) -> None:
    """Two tables in one file, keys unsorted, of different lengths and not in ASCII; a null list counts as empty."""
    first = pa.table({"key": ["b", "a long key", "ä"], CLUSTERS: pa.array([[3, 1], None, []], pa.list_(pa.int32()))})
    second = pa.table({"key": ["0"], CLUSTERS: pa.array([[7]], pa.list_(pa.int32()))})
    write_sidecar(tmp_path / "c.parquet", [first, second], {"clusters": 12})
    table = load_sidecar(tmp_path / "c.parquet", CLUSTERS)
    found = table.find(["ä", "b", "nobody", "0", "a long key", "a long key and more"])
    assert [row.tolist() for row in found] == [[], [3, 1], [], [7], [], []]
    assert (table.width, table.clusters) == (2, 12)


def test_many_keys_are_found_as_in_a_dictionary(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = [f"{number:x}" for number in rng.permutation(5000)]
    lists = [rng.integers(0, 99, rng.integers(4)).tolist() for _ in keys]
    write_sidecar(tmp_path / "c.parquet", [pa.table({"key": keys, "n": pa.array(lists, pa.list_(pa.int64()))})], {})
    table = load_sidecar(tmp_path / "c.parquet", "n")
    known = dict(zip(keys, lists, strict=True))
    asked = [f"{number:x}" for number in range(0, 9000, 7)]
    assert [row.tolist() for row in table.find(asked)] == [known.get(key, []) for key in asked]
    assert table.clusters == max(map(max, filter(None, lists))) + 1


def test_single_numbers_and_texts_are_lists_of_one(tmp_path: Path) -> None:
    columns = {
        "key": ["x", "y", "z"],
        "n": [4, None, 0],
        "label": ["dog", None, "cat"],
        "labels": [["b", "a"], [], None],
    }
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    assert [row.tolist() for row in load_sidecar(tmp_path / "s.parquet", "n").find(["x", "y", "z"])] == [[4], [], [0]]
    label, labels = (load_sidecar(tmp_path / "s.parquet", name) for name in ("label", "labels"))
    assert [label.find_texts(key) for key in "xyzw"] == [("dog",), (), ("cat",), ()]
    assert [labels.find_texts(key) for key in "xyz"] == [("b", "a"), (), ()]
    assert labels.texts == ("a", "b")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": ["a"]}, "lacks the column.*cluster_ids; it has key"),
        ({"key": ["a", "b", "a"], CLUSTERS: [[1], [2], [3]]}, "key 'a' occurs twice"),
        ({"key": ["a"], CLUSTERS: [[-1]]}, "outside 0"),
        ({"key": ["a"], CLUSTERS: [[0.5]]}, "of double: expected"),
        ({"key": ["a"], CLUSTERS: [[1, None]]}, "empty value"),
        ({"key": pa.array([], pa.string()), CLUSTERS: pa.array([], pa.list_(pa.int32()))}, "holds no row"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path: Path, columns: dict[str, object], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    with pytest.raises(ConfigError, match=message):
        load_sidecar(tmp_path / "s.parquet", CLUSTERS)


def test_batches_carry_clusters_in_rows_of_equal_width(
    starter_shards: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = starter_shards / "val"
    keys = next(iter(load(folder, tokenizer))).keys
    lists = [[5, 2, 0], [1], *([[]] * 30)]
    write_sidecar(tmp_path / "c.parquet", [pa.table({"key": keys[:31], CLUSTERS: lists[:31]})], {})
    batch = next(iter(load(folder, tokenizer, clusters=tmp_path / "c.parquet")))
    found = batch.require("cluster_ids", "test")
    assert batch.keys == keys, "a sidecar changes no order"
    assert found.dtype == torch.int64
    assert found[:3].tolist() == [[5, 2, 0], [1, -1, -1], [-1, -1, -1]]
    halves = [next(iter(Loader(load(folder, tokenizer, clusters=tmp_path / "c.parquet").config, tokenizer, 0, r, 2)))
              for r in range(2)]  # fmt: skip
    assert torch.equal(torch.cat([half.require("cluster_ids", "test") for half in halves]), found)


def test_labels_of_a_sidecar_stand_for_those_of_the_shards(
    starter_shards: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = starter_shards / "val"
    plain = load(folder, tokenizer)
    keys = next(iter(plain)).keys
    write_sidecar(tmp_path / "l.parquet", [pa.table({"key": keys[:3], "kind": [["red", "big"], ["red"], []]})], {})
    settings = {"column": "kind", "sidecar": tmp_path / "l.parquet", "multi": True}
    loader = load(folder, tokenizer, labels=settings, captions={"labels": 1.0})
    batch = next(iter(loader))
    assert loader.classes == 2, "big and red, by name"
    assert batch.require("label_ids", "test")[:4].tolist() == [1, 1, -1, -1]
    assert batch.require("multi_labels", "test")[:3].tolist() == [[1, 1], [0, 1], [0, 0]]
    assert {loader.draw(0).texts[1], loader.draw(1).texts[0]} & {"red"}, "labels are what the texts are made of"
    state = loader.state_dict()
    write_sidecar(tmp_path / "l.parquet", [pa.table({"key": keys[:3], "kind": [["red"], ["red"], ["big"]]})], {})
    with pytest.raises(ConfigError, match=r"labels\.sidecar: checkpoint"):
        load(folder, tokenizer, labels=settings, captions={"labels": 1.0}).load_state_dict(state)


@pytest.mark.parametrize("setting", ["clusters", "labels"])
def test_a_sidecar_of_other_shards_is_refused(
    starter_shards: Path, tmp_path: Path, tokenizer: Tokenizer, setting: str
) -> None:
    table = pa.table({"key": ["nobody"], CLUSTERS: [[1]], "labels": [["a"]]})
    write_sidecar(tmp_path / "c.parquet", [table], {})
    value = tmp_path / "c.parquet" if setting == "clusters" else {"sidecar": tmp_path / "c.parquet"}
    with pytest.raises(ConfigError, match=f"data.{setting}.*not one key of data.train"):
        load(starter_shards / "val", tokenizer, **{setting: value})


def test_further_views_have_their_own_strength(starter_shards: Path, tokenizer: Tokenizer) -> None:
    folder = starter_shards / "val"
    batch = load(folder, tokenizer, views=3, strong={"grey": 1.0}).make_batch(0)
    plain = load(folder, tokenizer).make_batch(0)
    assert torch.equal(batch.pixels, plain.pixels), "the first view is the weak one"
    assert batch.views is not None
    for view in batch.views:
        assert not torch.equal(view, plain.pixels)
        assert int((view.amax(1).int() - view.amin(1).int()).max()) <= 1, "grey"
    with pytest.raises(ConfigError, match=r"data\.strong has no effect with data\.views=1"):
        load(folder, tokenizer, strong={"grey": 1.0})
    with pytest.raises(ConfigError, match=r"data\.strong\.hue=0\.1 needs RGB"):
        load(
            folder,
            tokenizer,
            views=2,
            strong={"hue": 0.1},
            image={"size": 16, "channels": 1, "mean": [0.5], "std": [0.5]},
        )
