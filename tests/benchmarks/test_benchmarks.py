"""The figures' equality parts at small size, their arithmetic, and README's table. Nothing here reads a clock."""

import io
import json
from dataclasses import replace
from pathlib import Path

import all_figures
import bench_shard
import numpy as np
import prove
import pytest
import torch
from bench_data import faulty_copy
from bench_inputs import captions
from bench_kit import RESULTS, ROOT, compare, missing, render, table, take_turns, write
from bench_loader import Job, our_batches
from bench_rows import our_samples, peer_samples, plain_tokenizer
from bench_shard import by_script, by_us, contents, served, url_table
from PIL import Image

from data_pipelines.preprocess import ImageConfig
from data_pipelines.reader import open_shards
from data_pipelines.testing import draw
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four JPEGs of 400 x 300 with captions, an odd one among them."""
    path = tmp_path_factory.mktemp("bench") / "photos"
    path.mkdir()
    for number, text in enumerate(captions(24)):
        size = (301, 401) if number == 5 else (400, 300)
        (path / f"{number:06d}.jpg").write_bytes(draw(size, format="JPEG", seed=number))
        (path / f"{number:06d}.txt").write_text(f"{number} {text}".strip(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    """The folder as our command shards it at 256 pixels."""
    by_us(folder, folder.with_name("shards"))
    return folder.with_name("shards")


def test_the_script_and_our_command_write_the_same_samples(folder: Path, shards: Path) -> None:
    by_script(folder, folder.with_name("script"))
    assert len(contents(shards)) == 24
    assert contents(folder.with_name("script")) == contents(shards)


def test_img2dataset_would_find_every_picture(folder: Path, tmp_path: Path) -> None:
    from urllib.request import urlopen

    with served(folder) as address:
        lines = url_table(folder, address, tmp_path / "urls.csv").read_text().splitlines()
        assert lines[0] == "url,caption"
        assert len(lines) == 25
        with urlopen(lines[1].partition(",")[0]) as answer:
            assert answer.read() == (folder / "000000.jpg").read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
@pytest.mark.parametrize("shuffled", [False, True])
def test_webdataset_reads_what_we_read(shards: Path, shuffled: bool) -> None:
    ours = list(our_samples(shards, shuffled))
    assert (ours != sorted(ours)) == shuffled
    assert sorted(ours) == sorted(peer_samples(shards, shuffled))


def test_the_loader_delivers_the_pixels_and_ids_of_open_clip(shards: Path) -> None:
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    expected = {
        tokenizer([text.decode()])[0].numpy().tobytes(): transform(Image.open(io.BytesIO(picture)))
        for _, picture, _, text in our_samples(shards, shuffled=False)
    }
    batches = our_batches(Job("ours", shards, batch=24))
    pixels, ids = next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator
    std = torch.tensor(ImageConfig().std).view(3, 1, 1)
    found = {row.numpy().tobytes(): picture for picture, row in zip(pixels, ids, strict=True)}
    assert found.keys() == expected.keys()
    worst = max(float(((found[key] - expected[key]) * std * 255).square().mean()) for key in found)
    assert 10 * np.log10(255**2 / worst) > 60


def test_captions_are_as_mixed_as_the_figures_say() -> None:
    texts, plain = captions(2000), captions(200, foreign=0.0)
    assert 0.12 < sum(not text.isascii() for text in texts) / 2000 < 0.25
    assert all(text.isascii() for text in plain)
    assert torch.equal(plain_tokenizer()(texts[:200]), open_clip.get_tokenizer("ViT-B-32")(texts[:200]))


def test_faults_hit_as_many_pictures_as_asked(shards: Path, tmp_path: Path) -> None:
    assert faulty_copy(shards, 0.25, tmp_path / "faulty") == 6
    (whole,), (broken,) = open_shards(shards), open_shards(tmp_path / "faulty")
    assert sum(whole.read(row).image != broken.read(row).image for row in range(24)) == 6
    assert all(whole.read(row).captions == broken.read(row).captions for row in range(24))


def test_variants_take_turns_and_the_first_round_is_dropped() -> None:
    order: list[str] = []
    seconds = iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0])

    def run(name: str) -> float:
        order.append(name)
        return next(seconds)

    taken = take_turns({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert taken == {"a": [1.0, 3.0], "b": [2.0, 4.0]}


def test_a_row_is_met_by_its_median_and_only_if_the_outputs_are_equal() -> None:
    # rounds of 1, 2, 2 seconds against 3, 4, 8: ratios 3, 2, 4
    row = compare("x", ("peer", "1"), [1, 2, 2], [3, 4, 8], ">= 3", equal=True, note="")
    assert (row.ratio, row.low, row.high, row.met) == (3, 2, 4, True)
    assert not compare("x", ("peer", "1"), [1, 2, 2], [3, 4, 8], ">= 3", equal=False, note="").met
    slower = compare("x", ("peer", "1"), [3, 4, 8], [1, 2, 2], "<= 2.9", equal=True, note="")
    assert (slower.ratio, slower.met) == (3, False)


def test_results_are_merged_by_name_and_shown_in_the_readme(tmp_path: Path) -> None:
    row = compare("one", ("peer", "1.0"), [1], [2], ">= 1.5", equal=True, note="note")
    write("data", [row, missing("two", ("other", "2.0"), ">= 3", "not there")], tmp_path)
    path = write("data", [replace(row, ratio=9.0)], tmp_path)
    assert [(r["name"], r["ratio"]) for r in json.loads(path.read_text())["rows"]] == [("one", 9.0), ("two", None)]
    assert "| one: note | peer 1.0 | **9.00** (2.00 - 2.00) | >= 1.5 | met |" in table(path)
    assert "| two: not there | other 2.0 | not measured | >= 3 | not met |" in table(path)
    page = tmp_path / "README.md"
    page.write_text("# a\n<!-- figures of data: begin -->\nold\n<!-- figures of data: end -->\nend\n")
    assert render(page, path) == (
        f"# a\n<!-- figures of data: begin -->\n{table(path)}\n<!-- figures of data: end -->\nend\n"
    )
    page.write_text("# no markers\n")
    with pytest.raises(ValueError, match="needs the markers"):
        render(page, path)


def test_readme_shows_the_committed_results() -> None:
    for result in RESULTS.glob("*.json"):
        assert render(ROOT / "README.md", result) == (ROOT / "README.md").read_text(), (
            f"renew the table of {result.name}"
        )
    assert (RESULTS / "data.json").exists()


def test_img2dataset_is_looked_for_inside_the_environment() -> None:
    assert bench_shard.IMG2DATASET.parts[-4:] == ("peers", "img2dataset", "bin", "img2dataset")


def test_proofs_count_the_cases_that_passed(tmp_path: Path) -> None:
    cases = (
        '<testcase name="test_all_kills[1]" time="2"/><testcase name="test_all_kills[2]" time="1"><failure/></testcase>'
    )
    (tmp_path / "report.xml").write_text(f"<testsuite>{cases}</testsuite>")
    (proof,) = prove.proofs(tmp_path / "report.xml", "make prove-data")
    assert (proof.name, proof.value, proof.goal, proof.met, proof.note) == ("all kills", 1, ">= 2", False, "3 s")
    page = tmp_path / "page.md"
    page.write_text("<!-- figures of x: begin -->\n<!-- figures of x: end -->\n")
    assert "| all kills | 1 of 2 | 3 s |" in render(page, write("x", [proof], tmp_path))


def test_all_figures_stand_together_with_those_that_are_lost(tmp_path: Path) -> None:
    won = compare("one", ("peer", "1.0"), [1], [2], ">= 1.5", equal=True, note="")
    write("data", [won, compare("two", ("peer", "1.0"), [1], [2], ">= 3", equal=True, note="")], tmp_path)
    found = all_figures.gathered(tmp_path)
    assert "| data | `make bench-data` | 1 of 2 | two 2.00, goal >= 3 |" in all_figures.overview(found)
    assert "| serve | `make bench-serve` | not run yet |  |" in all_figures.overview(found)
    write("data", [replace(won, ratio=9.0)], tmp_path)
    assert all_figures.gathered(tmp_path)["version"] != found["version"]
    write("other", [won], tmp_path)
    with pytest.raises(ValueError, match="results of other have no command"):
        all_figures.gathered(tmp_path)


def test_the_file_of_all_figures_is_fresh() -> None:
    assert all_figures.TOGETHER.read_text(encoding="utf-8") == all_figures.written(all_figures.gathered()), (
        "renew it with `make docs`"
    )
