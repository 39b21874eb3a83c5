"""The calculator against runs that others published and figures that were measured here, and its arithmetic by hand."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_pipelines.errors import ConfigError
from vlp import scale
from vlp.cli import cli
from vlp.flops import TERAFLOPS
from vlp.scale import Job

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"
LAION = 32 * 407_332_084
"""Samples of LAION-400M in 32 epochs, by trained_models_info.csv of github.com/LAION-AI/scaling-laws-openclip."""
PUBLISHED = (
    # model, GPUs, batch of a GPU, GFLOP per sample, checkpointing (None: not said), GPU hours per sample. Hours:
    # docs/PRETRAINED.md of github.com/mlfoundations/open_clip; samples per second: the CSV above; A100 of 40 GB
    ("ViT-B-32", 128, 256, 44.33, False, 4_600 / LAION),
    ("ViT-B-16", 176, 192, 123.26, False, 10_700 / LAION),
    ("ViT-B-16-plus-240", 224, 160, 192.08, None, 13_620 / LAION),
    ("ViT-L-14", 400, 96, 525.98, True, 50_800 / LAION),
    ("ViT-L-14", 768, 112, 525.98, True, 768 / 60_327.9 / 3600),
    ("ViT-B-16", 344, 256, 123.26, None, 344 / 136_370.9 / 3600),
    ("ViT-H-14", 824, 96, 1145.04, True, 824 / 34_608 / 3600),
    ("ViT-g-14", 800, 80, 1743.46, True, 800 / 24_800 / 3600),
)
COUNTED = {(model, share, gflop, again) for model, _, share, gflop, again, _ in PUBLISHED if again is not None}


@pytest.mark.parametrize(("model", "gpus", "share", "gflop", "again", "hours"), PUBLISHED)
def test_published_runs_of_open_clip_within_a_quarter(
    model: str, gpus: int, share: int, gflop: float, again: bool | None, hours: float
) -> None:
    """A forward pass more under activation checkpointing, which is a third; those that do not say did without."""
    needs = scale.Cost(int(gflop * 1e9), int(gflop * 1e9 * (4 / 3 if again else 1)), 1, 1, 1, bool(again))
    job = Job(LAION, model, gpus, "A100", gpus * share)
    assert gpus / scale.rate(job, needs)[0] / 3600 == pytest.approx(hours, rel=0.25)


@pytest.mark.parametrize(
    ("model", "share", "gflop", "again"),
    [pytest.param(*row, marks=[] if row[0] == "ViT-B-32" else pytest.mark.slow) for row in sorted(COUNTED)],
)
def test_flops_are_counted_and_memory_decides_on_checkpointing_as_people_did(
    model: str, share: int, gflop: float, again: bool
) -> None:
    needs = scale.cost(Job(1, model, 8, "A100", 8 * share, memory_gb=40))
    assert (round(needs.flops / 1e9, 2), needs.checkpointing) == (gflop, again)


def measured(row: str, pattern: str) -> float:
    """A number in the note of a measured row."""
    files = [json.loads((RESULTS / name).read_text()) for name in ("data.json", "train.json")]
    rows = {r["name"]: r for file in files for r in file["rows"]}
    found = re.search(pattern, rows[row]["note"])
    assert found, rows[row]["note"]
    return float(found[1])


def test_constants_are_what_was_measured_here_on_two_cores() -> None:
    assert scale.DECODE["shard"] == pytest.approx(measured("loader_256", r", (\d+) img/s") / 2, rel=0.25)
    assert scale.DECODE["original"] == pytest.approx(measured("loader_640", r", (\d+) img/s") / 2, rel=0.25)
    assert measured("shard_img2dataset", r", (\d+)/s") / 2 == pytest.approx(scale.SHARDING, rel=0.25)


def test_a_small_run_on_two_cores_within_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row `speed`: two cores of 0.2 TFLOP/s in bfloat16, texts of 25 tokens on average.

    A step of ViT-B/32 takes 0.55 of a core's peak: 7.72 samples/s of 32 GFLOP with trimmed texts, 450 GFLOP/s there.
    """
    from bench_runs import SMALL_VIT

    monkeypatch.setattr(scale, "resolve_config", lambda config: SMALL_VIT)
    job = Job(images=10_000, gpus=2, batch=64, teraflops=0.2, memory_gb=8, mfu=0.55, text_length=25)
    assert scale.rate(job, scale.cost(job))[0] == pytest.approx(measured("speed", r"(\d+) samples/s"), rel=0.25)


