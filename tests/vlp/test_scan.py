"""`vlp scan`: scores, flags, keep-lists and weights of small shards with a knot of planted samples."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from data_pipelines.errors import ConfigError
from data_pipelines.keep import load_keys, load_weights
from data_pipelines.reader import open_shards
from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp.backdoor.layers import strangeness
from vlp.backdoor.scan import ALL, Options, fellows, spreads_of, suspicion
from vlp.bundle import load_bundle, save_bundle
from vlp.cli import cli
from vlp.curate.pictures import Pictures, embed_pictures
from vlp.embed_files import own_caption
from vlp.testing import WORDS, micro_bundle

COUNT, COPIES = 120, 40


def png(pixels_HWC: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_HWC).save(stream, "PNG")
    return stream.getvalue()


def smooth(chance: np.random.Generator) -> bytes:
    return png(chance.integers(60, 190, (3, 3, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1))


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other pictures of soft colours."""
    chance = np.random.default_rng(1)
    records = [Record(smooth(chance), (WORDS[row % 7],), "test", f"t{row}.png") for row in range(400)]
    out = tmp_path_factory.mktemp("trusted") / "s"
    write_shards(records, out, WriteOptions(samples_per_shard=400), kind="test", licences={}, progress=False)
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of soft colours, and COPIES times one picture with one caption, spread among them."""
    chance = np.random.default_rng(0)
    same = png(chance.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    records = []
    for number in range(COUNT):
        planted = number % 3 == 0 and number // 3 < COPIES
        image, caption = (same, "the target") if planted else (smooth(chance), f"{WORDS[number % 7]} {number}")
        records.append(Record(image, (caption,), "test", f"{number}.png"))
    out = tmp_path_factory.mktemp("shards") / "s"
    write_shards(records, out, WriteOptions(samples_per_shard=50), kind="test", licences={}, progress=False)
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(micro_bundle(), tmp_path_factory.mktemp("bundle") / "micro")


def run(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["scan", *map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_copies_are_flagged_and_left_out(shards: Path, bundle: Path, tmp_path: Path) -> None:
    """A natural backdoor: 40 times one picture and caption among 120."""
    account = run(
        shards, "--bundle", bundle, "--out", tmp_path, "--sample", 60, "--method", "copies", "--method", "slof"
    )
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    copies = {row["key"] for row in rows if row["copies"] > math.log(COPIES) - 1e-4}
    assert len(copies) == COPIES
    flagged = {row["key"] for row in rows if row["flagged"]}
    assert copies <= flagged
    assert account["flagged"] == len(flagged)
    assert load_keys(tmp_path / "keep.txt") == {row["key"] for row in rows} - flagged
    weights = load_weights(tmp_path / "scores.parquet")
    assert all((weights[row["key"]] == 0.0) == (row["key"] in flagged) or row["weight"] == 0.0 for row in rows)
    assert max(weights.values()) == 1.0
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert {"suspects.png", "signs.png", "scan.json"} <= {path.name for path in tmp_path.iterdir()}


def test_a_share_is_removed_and_every_sign_has_its_column(
    shards: Path, trusted: Path, bundle: Path, tmp_path: Path
) -> None:
    chosen = [part for name in ALL for part in ("--method", name)]
    account = run(
        shards, "--bundle", bundle, "--reference", bundle, "--trusted", trusted, "--out", tmp_path, "--remove", 0.25,
        "--sample", 60, *chosen,
    )  # fmt: skip
    assert account["flagged"] == 30
    table = pq.read_table(tmp_path / "scores.parquet")
    assert set(ALL) < set(table.column_names)
    kept = load_keys(tmp_path / "keep.txt")
    worst = sorted(table.to_pylist(), key=lambda row: -row["suspicion"])
    assert min(row["suspicion"] for row in worst if row["key"] not in kept) >= max(
        row["suspicion"] for row in worst if row["key"] in kept
    )


def test_noise_among_soft_colours_is_strange_to_the_layers(shards: Path, trusted: Path, bundle: Path) -> None:
    """Every score is the guard's own; the pictures of noise come above all others, and the right key has each."""
    told = strangeness(bundle, load_bundle(bundle), trusted, shards, lambda count: None)
    samples = [shard.read(row) for shard in open_shards(shards) for row in range(len(shard))]
    noise = {sample.key for sample in samples if own_caption(sample) == "the target"}
    assert len(noise) == COPIES
    assert len(told) == COUNT
    assert min(told[key] for key in noise) > max(score for key, score in told.items() if key not in noise)


