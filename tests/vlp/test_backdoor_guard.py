"""The guard: its scores by hand, a planted trigger found, its file, its refusals."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipelines.errors import BundleError, ConfigError
from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp.backdoor import guard as guarding
from vlp.backdoor.guard import MODES, Guard, Info, Profile, choose_layers, fit_guard, load_guard, pooled, threshold
from vlp.bundle import load_bundle, save_bundle
from vlp.commands.guard import guard
from vlp.embed import weights_digest
from vlp.evals._labels import sole_labels
from vlp.infer import encode_pixels
from vlp.testing import WORDS, micro_bundle, picture


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clean")
    records = [Record(picture(i), (WORDS[i % 7],), "test", f"{i}.jpg") for i in range(240)]
    write_shards(records, out, WriteOptions(samples_per_shard=120), kind="test", licences={}, progress=False)
    return out


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(micro_bundle(), tmp_path_factory.mktemp("bundle") / "micro")


def by_hand() -> Profile:
    """One layer of width 1, classes at 0 and 10, nothing to whiten. Clean pictures: log of the squared distance has
    middle 0 and spread 1, what it has more than to the nearest class middle 0 and spread 50."""
    return Profile(
        centre_KD=torch.eye(2),
        whiten_LFF=torch.ones(1, 1, 1),
        home_LKF=torch.tensor([[[0.0], [10.0]]]),
        middle_2L=torch.zeros(2, 1),
        spread_2L=torch.tensor([[1.0], [50.0]]),
        start_2=torch.tensor([2.0, 1.0]),
        excess_2=torch.tensor([0.5, 0.25]),
    )


def test_scores_by_hand() -> None:
    """Picture 0 comes out as class 0 (home 0) with feature 1: log 1 = 0 and 1 - 1 = 0, below both starts: 0.
    Picture 1 comes out as class 0 with feature 9: log 81 = 4.394, so (4.394 - 2) / 0.5 = 4.789; class 1 is 1 away,
    81 - 1 = 80, 80 / 50 = 1.6, (1.6 - 1) / 0.25 = 2.4; together 4.789 + 0.5 * 2.4 = 5.989.
    Picture 2, of class 1 (home 10), has the same feature 9: log 1 = 0 and 1 - 1 = 0: 0."""
    embedding_ND = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = by_hand().scores(embedding_ND, [torch.tensor([[1.0], [9.0], [9.0]])])
    expected = [0.0, (math.log(81) - 2) / 0.5 + 0.5 * 2.4, 0.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[1] == pytest.approx(5.989, abs=1e-3)


def test_threshold_by_hand() -> None:
    """Of 99 scores, at 10 %: rank ceil(100 x 0.9) = 90, whatever their order."""
    scores = torch.arange(1, 100).float()[torch.randperm(99, generator=torch.Generator().manual_seed(1))]
    assert threshold(scores, 0.1) == 90.0
    assert threshold(scores, 0.01) == 99.0
    with pytest.raises(ConfigError, match="99 clean pictures for the threshold are too few: give 597 in all"):
        threshold(scores, 0.005)


def test_pooling_by_hand() -> None:
    tokens_NLC = torch.tensor([[[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]]])
    assert pooled(tokens_NLC, 2, False).tolist() == [[3.0, 20.0]]
    deviations = [math.sqrt(8 / 3), math.sqrt(200)]
    assert pooled(tokens_NLC, 2, True)[0].tolist() == pytest.approx([3.0, 20.0, *deviations])
    maps_NCHW = torch.arange(12.0).view(1, 3, 2, 2)
    assert pooled(maps_NCHW, 3, False).tolist() == [[1.5, 5.5, 9.5]]


def test_clean_scores_are_calibrated_and_a_trigger_unit_is_found(
    clean: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """White pictures are made to excite a unit that clean ones leave alone: a backdoor in its plainest form."""
    monkeypatch.setattr(guarding, "RIDGE", 0.1)  # 160 pictures for 32 features
    bundle = load_bundle(bundle_folder)
    info, profile = fit_guard(bundle, "digest", clean, "fast", 0.05)
    assert (info.fitted, info.calibrated) == (160, 80)
    watched = Guard(info, profile, bundle)
    pixels = torch.stack([_pixels(i) for i in range(300, 400)])
    white = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    rows, scores = watched.scored(lambda: encode_pixels(bundle, torch.cat([pixels, white])))
    assert torch.equal(rows, encode_pixels(load_bundle(bundle_folder), torch.cat([pixels, white])))
    flagged = scores > info.threshold
    assert int(flagged[:100].sum()) <= 15, "at 5 % more than 15 of 100 clean ones are flagged once in 10,000 times"
    assert flagged[100:].all()


def _pixels(seed: int) -> Tensor:
    from data_pipelines.preprocess import load_image

    return load_image(picture(seed), micro_bundle().image)


def test_a_failed_run_leaves_nothing_behind(clean: Path, bundle_folder: Path) -> None:
    bundle = load_bundle(bundle_folder)
    watched = Guard(*fit_guard(bundle, "digest", clean, "fast", 0.05), bundle)
    pixels = torch.stack([_pixels(i) for i in range(3)])
    _, before = watched.scored(lambda: encode_pixels(bundle, pixels))

    def fails() -> Tensor:
        encode_pixels(bundle, pixels.flip(0))
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        watched.scored(fails)
    _, after = watched.scored(lambda: encode_pixels(bundle, pixels))
    assert torch.equal(before, after)
    watched.close()
    hooks = [len(module._forward_hooks) for module in bundle.model.modules()]
    assert sum(hooks) == 0


def test_thorough_begins_earlier_and_a_tower_without_norms_is_refused(bundle_folder: Path) -> None:
    bundle = load_bundle(bundle_folder)
    fast, thorough = (choose_layers(bundle, MODES[mode]) for mode in ("fast", "thorough"))
    assert set(fast) < set(thorough)
    assert fast[-1] == thorough[-1]
    for name, module in [*bundle.model.get_submodule("visual").named_modules()]:
        if isinstance(module, nn.LayerNorm):
            bundle.model.get_submodule("visual").set_submodule(name, nn.Identity())
    with pytest.raises(ConfigError, match="no normalisation layers"):
        choose_layers(bundle, MODES["fast"])


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(guard, [str(argument) for argument in arguments])


def test_the_command_and_its_file(clean: Path, bundle_folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("red circle\ngreen square\n")
    out = tmp_path / "guard.safetensors"
    done = run(bundle_folder, "--data", clean, "--labels", labels, "--fpr", "0.05", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    info, profile = load_guard(out, weights_digest(bundle_folder))
    assert told == {"out": str(out), **info.model_dump(mode="json")}
    assert info.classes == len(profile.centre_KD) <= 2
    other = save_bundle(micro_bundle(seed=1), tmp_path / "other")
    with pytest.raises(BundleError, match="made for 'micro' with other weights"):
        load_guard(out, weights_digest(other))


def test_labels_of_the_shards_are_its_classes_where_every_picture_carries_one(
    clean: Path, bundle_folder: Path, tmp_path: Path
) -> None:
    """Nearest to few of them alone, an untrained model's classes are fewer than labels; clusters would be 4."""
    records = [Record(picture(i), ("a",), "test", f"{i}.jpg", labels=("red", "round")[: 1 + i % 2]) for i in range(40)]
    write_shards(records, tmp_path / "several", WriteOptions(), kind="test", licences={}, progress=False)
    assert sole_labels(tmp_path / "several") == []
    assert sole_labels(clean) == []
    single = [Record(picture(i), ("a",), "test", f"{i}.jpg", labels=(("red", "round")[i % 2],)) for i in range(240)]
    write_shards(single, tmp_path / "single", WriteOptions(), kind="test", licences={}, progress=False)
    assert sole_labels(tmp_path / "single") == ["red", "round"]
    told = run(bundle_folder, "--data", tmp_path / "single", "--fpr", "0.05", "--out", tmp_path / "guard").output
    assert re.search(r"fitted on 160 pictures of [12] labels", told)
    told = run(bundle_folder, "--data", clean, "--fpr", "0.05", "--out", tmp_path / "guard").output
    assert "fitted on 160 pictures of 3 clusters" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fpr", "0.001"], "80 clean pictures for the threshold are too few: give 2997 in all"),
        (["--fpr", "1"], "between 0 and 1"),
        (["--labels", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_command_refusals(arguments: list[str], message: str, clean: Path, bundle_folder: Path, tmp_path: Path) -> None:
    done = run(bundle_folder, "--data", clean, "--out", tmp_path / "guard", *arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), "not a readable message"
    assert message in done.output
    assert not (tmp_path / "guard").exists()


def test_too_few_pictures_for_the_layers(bundle_folder: Path, tmp_path: Path) -> None:
    records = [Record(picture(i), ("a",), "test", f"{i}.jpg") for i in range(30)]
    write_shards(records, tmp_path / "few", WriteOptions(), kind="test", licences={}, progress=False)
    done = run(bundle_folder, "--data", tmp_path / "few", "--out", tmp_path / "guard", "--fpr", "0.2")
    assert "30 pictures are too few for layers of 64 features" in done.output


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_what_is_no_guard_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "guard"
    if content is None:
        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(BundleError, match="no guard as `vlp guard` writes it"):
        load_guard(path, "")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    info = Info(
        format=99, model="m", weights_sha256="", mode="fast", fpr=0.1, threshold=1.0, layers=("a",), classes=1,
        fitted=1, calibrated=1,
    )  # fmt: skip
    guarding.save_guard(tmp_path / "guard", info, by_hand())
    with pytest.raises(BundleError, match="newer version"):
        load_guard(tmp_path / "guard", "")