def test_an_index_as_large_as_the_one_that_was_measured() -> None:
    """100,000 x 512 in Qdrant Edge with int8 copies: a folder of 313 to 326 MB."""
    memory, disk = scale.index_bytes(100_000, 512)
    assert memory == 100_000 * (512 + 128)
    assert disk == pytest.approx(320e6, rel=0.05)


def test_every_figure_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 1 TFLOP per sample on 2 devices of 100 TFLOP/s at a half: 100 samples/s.

    360,000 samples: an hour, 2 GPU hours at 3 $. 1,000 pairs of 10 kB: 10 MB, read at 1 MB/s.
    """
    needs = scale.Cost(10**12, 10**12, 10**9, 512, 3 * 10**9, False)
    monkeypatch.setattr(scale, "cost", lambda job: needs)
    job = Job(
        1_000, gpus=2, batch=64, samples=360_000, teraflops=100, memory_gb=4, mfu=0.5, sample_bytes=10_000, price=3
    )
    found = {figure.name: figure.value for figure in scale.plan(job)}
    assert found["samples per second"] == 100
    assert found["training time"] == pytest.approx(1 / 24)
    assert (found["GPU hours"], found["price of the GPUs"]) == (2, 6)
    assert (found["memory of a GPU"], found["a checkpoint"]) == (3, 12)
    assert found["storage of the shards"] == 1e-5
    assert found["reading from the store"] == 1e-3
    assert found["cores to decode"] == 1
    assert found["price of the storage"] == pytest.approx(0.01 * 0.023)
    tight = scale.plan(Job(1_000, gpus=2, batch=64, teraflops=100, memory_gb=2, mfu=0.5))
    assert "DOES NOT FIT" in next(line.assumption for line in tight if line.name == "memory of a GPU")


def test_the_curve_falls_to_half_where_it_should() -> None:
    """42.5 GFLOP at 0.20 x 1/2 of 311.9 TFLOP/s: 733.9 samples/s."""
    needs = scale.Cost(int(scale.HALF), int(scale.HALF), 1, 1, 1, False)
    assert scale.rate(Job(1, gpus=1, gpu="a100"), needs)[0] == pytest.approx(311.9e12 * 0.1 / 42.5e9)


def test_numbers_as_people_write_them() -> None:
    assert [scale.count(text) for text in ("400M", "2.3b", "12k", "5e6", "7")] == [
        400_000_000, 2_300_000_000, 12_000, 5_000_000, 7,
    ]  # fmt: skip
    for wrong in ("", "M", "many", "-3", "nan", "inf", "0"):
        with pytest.raises(ConfigError, match="400M"):
            scale.count(wrong)


def test_the_command_prints_each_figure_with_what_it_assumes() -> None:
    arguments = ["plan", "--images", "12M", "--gpus", "8", "--gpu", "a100", "--batch", "2048", "--epochs", "30"]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.strip().splitlines()[-1])["figures"]
    assert figures["samples seen"]["value"] == 360_000_000
    assert all(figure["assumption"] for figure in figures.values())
    assert "published runs" in figures["samples per second"]["assumption"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h900"], ["h900", "H100", "--teraflops"]),
        (["--gpus", "7"], ["32768", "7 GPUs"]),
        (["--epochs", "2", "--samples-seen", "3M"], ["one of them"]),
        (["--model", "ViT-Q-1"], ["ViT-Q-1", "ViT-B-32"]),
        (["--text-length", "99"], ["99", "1 to 77"]),
    ],
)
def test_options_that_make_no_sense_are_named(arguments: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(cli, ["plan", "--images", "12M", *arguments])
    assert result.exit_code == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_every_listed_gpu_has_its_memory() -> None:
    assert set(scale.MEMORY) == set(scale.gpus()) == set(TERAFLOPS)