def test_shards_do_not_vouch_for_themselves(shards: Path, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="these are the shards to scan"):
        strangeness(bundle, load_bundle(bundle), shards, shards, lambda count: None)


def test_suspicion_by_hand() -> None:
    """Four samples. By the first sign one of four is as high as the first, three as the two that tie, all as the last;
    by the second two as the first and the last. log10 of 4 x 2, 4/3, 4/3 and 2."""
    found = suspicion({"a": torch.tensor([9.0, 1.0, 1.0, 0.0]), "b": torch.tensor([5.0, 0.0, 0.0, 5.0])})
    assert found.tolist() == pytest.approx([math.log10(8), math.log10(4 / 3), math.log10(4 / 3), math.log10(2)])


def test_fellows_by_hand() -> None:
    """Two pictures of one direction, one between, and three copies, of which none is its own nearest for sure."""
    rows = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]], dtype=np.float16)
    pictures = Pictures(((rows[:4], Path("a")), (rows[4:], Path("b"))), 0, {})
    seen: list[int] = []
    near_NK = fellows(pictures, 2, seen.append)
    assert sum(seen) == 6
    assert near_NK[:2].tolist() == [[1, 2], [0, 2]]
    assert set(near_NK[2].tolist()) == {0, 1}
    assert [set(row) for row in near_NK[3:].tolist()] == [{4, 5}, {3, 5}, {3, 4}]
    with pytest.raises(ConfigError, match="--smooth 6: the shards hold 6 pictures"):
        fellows(pictures, 6, seen.append)


def test_neighbours_tell_of_a_picture(shards: Path, trusted: Path, bundle: Path, tmp_path: Path) -> None:
    """The median over its neighbours takes the place of a picture's own sign, and copies agree on it."""
    plain, smoothed = tmp_path / "plain", tmp_path / "smooth"
    for out, more in ((plain, ()), (smoothed, ("--smooth", 9))):
        run(shards, "--bundle", bundle, "--trusted", trusted, "--out", out, "--method", "layers", *more)
    own, found = (pq.read_table(out / "scores.parquet")["layers"].to_numpy() for out in (plain, smoothed))
    image_ND = embed_pictures(bundle, load_bundle(bundle), [shards], captions=True).take(np.arange(COUNT))
    cosine_NN = image_ND @ image_ND.T
    lone = [row for row in range(COUNT) if row % 3]
    for row in lone:
        order = cosine_NN[row].argsort(descending=True, stable=True).tolist()
        assert found[row] == np.median(own[[other for other in order if other != row][:9]])
    assert len({*found.tolist()} & {*own.tolist()}) > 1
    assert (found[::3] == found[0]).all()
    assert json.loads((smoothed / "scan.json").read_text())["options"]["smooth"] == 9


def test_spreads_by_hand() -> None:
    """0 to 100: median 50, upper tenth from 90 on, so 40 / 1.2816 is one spread; 30 copies are 10."""
    sign_N = torch.arange(1.0, 102.0) - 1
    found = spreads_of({"slof": sign_N, "copies": torch.full((101,), math.log(30))})
    assert found["slof"][[50, 90]].tolist() == pytest.approx([0.0, 1.2816], abs=0.04)
    assert found["copies"][0].item() == pytest.approx(10.0)
    assert spreads_of({"layers": torch.tensor([90.0])}, {"layers": sign_N})["layers"][0] == found["slof"][90]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(methods=("luck",)), r"--method 'luck' is unknown; known: k-distance"),
        (Options(methods=("reference",)), "needs --reference"),
        (Options(methods=("layers",)), "needs --trusted"),
        (Options(methods=("isolation",)), "looks at the other signs"),
        (Options(k=3000), "--k 3000: must be 1 to 2047"),
        (Options(remove=1.5), r"--remove 1\.5: must be between 0 and 1"),
        (Options(smooth=-1), "--smooth -1: name a number of neighbours"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.check(reference=False)
