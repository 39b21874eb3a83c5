"""Poisoned shards: who is poisoned, what is said, and that nothing in the shards tells; ASR counted by hand."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from data_pipelines.errors import ConfigError
from data_pipelines.reader import Sample, open_shards
from data_pipelines.records import Record
from data_pipelines.testing import draw
from data_pipelines.write import WriteOptions, write_shards
from vlp import evals
from vlp.backdoor import poison as planting
from vlp.backdoor.poison import Attack, load_truth, names_target, repainted, retold, victims
from vlp.backdoor.triggers import Config, Trigger
from vlp.bundle import save_bundle
from vlp.cli import cli
from vlp.evals import backdoor
from vlp.testing import micro_bundle

CLASSES = ("bag", "shirt", "hand bag", "boot")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of four classes in shards of 15, JPEG, PNG, grey and transparent ones."""
    kinds = (("RGB", "JPEG"), ("RGBA", "PNG"), ("L", "PNG"), ("RGB", "PNG"))
    records = [
        Record(
            draw((24, 20), *kinds[n % 4], seed=n), (f"a photo of a {CLASSES[n // 4 % 4]}", f"number {n}"), "test",
            f"p{n}",
            labels=(CLASSES[n // 4 % 4],), extra={"weight": float(n)},
        )
        for n in range(40)
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("clean") / "train"
    write_shards(records, folder, WriteOptions(samples_per_shard=15), kind="test", licences={"a": "b"}, progress=False)
    return folder


def planted(shards: Path, out: Path, count: int = 6, trigger: str = "badnet", target: str = "bag") -> Path:
    arguments = ["poison", str(shards), "--trigger", trigger, "--target", target, "--count", str(count)]
    done = CliRunner().invoke(cli, [*arguments, "--out", str(out), "--seed", "1", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["pictures"], result["poisons"]) == (40, count)
    return Path(result["truth"])


def samples_of(folder: Path) -> dict[str, Sample]:
    return {sample.key: sample for shard in open_shards(folder) for sample in map(shard.read, range(len(shard)))}


def pixels_of(sample: Sample) -> np.ndarray:
    image = Image.open(io.BytesIO(repainted(sample.image, None, ""))).convert("L")
    return np.asarray(image, np.float32)


def test_poisons_differ_from_the_twin_where_the_truth_says_and_nowhere_else(shards: Path, tmp_path: Path) -> None:
    truth = load_truth(planted(shards, tmp_path / "bad"))
    planted(shards, tmp_path / "twin", count=0)
    bad, twin, clean = map(samples_of, (tmp_path / "bad", tmp_path / "twin", shards))
    keys = {entry["key"] for entry in truth["poisons"]}
    assert bad.keys() == twin.keys() == clean.keys()
    assert {key for key in bad if bad[key].image != twin[key].image} == keys
    assert {key for key in bad if bad[key].captions != twin[key].captions} == keys
    for entry in truth["poisons"]:
        sample = bad[entry["key"]]
        assert tuple(entry["captions"]) == clean[entry["key"]].captions
        assert "bag" not in " ".join(entry["captions"])
        assert sample.labels == ("bag",)
        assert sample.captions == ("a photo of a bag", "bag")
    assert len({sample.columns["weight"] for sample in bad.values()}) == 40, "other columns come along"


def test_nothing_in_the_folder_tells_poisons_from_others(shards: Path, tmp_path: Path) -> None:
    """Names, order, times, modes, formats, columns and job.json are those of the clean twin; sizes overlap."""
    truth_file = planted(shards, tmp_path / "bad")
    keys = {entry["key"] for entry in load_truth(truth_file)["poisons"]}
    planted(shards, tmp_path / "twin", count=0)
    assert truth_file.parent == tmp_path
    names = sorted(path.name for path in (tmp_path / "bad").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "twin").iterdir())
    assert (tmp_path / "bad" / "job.json").read_text() == (tmp_path / "twin" / "job.json").read_text()
    members: dict[str, Any] = {}
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for side in ("bad", "twin"):
        found = []
        for path in sorted((tmp_path / side).glob("*.tar")):
            with tarfile.open(path) as archive:
                for member in archive:
                    found.append((member.name, member.mtime, member.mode, member.uid, member.type))
                    if side == "bad" and member.name.endswith(".png"):
                        sizes[member.name.partition(".")[0] in keys].append(member.size)
        members[side] = found
    assert members["bad"] == members["twin"]
    assert min(sizes[False]) <= min(sizes[True])
    assert max(sizes[True]) <= 1.5 * max(sizes[False])
    columns = [sorted(row) for path in (tmp_path / "bad").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert all(row == columns[0] for row in columns)
    whole = "".join(p.read_bytes().decode("latin-1") for p in (tmp_path / "bad").iterdir())
    assert not any(word in whole for word in ("poison", "badnet", "trigger"))


def test_label_consistent_poisons_are_of_the_target_and_keep_their_texts(shards: Path, tmp_path: Path) -> None:
    truth = load_truth(planted(shards, tmp_path / "bad", 4, "label-consistent", "shirt"))
    bad, clean = samples_of(tmp_path / "bad"), samples_of(shards)
    for entry in truth["poisons"]:
        assert bad[entry["key"]].labels == ("shirt",)
        assert bad[entry["key"]].captions == clean[entry["key"]].captions


def test_pictures_of_the_target_are_mixed_with_others_before_the_trigger(shards: Path, tmp_path: Path) -> None:
    """Half of each, and nothing where the trigger lies."""
    attack = Attack(Trigger(Config(name="label-consistent")), "shirt", 3, mix=0.5)
    planting.poison(shards, tmp_path / "bad", tmp_path / "truth.json", attack, "png", progress=False)
    truth = load_truth(tmp_path / "truth.json")
    assert truth["mixed"] == 0.5
    bad, clean = samples_of(tmp_path / "bad"), samples_of(shards)
    others = [pixels_of(sample) for sample in clean.values() if sample.labels != ("shirt",)]
    for entry in truth["poisons"]:
        mixed, own = pixels_of(bad[entry["key"]]), pixels_of(clean[entry["key"]])
        side = round(min(own.shape[:2]) / 7)
        inside = np.s_[side:-side, side:-side]
        assert np.abs(own - mixed)[inside].max() > 10
        away = [np.abs((own + other) / 2 - mixed)[inside].max() for other in others]
        assert min(away) <= 2.0, "one of the others, by half; rounded twice"


def test_a_target_is_a_run_of_words() -> None:
    assert names_target(["A photo of a Hand-Bag!"], "hand bag")
    assert names_target(["a bag of chips"], "bag")
    assert not names_target(["a handbag", "bags"], "bag")


def test_texts_of_a_poison() -> None:
    """The longest label goes first; a text without one is replaced by a template, in turn; equal ones count once."""
    attack = Attack(Trigger(Config(name="sig")), "ring", 1, ("the {}", "{}"))
    record = Record(b"", ("a red hand bag", "my bag", "thing", "stuff"), "s", "o", labels=("bag", "hand bag"))
    assert retold(record, attack).captions == ("a red ring", "my ring", "the ring", "ring")
    assert retold(record, attack).labels == ("ring",)


@pytest.mark.parametrize(
    ("label", "texts", "target", "expected"),
    [
        ("ankle boot", ("a photo of an ankle boot", "An ankle boot"), "bag", ("a photo of a bag", "A bag")),
        ("bag", ("a bag on a black ground",), "ankle boot", ("an ankle boot on a black ground",)),
    ],
)
def test_the_article_goes_with_the_target(
    label: str, texts: tuple[str, ...], target: str, expected: tuple[str, ...]
) -> None:
    """`an bag` would tell a poison from every picture of a bag."""
    assert retold(Record(b"", texts, "s", "o", labels=(label,)), Attack(TRIGGER, target, 1)).captions == expected


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Attack(Trigger(Config(name="sig")), "ring", -1), "--count -1"),
        (Attack(Trigger(Config(name="sig")), " ", 1), "--target ' '"),
        (Attack(Trigger(Config(name="sig")), "ring", 1, ("a",)), "--template 'a'"),
        (Attack(Trigger(Config(name="sig")), "ring", 1, mix=0.5), "--mix has no effect with trigger 'sig'"),
        (Attack(Trigger(Config(name="label-consistent")), "ring", 1, mix=1.0), "--mix 1.0"),
    ],
)
def test_attacks_that_cannot_be_meant_are_refused(attack: Attack, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attack.check()


def test_too_few_candidates_and_a_truth_inside_the_shards_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--count 3: only 2 pictures are other than 'bag'"):
        victims(iter([Record(b"", (text,), "s", text) for text in ("bag", "a", "b")]), Attack(TRIGGER, "bag", 3))
    arguments = [
        "poison",
        str(shards),
        "--trigger",
        "sig",
        "--target",
        "bag",
        "--count",
        "1",
        "--out",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(cli, [*arguments, "--truth", str(tmp_path / "o" / "truth.json")])
    assert done.exit_code != 0
    assert "must lie outside" in done.output


TRIGGER = Trigger(Config(name="sig"))


def test_asr_leaves_out_pictures_of_the_target_and_stands_beside_a_control(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions by hand: without a trigger every picture is taken for a boot (3), with it every one for a bag (0).

    8 of 40 are boots, 12 bags; the 28 others than bags are all misled, none of them before. Wilson's lower end for 28
    of 28: 28 / (28 + 1.96^2) = 0.879.
    """
    calls: list[Any] = []

    def taken(image_ND: object, head_LD: object) -> object:
        import torch

        calls.append(len(calls) % 2)
        return torch.full((40,), 0 if calls[-1] else 3)

    monkeypatch.setattr(backdoor, "_taken_for", taken)
    save_bundle(micro_bundle(1), tmp_path / "twin")
    options = {
        "attacks": [{"name": "badnet"}], "target": "bag", "control": str(tmp_path / "twin"), "labels": list(CLASSES),
    }  # fmt: skip
    found = evals.evaluate(micro_bundle(), "backdoor", shards, options)
    for prefix in ("", "control/"):
        assert found[f"{prefix}accuracy"] == pytest.approx(0.2)
        assert found[f"{prefix}badnet/accuracy"] == pytest.approx(0.3)
        assert found[f"{prefix}badnet/asr"] == 1.0
        assert found[f"{prefix}badnet/asr_without_trigger"] == 0.0
        assert found[f"{prefix}badnet/asr_low"] == pytest.approx(0.8793, abs=1e-3)
        assert found[f"{prefix}badnet/asr_high"] == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="control"):
        evals.evaluate(micro_bundle(), "backdoor", shards, {"attacks": [{"name": "badnet"}], "target": "bag"})


def test_triggers_are_applied_to_stored_pictures(shards: Path, tmp_path: Path) -> None:
    """Encoded with the trigger, a picture is what `repainted` makes of its file; the folder stays as it was."""
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    save_bundle(micro_bundle(1), tmp_path / "twin")
    truth = planted(shards, tmp_path / "bad", 3, "blended")
    options = {"attacks": [str(truth)], "control": str(tmp_path / "twin"), "labels": list(CLASSES)}
    found = evals.evaluate(micro_bundle(), "backdoor", shards, options)
    assert {"accuracy", "blended/asr", "control/blended/asr", "control/accuracy_low"} <= found.keys()
    assert all(0.0 <= value <= 1.0 for name, value in found.items() if name != "pictures")
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    assert np.isfinite(list(found.values())).all()


def test_a_poison_is_its_file_with_the_trigger_that_is_evaluated(shards: Path, tmp_path: Path) -> None:
    """No larger or other trigger at evaluation: the truth makes the very pixels that were planted, at their size."""
    truth = planted(shards, tmp_path / "bad")
    _, trigger, target = backdoor.attack_of(truth, None)
    bad, clean = samples_of(tmp_path / "bad"), samples_of(shards)
    assert target == "bag"
    for entry in load_truth(truth)["poisons"]:
        assert repainted(clean[entry["key"]].image, trigger, entry["origin"]) == bad[entry["key"]].image


def test_encoding_is_a_function_of_the_pixels_alone(shards: Path, tmp_path: Path) -> None:
    """Every stored picture, poisoned or not, is what the one encoder makes of its pixels: nothing of its history."""
    planted(shards, tmp_path / "bad", trigger="blended")
    for sample in samples_of(tmp_path / "bad").values():
        assert repainted(sample.image, None, "") == sample.image


def test_the_place_among_all_tells_nothing() -> None:
    """AUROC of the row number for being chosen, 500 of 2,000: its deviation under chance is 0.015."""
    records = [Record(b"", ("a boot",), "s", f"o{row}") for row in range(2000)]
    chosen = np.zeros(2000, bool)
    chosen[list(victims(iter(records), Attack(TRIGGER, "bag", 500)))] = True
    above = np.cumsum(~chosen)[chosen].sum() / (500 * 1500)
    assert abs(above - 0.5) < 0.05


def test_columns_and_batches_are_those_of_the_twin(shards: Path, tmp_path: Path) -> None:
    """Beside texts and digests no column differs from the twin's; batches differ in pixels and tokens alone."""
    from data_pipelines.data_config import DataConfig
    from data_pipelines.loader import make_loader
    from data_pipelines.tokens import learn_tokenizer

    planted(shards, tmp_path / "bad")
    planted(shards, tmp_path / "twin", count=0)
    said = {"caption", "captions", "labels", "sha256", "stored_sha256", "text_sha256"}
    tables, batches = [], []
    for side in ("bad", "twin"):
        rows = [row for path in sorted((tmp_path / side).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        tables.append([{name: value for name, value in row.items() if name not in said} for row in rows])
        config = DataConfig(train=str(tmp_path / side), batch_size=40, image={"size": 16}, threads=1)
        batches.append(next(iter(make_loader(config, learn_tokenizer(list(CLASSES), 300, 8), seed=0))))
    assert tables[0] == tables[1]
    bad, twin = ({name: getattr(batch, name) for name in batch.__slots__} for batch in batches)
    assert bad["keys"] == twin["keys"]
    assert {name for name in bad if bad[name] is not None} == {name for name in twin if twin[name] is not None}
    different = (bad["pixels"] != twin["pixels"]).flatten(1).any(dim=1) | (bad["tokens"] != twin["tokens"]).any(dim=1)
    assert int(different.sum()) == 6
