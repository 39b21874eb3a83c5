"""What `data.train` may say, and which samples of it are used."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.keep import load_keys, load_weights
from data_pipelines.ledger import Ledger
from data_pipelines.preprocess import ImageConfig
from data_pipelines.reader import Maps, open_shards
from data_pipelines.shard_set import ShardSet
from data_pipelines.stream import decoded, iterate, stored

SPLITS = ("unseen_concepts", "unseen_vendor")
IMAGE = ImageConfig(size=16, resize="longest")


def keys(shards: ShardSet) -> list[str]:
    return [shards.read(number).key for number in range(len(shards))]


def test_lists_braces_and_mixtures_name_the_same_samples(starter_shards: Path) -> None:
    one, two = (ShardSet(starter_shards / name) for name in SPLITS)
    both = keys(one) + keys(two)
    texts = [f"{starter_shards}/{SPLITS[0]}::{starter_shards}/{SPLITS[1]}", f"{starter_shards}/{{{','.join(SPLITS)}}}"]
    assert [keys(ShardSet(text)) for text in texts] == [both, both]
    tars = ShardSet(f"{starter_shards}/{SPLITS[0]}/{{00000..00000}}.tar")
    assert keys(tars) == keys(one)
    assert tars.shards[0].info == one.shards[0].info, "the manifest of their folder vouches for single tars"
    mixture = ShardSet({str(starter_shards / name): weight for name, weight in zip(SPLITS, (1, 3), strict=True)})
    assert keys(mixture) == both
    assert [(part.shards, part.weight) for part in mixture.parts] == [(1, 1), (1, 3)]
    assert [mixture.part(shard) for shard in range(2)] == [0, 1]
    assert len({one.digest, two.digest, ShardSet(texts[0]).digest}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("{a,b", "brace|Unbalanced|unbalanced"), ("nowhere", "no such folder"), ("9.tar", r"knows no 9.tar")],
)
def test_a_wrong_text_is_refused_with_its_reason(starter_shards: Path, text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        ShardSet(f"{starter_shards}/{SPLITS[0]}/{text}" if text.endswith(".tar") else text)


def test_sources_come_from_the_parquet_and_from_the_tar_alike(starter_shards: Path, tmp_path: Path) -> None:
    by_parquet = ShardSet(starter_shards / "val", {"google": 2})
    folder = tmp_path / "val"
    shutil.copytree(starter_shards / "val", folder)
    for path in folder.glob("*.parquet"):
        path.unlink()
    by_tar = ShardSet(folder, {"google": 2})
    assert len(by_tar) > 50
    assert [by_tar.original(n) for n in range(len(by_tar))] == [by_parquet.original(n) for n in range(len(by_parquet))]
    assert {by_tar.read(n).source for n in range(len(by_tar))} == {"google"}


@pytest.mark.parametrize("form", ["txt", "parquet"])
def test_a_keep_list_selects_by_key(starter_shards: Path, tmp_path: Path, form: str) -> None:
    everything = keys(ShardSet(starter_shards / "val"))
    wanted = sorted(np.random.default_rng(0).choice(everything, 20, replace=False).tolist())
    path = tmp_path / f"keep.{form}"
    if form == "txt":
        path.write_text("\n".join([*wanted, "not there", ""]))
    else:
        pq.write_table(pa.table({"key": wanted, "score": [1.0] * 20}), path)
    assert load_keys(path) >= set(wanted)
    assert sorted(keys(ShardSet(starter_shards / "val", keep=path))) == wanted
    (tmp_path / "none.txt").write_text("nobody\n")
    with pytest.raises(PipelineError, match=r"none\.txt"):
        ShardSet(starter_shards / "val", keep=tmp_path / "none.txt")


def test_unusable_key_lists_say_why(tmp_path: Path) -> None:
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet.*key"):
        load_keys(tmp_path / "a.parquet")
    pq.write_table(pa.table({"key": ["a", "b"], "weight": [0.5, -1.0]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="weight -1.0"):
        load_weights(tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"c\.parquet"):
        load_weights(tmp_path / "c.parquet")


def test_few_shards_are_open_at_a_time_and_views_outlive_them(starter_shards: Path, tmp_path: Path) -> None:
    source = starter_shards / "unseen_concepts"
    infos = []
    manifest = json.loads((source / "manifest.json").read_text())
    for number in range(12):
        for suffix in ("tar", "index.npy"):
            shutil.copy(source / f"00000.{suffix}", tmp_path / f"{number:05}.{suffix}")
        infos.append({**manifest["shards"][0], "name": f"{number:05}.tar"})
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "shards": infos}))
    shards = open_shards(tmp_path, maps=Maps(limit=3))
    assert [shard._open for shard in shards] == [None] * 12, "nothing is opened to learn what there is"
    views = [shard.raw(1)["image"] for shard in shards]
    assert sum(shard._open is not None for shard in shards) == 3
    assert len({bytes(view) for view in views}) == 1


def test_the_stages_run_inside_webdataset(starter_shards: Path) -> None:
    shards, ledger = ShardSet(starter_shards / "unseen_concepts"), Ledger()
    pipeline = wds.DataPipeline(
        partial(stored, shards, ledger, range(0, 60, 2)),
        partial(decoded, image=IMAGE, ledger=ledger, max_pixels=10**8),
        partial(map, lambda sample: (sample.key, sample.pixels, sample.captions[0])),
        wds.batched(8, partial=True),
    )
    batches = list(pipeline)
    assert [len(batch[0]) for batch in batches] == [8, 8, 8, 6]
    assert tuple(batches[0][1].shape) == (8, 3, 16, 16)
    expected = [sample.key for sample in iterate(starter_shards / "unseen_concepts", IMAGE, Ledger(), 10**8)]
    assert [key for batch in batches for key in batch[0]] == expected[0:60:2]
    assert ledger.report()["trained"] == 30
