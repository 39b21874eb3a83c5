"""The loader on real shards: content, captions, resume, ranks, bad samples."""

import io
import itertools
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from data_pipelines.augment import AugmentConfig
from data_pipelines.batch import Batch
from data_pipelines.captions import CaptionConfig, choose_phrases, compose, pad_ids, phrase_id
from data_pipelines.errors import ConfigError, MissingField, PipelineError
from data_pipelines.loader import DataConfig, Loader
from data_pipelines.preprocess import ImageConfig, load_image
from data_pipelines.shard_set import ShardSet
from data_pipelines.testing import draw
from data_pipelines.tokens import Tokenizer, learn_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn_tokenizer(["red apple", "face", "tool", "animal"], vocab_size=400, context_length=16)


def config(folder: Path, **changes: object) -> DataConfig:
    settings = {
        "train": folder, "batch_size": 32, "image": ImageConfig(size=32, resize="longest"),
        "augment": AugmentConfig(flip=0.5, rotate=10, brightness=0.2),
        "captions": CaptionConfig(alternative=0.2, labels=0.2, with_labels=0.2),
    }  # fmt: skip
    return DataConfig.model_validate({**settings, **changes})


def same(left: Batch, right: Batch) -> bool:
    return (
        left.keys == right.keys
        and torch.equal(left.pixels, right.pixels)
        and torch.equal(left.tokens, right.tokens)
        and torch.equal(left.require("phrase_ids", "test"), right.require("phrase_ids", "test"))
        and torch.equal(left.require("text_phrase_ids", "test"), right.require("text_phrase_ids", "test"))
    )


def test_pictures_and_captions_stay_together(starter_shards: Path, tokenizer: Tokenizer) -> None:
    plain = config(starter_shards / "val", augment=AugmentConfig(), captions=CaptionConfig())
    stored = ShardSet(plain.train)
    samples = {sample.key: sample for sample in map(stored.read, range(len(stored)))}
    loader = Loader(plain, tokenizer, seed=0)
    seen = set()
    for batch in itertools.islice(loader, loader.plan.steps):
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.pixels[row], load_image(samples[key].image, plain.image))
            assert torch.equal(batch.tokens[row : row + 1], tokenizer(samples[key].captions[:1]))
            seen.add(key)
    assert len(seen) == loader.plan.steps * 32


