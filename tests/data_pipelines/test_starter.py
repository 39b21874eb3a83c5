"""The starter set as it is really written: accounting, splits without leakage, limits."""

import io
import itertools
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import job, sources
from data_pipelines.records import load_manifest
from data_pipelines.sources import emoji, starter
from data_pipelines.write import WriteOptions

Rows = dict[str, list[dict[str, Any]]]
FROM_OTHER_FAMILIES = ("train", "val", "unseen_concepts")


@pytest.fixture(scope="module")
def rows(starter_shards: Path) -> Rows:
    """Split -> parquet rows, failures included."""
    return {
        split: [
            row
            for path in sorted((starter_shards / split).glob("*.parquet"))
            for row in pq.read_table(path).to_pylist()
        ]
        for split in starter.SPLITS
    }


def values(rows: Rows, split: str, column: str) -> set[str]:
    return {row[column] for row in rows[split] if row[column] is not None}


def test_sizes(starter_shards: Path) -> None:
    manifests = {split: load_manifest(starter_shards / split) for split in starter.SPLITS}
    samples = {split: manifest.samples for split, manifest in manifests.items()}
    assert 4300 < samples["train"] < 4800
    assert 400 < samples["val"] < 650
    assert 750 < samples["unseen_vendor"] < 850
    assert 180 < samples["unseen_concepts"] < 220
    assert set(manifests["train"].sources) == {"google", "google-2017", "twitter", "openclipart"}
    assert set(manifests["val"].sources) == {"google", "twitter"}
    assert set(manifests["unseen_vendor"].sources) == set(manifests["unseen_concepts"].sources) == {"fluent"}
    assert len(manifests["train"].licences) == 7
    assert "CC-BY-4.0; Twemoji" in manifests["train"].licences["emoji-datasource-twitter@16.0.0"]


def test_records_are_samples_plus_failures(starter_shards: Path, rows: Rows) -> None:
    for split in starter.SPLITS:
        manifest = load_manifest(starter_shards / split)
        assert manifest.records == len(rows[split]) == manifest.samples + sum(manifest.failures.values())
        assert sum(row["status"] == "success" for row in rows[split]) == manifest.samples


def test_the_huge_pictures_are_counted_failures(starter_shards: Path, rows: Rows) -> None:
    failed = [row for row in rows["train"] if row["status"] != "success"]
    assert {row["error_message"].partition(":")[0] for row in failed} == {"too_many_pixels"}
    assert load_manifest(starter_shards / "train").failures == {"too_many_pixels": len(failed)}
    assert any("623,403,000 pixels, limit 50,000,000" in row["error_message"] for row in failed)  # 20,990 x 29,700


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(starter.SPLITS, 2)))
def test_no_checksum_is_in_two_splits(rows: Rows, one: str, other: str) -> None:
    assert values(rows, one, "sha256") & values(rows, other, "sha256") == set()


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(FROM_OTHER_FAMILIES, 2)))
def test_no_family_is_in_two_splits(rows: Rows, one: str, other: str) -> None:
    assert values(rows, one, "family")
    assert values(rows, one, "family") & values(rows, other, "family") == set()


def test_the_unseen_vendor_draws_training_families_only(rows: Rows) -> None:
    vendor = values(rows, "unseen_vendor", "family")
    assert not vendor & (values(rows, "val", "family") | values(rows, "unseen_concepts", "family"))
    assert len(vendor - values(rows, "train", "family")) <= 0.01 * len(vendor)  # drawn by the third vendor alone
    for split in ("unseen_vendor", "unseen_concepts"):
        families = [row["family"] for row in rows[split]]
        assert len(families) == len(set(families))  # base pictures, no variants


def test_withheld_names_are_nowhere_in_the_clip_art(rows: Rows) -> None:
    withheld = {name.lower() for split in ("val", "unseen_concepts") for name in values(rows, split, "caption")}
    clipart = [row for row in rows["train"] if row["source"] == "openclipart"]
    assert len(clipart) > 1500
    for row in clipart:
        assert not withheld & {row["caption"], *row["labels"]}, row["url"]


@pytest.mark.parametrize(
    ("variant", "base"),
    [("1F3C3-200D-2640-200D-27A1", "1F3C3"), ("1F468-1F3FD-200D-1F680", "1F9D1-200D-1F680"), ("1F46A", None)],
)
def test_variants_stay_with_their_base(variant: str, base: str | None) -> None:
    assert emoji.family_of(variant) == (base or "1F9D1-200D-1F9D1-200D-1F9D2")
    assert starter.split_of(emoji.family_of(variant)) == starter.split_of(emoji.family_of(emoji.family_of(variant)))


def test_pictures_are_small_whole_and_keep_alpha(starter_shards: Path) -> None:
    clear = 0
    for split in starter.SPLITS:
        with tarfile.open(max((starter_shards / split).glob("*.tar"))) as tar:
            for member in tar:
                if not member.name.endswith((".json", ".txt")):
                    content = tar.extractfile(member)
                    assert content is not None
                    with Image.open(io.BytesIO(content.read())) as image:
                        assert image.format == "PNG"
                        assert max(image.size) <= 144
                        clear += image.convert("RGBA").getextrema()[3][0] == 0
    assert clear > 1000


def test_captions_and_labels(rows: Rows) -> None:
    by_url = {row["url"]: row for row in rows["train"]}
    row = by_url["emoji-datasource-google@16.0.0/1f004"]
    assert row["captions"] == ["mahjong red dragon", "mahjong"]
    assert row["labels"][0] == "Activities"
    assert all(row["captions"] and row["labels"] for split in starter.SPLITS for row in rows[split])


def test_a_second_run_does_nothing(starter_shards: Path) -> None:
    source, options = sources.resolve("starter"), WriteOptions(**starter.WRITE)
    before = {path: path.stat().st_mtime_ns for path in starter_shards.rglob("*")}
    result = job.shard(source, starter_shards, options, overwrite=False, progress=False)
    assert result["up_to_date"]
    assert result["seconds"] < 5
    assert {path: path.stat().st_mtime_ns for path in starter_shards.rglob("*")} == before


def test_no_machine_path_gets_into_the_files(starter_shards: Path) -> None:
    for path in starter_shards.rglob("*.json"):
        assert not re.search(r"(/home/|/root/|/tmp/|/Users/)", json.dumps(json.loads(path.read_text()))), path
