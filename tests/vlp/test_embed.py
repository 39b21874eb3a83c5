"""Embedding folders: layout, agreement with `vlp.infer`, resume, refusals, bad samples."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import PipelineError
from data_pipelines.reader import Sample
from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp.embed import embed_shards
from vlp.embed_files import find_parts, metadata_table, read_embed_info
from vlp.infer import encode_images, encode_texts
from vlp.testing import WORDS, micro_bundle, picture


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve pictures in two shards; the last one has no caption."""
    records = [
        Record(picture(i), (WORDS[i % 7], "second") if i < 11 else (), "here", f"{i}", labels=("label", str(i)))
        for i in range(12)
    ]
    write_shards(
        records, tmp_path / "shards", WriteOptions(samples_per_shard=7), kind="test", licences={}, progress=False
    )
    return tmp_path / "shards"


def test_layout_and_values(shards: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "emb", list[int]()
    bundle = micro_bundle()
    result = embed_shards(bundle, "digest", shards, out, progress=steps.append)
    assert (result.rows, result.parts, result.reused, result.skipped, sum(steps)) == (12, 2, 0, {}, 12)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "embeddings.json", "img_emb/img_emb_0.npy", "img_emb/img_emb_1.npy", "metadata/metadata_0.parquet",
        "metadata/metadata_1.parquet", "text_emb/text_emb_0.npy", "text_emb/text_emb_1.npy",
    ]  # fmt: skip
    images = np.concatenate([np.load(path) for path, _ in find_parts(out, "img_emb")])
    texts = np.concatenate([np.load(path) for path, _ in find_parts(out, "text_emb")])
    rows = [row for _, path in find_parts(out, "text_emb") for row in pq.read_table(path).to_pylist()]
    np.testing.assert_allclose(images, encode_images(bundle, [picture(i) for i in range(12)]), atol=1e-6)
    captions = [*(WORDS[i % 7] for i in range(11)), ""]
    np.testing.assert_allclose(texts, encode_texts(bundle, captions), atol=1e-6)
    assert images.dtype == np.float32
    assert [row["caption"] for row in rows] == captions
    assert [row["labels"] for row in rows] == [["label", str(i)] for i in range(12)]
    assert [row["image_path"] for row in rows] == [row["key"] for row in rows]


def test_an_interrupted_run_goes_on(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "emb"
    embed_shards(micro_bundle(), "digest", shards, out, "float16")
    (out / "metadata" / "metadata_1.parquet").unlink()
    with pytest.raises(PipelineError, match="1 of 2 parts"):
        find_parts(out, "img_emb")
    kept = (out / "img_emb" / "img_emb_0.npy").stat().st_mtime_ns
    result = embed_shards(micro_bundle(), "digest", shards, out, "float16")
    assert (result.rows, result.reused) == (12, 1)
    assert (out / "img_emb" / "img_emb_0.npy").stat().st_mtime_ns == kept
    assert np.load(out / "img_emb" / "img_emb_1.npy").dtype == np.float16


def test_embeddings_of_different_models_never_mix(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "emb"
    embed_shards(micro_bundle(), "digest", shards, out)
    with pytest.raises(PipelineError, match="another weights_sha256"):
        embed_shards(micro_bundle(1), "other", shards, out)
    for overwrite in (False, True):
        with pytest.raises(PipelineError, match="is not empty"):
            embed_shards(micro_bundle(), "digest", shards, tmp_path, overwrite=overwrite)
    info = read_embed_info(out)
    assert info is not None
    assert info.weights_sha256 == "digest"
    replaced = embed_shards(micro_bundle(1), "other", shards, out, overwrite=True)
    assert (replaced.rows, replaced.reused) == (12, 0)
    (out / "embeddings.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(PipelineError, match="embeddings.json"):
        read_embed_info(out)


def test_a_bad_picture_is_left_out_and_counted(shards: Path, tmp_path: Path) -> None:
    tar = shards / "00000.tar"
    with tarfile.open(tar) as archive:
        member = archive.getmembers()[0]
    content = bytearray(tar.read_bytes())
    start = member.offset_data
    content[start : start + 20] = bytes(20)
    tar.write_bytes(content)
    result = embed_shards(micro_bundle(), "digest", shards, tmp_path / "emb")
    assert (result.rows, result.skipped) == (11, {"not_an_image": 1})
    assert len(np.load(tmp_path / "emb" / "text_emb" / "text_emb_0.npy")) == 6


def test_columns_of_other_tools_find_a_type() -> None:
    """width as text, integers beyond 64 bits, mixed and nested values, and names the layout keeps for itself."""
    columns = [
        {"width": "wide", "big": 2**70, "mixed": 1, "deep": {"a": {"b": 1}}, "tags": ["x"], "caption": "no", "f": 1},
        {"width": 3, "big": 1, "mixed": "one", "deep": None, "tags": None, "metadata": {}, "f": 0.5, "flag": True},
    ]
    samples = [Sample(str(n), b"", ("yes",), (), "", row) for n, row in enumerate(columns)]
    rows = metadata_table(samples).to_pylist()
    assert rows[0] == {
        "image_path": "0", "caption": "yes", "width": "wide", "big": str(2**70), "mixed": "1", "deep.a.b": 1,
        "tags": ["x"], "f": 1.0, "deep": None, "flag": None,
    }  # fmt: skip
    assert (rows[1]["width"], rows[1]["mixed"], rows[1]["f"], rows[1]["flag"]) == ("3", "one", 0.5, True)