def test_resume_continues_with_the_very_same_batches(starter_shards: Path, tokenizer: Tokenizer) -> None:
    whole = list(itertools.islice(Loader(config(starter_shards / "val"), tokenizer, seed=7), 24))
    first = Loader(config(starter_shards / "val"), tokenizer, seed=7)
    list(itertools.islice(first, 17))
    assert first.state_dict()["step"] == 17
    second = Loader(config(starter_shards / "val", threads=1, cache_mb=0), tokenizer, seed=7)
    second.load_state_dict(first.state_dict())
    assert all(same(a, b) for a, b in zip(whole[17:], itertools.islice(second, 7), strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_the_global_batch(starter_shards: Path, tokenizer: Tokenizer, world: int) -> None:
    whole = next(iter(Loader(config(starter_shards / "val"), tokenizer, seed=1)))
    parts = [next(iter(Loader(config(starter_shards / "val"), tokenizer, 1, rank, world))) for rank in range(world)]
    assert sum((part.keys for part in parts), ()) == whole.keys
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)


def test_a_state_of_other_batches_is_refused_with_the_difference(starter_shards: Path, tokenizer: Tokenizer) -> None:
    state = Loader(config(starter_shards / "val"), tokenizer, seed=7).state_dict()
    changes: dict[str, tuple[dict[str, object], str]] = {
        "batch_size": ({"batch_size": 16}, "batch_size: checkpoint 32, now 16"),
        "partitions": ({"partitions": 4}, "partitions: checkpoint 1, now 4"),
        "sources": ({"sources": {"google": 1}}, r"sources.google: checkpoint None, now 1"),
        "image": ({"image": ImageConfig(size=48, resize="longest")}, "image.size: checkpoint 32, now 48"),
        "captions": ({"captions": CaptionConfig()}, "captions.labels: checkpoint 0.2, now 0.0"),
        "augment": ({"augment": AugmentConfig(flip=0.5)}, "augment.rotate: checkpoint 10.0, now 0.0"),
        "mixture": ({"train": {str(starter_shards / "val"): 1, str(starter_shards / "train"): 2}}, "mixture"),
    }
    for change, message in changes.values():
        with pytest.raises(ConfigError, match=message):
            Loader(config(starter_shards / "val", **change), tokenizer, seed=7).load_state_dict(state)
    Loader(config(starter_shards / "val", threads=3, max_bad_share=0.5), tokenizer, seed=7).load_state_dict(state)
    with pytest.raises(ConfigError, match="seed: checkpoint 7, now 8"):
        Loader(config(starter_shards / "val"), tokenizer, seed=8).load_state_dict(state)
    with pytest.raises(ConfigError, match="data"):
        Loader(config(starter_shards / "unseen_vendor"), tokenizer, seed=7).load_state_dict(state)


def test_sources_select_and_unknown_sources_are_refused(starter_shards: Path, tokenizer: Tokenizer) -> None:
    loader = Loader(config(starter_shards / "val", sources={"google": 1}), tokenizer, seed=0)
    assert loader.plan.samples == len(ShardSet(starter_shards / "val")) / 2
    with pytest.raises(PipelineError, match="nobody"):
        Loader(config(starter_shards / "val", sources={"nobody": 1}), tokenizer, seed=0)


def write_bad(folder: Path, good: int, bad: int) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(good + bad):
            image = draw((64, 64), format="JPEG", seed=number)
            image = image[: len(image) - 200] if number < bad else image
            for name, content in ((f"{number:04}.jpg", image), (f"{number:04}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def test_bad_samples_are_counted_and_their_places_filled(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = Loader(config(write_bad(tmp_path / "few", 38, 2), batch_size=20), tokenizer, seed=0)
    batches = list(itertools.islice(loader, 4))
    assert [len(batch.keys) for batch in batches] == [20] * 4, "every rank holds equally many, whatever is bad"
    assert not {"0000", "0001"} & {key for batch in batches for key in batch.keys}
    report = loader.ledger.report()
    assert (report["seen"], report["trained"], report["substituted"]) == (80, 76, 4)
    assert report["quarantined"] == {"truncated_image": 4}
    assert [(entry["epoch"], entry["shard"], entry["seen"], entry["trained"]) for entry in report["epochs"]] == [
        (0, "few/0.tar", 40, 38),
        (1, "few/0.tar", 40, 38),
    ]
    with tarfile.open(tmp_path / "few" / "0.tar") as tar:
        offsets = {info.name: info.offset_data for info in tar.getmembers()}
    found = {(item["shard"], item["key"], item["offset"], item["reason"]) for item in report["samples"]}
    assert found == {("few/0.tar", f"000{n}", offsets[f"000{n}.jpg"], "truncated_image") for n in range(2)}


def test_substitutes_are_the_same_for_any_number_of_ranks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = write_bad(tmp_path / "few", 50, 10)
    whole = Loader(config(folder, batch_size=20), tokenizer, seed=0)
    halves = [Loader(config(folder, batch_size=20), tokenizer, 0, rank, 2) for rank in range(2)]
    for left, right, expected in itertools.islice(zip(*halves, whole, strict=True), 5):
        assert left.keys + right.keys == expected.keys
        assert torch.equal(torch.cat([left.pixels, right.pixels]), expected.pixels)
        assert len(left.keys) == len(right.keys)
    assert whole.ledger.substituted


def test_too_many_bad_samples_stop_the_job(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = write_bad(tmp_path / "many", 20, 120)
    loader = Loader(config(folder, batch_size=20, max_bad_share=0.5), tokenizer, seed=0)
    with pytest.raises(PipelineError, match="truncated_image"):
        list(itertools.islice(loader, 200))


def test_more_than_one_percent_of_bad_samples_stop_the_job(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = write_bad(tmp_path / "some", 294, 6)
    patient = Loader(config(folder, batch_size=100, max_bad_share=0.05), tokenizer, seed=0)
    assert len(list(itertools.islice(patient, 12))) == 12
    assert patient.ledger.quarantined.total() == 24
    strict = Loader(config(folder, batch_size=100), tokenizer, seed=0)
    with pytest.raises(
        PipelineError, match=r"of 1[01]\d\d samples could not be used.*limit of 1\.0%.*last: .*Premature"
    ):
        list(itertools.islice(strict, 12))


def test_a_failing_loader_ends_its_thread_and_raises_here(
    starter_shards: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "val"
    shutil.copytree(starter_shards / "val", folder)
    loader = Loader(config(folder), tokenizer, seed=0)
    loader.plan = None  # type: ignore[assignment]  # whatever goes wrong in the thread must surface in the consumer
    with pytest.raises(AttributeError):
        next(iter(loader))


def test_a_data_set_of_one_sample_trains(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = Loader(config(write_bad(tmp_path / "one", 1, 0), batch_size=1, threads=4), tokenizer, seed=0)
    assert [batch.keys for batch in itertools.islice(loader, 3)] == [("0000",)] * 3
    with pytest.raises(ConfigError, match="2 ranks"):
        Loader(config(tmp_path / "one", batch_size=1), tokenizer, 0, 1, 2)


def test_caption_shares_are_what_the_config_says() -> None:
    captions, labels = ("own", "other"), ("a", "b", "c")
    settings = CaptionConfig(alternative=0.2, labels=0.3, with_labels=0.1, max_labels=2, prompt="a {}")
    numbers = np.random.default_rng(0).random((4000, 3))
    texts = [compose(choose_phrases(captions, labels, settings, row), settings) for row in numbers]
    assert all(text.startswith("a ") for text in texts)
    own = sum(text == "a own" for text in texts) / len(texts)
    assert abs(own - (0.4 + 0.1)) < 0.03, "0.4 left over, and half of the alternatives are the own caption"
    assert abs(sum(text.startswith("a own, ") for text in texts) / len(texts) - 0.1) < 0.02
    assert {"a a", "a b, c", "a c, b"} <= set(texts)


def test_too_large_caption_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        CaptionConfig(labels=0.8, alternative=0.3)


def test_phrase_numbers_ignore_case_and_margins_only() -> None:
    assert phrase_id("Red apple ") == phrase_id("red apple")
    assert phrase_id("red apple") != phrase_id("red apples")
    table = pad_ids([("a", "b", "c"), ("a",), ()], 2)
    assert table.tolist() == [[phrase_id("a"), phrase_id("b")], [phrase_id("a"), -1], [-1, -1]]
    assert (table >= -1).all()


def test_batch_names_who_needs_a_missing_field(starter_shards: Path, tokenizer: Tokenizer) -> None:
    batch = next(iter(Loader(config(starter_shards / "val"), tokenizer, seed=0)))
    with pytest.raises(MissingField, match="supcon.*label_ids"):
        batch.require("label_ids", by="supcon")
    assert batch.to("cpu").pixels is batch.pixels


def test_a_source_may_appear_several_times_in_an_epoch(starter_shards: Path, tokenizer: Tokenizer) -> None:
    once = Loader(config(starter_shards / "val", sources={"google": 1, "twitter": 1}), tokenizer, seed=0)
    more = Loader(config(starter_shards / "val", sources={"google": 2, "twitter": 1}), tokenizer, seed=0)
    assert more.plan.samples == once.plan.samples * 3 / 2


def test_batches_come_out_of_a_webdataset_pipeline_too(starter_shards: Path, tokenizer: Tokenizer) -> None:
    loader = Loader(config(starter_shards / "val"), tokenizer, seed=3)
    piped = list(wds.DataPipeline(partial(iter, range(5, 8)), loader.batches))
    again = Loader(config(starter_shards / "val"), tokenizer, seed=3)
    again.load_state_dict({**again.state_dict(), "step": 5})
    assert len(piped) == 3
    assert all(same(a, b) for a, b in zip(piped, itertools.islice(again, 3), strict=True))
