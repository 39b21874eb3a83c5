"""What stands beside a picture: weighted captions, sentences, changed words, labels, weights, views, length groups."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from data_pipelines.captions import CaptionConfig, EdaConfig, eda, one_sentence, own_caption, without_stop_words
from data_pipelines.errors import ConfigError, MissingField
from data_pipelines.labels import LabelConfig, class_numbers, label_fields
from data_pipelines.loader import DataConfig, Loader
from data_pipelines.stream import Decoded
from data_pipelines.tokens import Tokenizer, learn_tokenizer

TEXT = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn_tokenizer(["red apple", "face", "tool", "animal"], vocab_size=400, context_length=16)


def make(folder: Path, tokenizer: Tokenizer, **changes: object) -> Loader:
    settings = {"train": folder / "val", "batch_size": 32, "image": {"size": 16, "resize": "longest"}}
    return Loader(DataConfig.model_validate({**settings, **changes}), tokenizer, seed=0)


def decoded(key: str = "k", **columns: object) -> Decoded:
    return Decoded(key, torch.zeros(3, 2, 2, dtype=torch.uint8), ("own",), ("cat", "dog"), "s", columns)


def test_captions_are_chosen_by_the_weights_of_their_columns() -> None:
    config = CaptionConfig(columns={"caption": 1, "long": 2, "absent": 5})
    columns = {"long": "a long one", "absent": "", "other": 3}
    draws = np.random.default_rng(0).random(3000)
    found = Counter(own_caption(("own", "next"), columns, config, draw) for draw in draws)
    assert set(found) == {"own", "a long one"}
    assert found["a long one"] / 3000 == pytest.approx(2 / 3, abs=0.03)
    assert own_caption(("own",), {}, config, 0.99) == "own"
    assert own_caption((), {"long": "only"}, config, 0.5) == "only", "a sample whose only text is a column"
    with pytest.raises(ConfigError, match="must be positive"):
        CaptionConfig(columns={"a": 0})


def test_one_sentence_stands_for_the_whole_as_often_as_asked() -> None:
    text = "A cat sits. It is 3.5 kg! Does it sleep?"
    draws = np.random.default_rng(0).random((2000, 2))
    found = Counter(one_sentence(text, 0.6, row) for row in draws)
    assert set(found) == {text, "A cat sits.", "It is 3.5 kg!", "Does it sleep?"}
    assert found[text] / 2000 == pytest.approx(0.4, abs=0.03)
    assert one_sentence("", 1.0, draws[0]) == ""
    report = "1. The heart is large.\n2. No fracture\n\nImpression: old"
    assert {one_sentence(report, 1.0, row) for row in draws} == {
        "The heart is large.",
        "No fracture",
        "Impression: old",
    }
    assert {one_sentence("一只猫。两只狗！", 1.0, row) for row in draws} == {"一只猫。", "两只狗！"}
    assert one_sentence("42.", 1.0, draws[0]) == "42."


@pytest.mark.parametrize(("kind", "more"), [("swap", 0), ("insert", 1), ("delete", -1)])
def test_each_change_of_words_does_what_it_says(kind: str, more: int) -> None:
    config = EdaConfig(**{"swap": 0.0, "insert": 0.0, "delete": 0.0, kind: 0.1})
    texts = [eda(TEXT, config, np.random.default_rng(seed)).split() for seed in range(300)]
    assert {word for text in texts for word in text} == set(TEXT.split())
    lengths = [len(text) for text in texts]
    if kind == "delete":
        assert np.mean(lengths) == pytest.approx(9.1, abs=0.2)
    else:
        assert set(lengths) == {10 + more}
        assert all(" ".join(text) != TEXT for text in texts)
    if kind == "swap":
        assert all(sorted(text) == sorted(TEXT.split()) for text in texts)


def test_something_always_stays() -> None:
    config = EdaConfig(delete=1.0)
    assert all(eda("only two", config, np.random.default_rng(seed)) for seed in range(50))
    assert eda("word", config, np.random.default_rng(0)) == "word"
    with pytest.raises(ValidationError):
        EdaConfig(delete=1.5)


def test_stop_words_are_left_out_by_their_share_of_the_texts(starter_shards: Path, tokenizer: Tokenizer) -> None:
    assert without_stop_words("The face with tears of joy.") == "face tears joy."
    assert without_stop_words("of the") == "of the", "a text is never empty"
    batches = [
        next(make(starter_shards, tokenizer, captions={"stop_words": share, "prompt": "the {}"}).batches([0]))
        for share in (0.0, 0.5, 1.0)
    ]
    changed = [int((batch.tokens != batches[0].tokens).any(dim=1).sum()) for batch in batches]
    assert changed[0] == 0
    assert 5 <= changed[1] <= 27
    assert changed[2] == 32


def test_class_numbers_come_from_names_numbers_and_columns(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    (tmp_path / "numbers.json").write_text('{"cat": 7, "dog": 3}')
    assert class_numbers(decoded(), LabelConfig(names=tmp_path / "names.txt")) == [1, 0]
    assert class_numbers(decoded(), LabelConfig(names=tmp_path / "numbers.json")) == [7, 3]
    assert class_numbers(decoded(cls=1), LabelConfig(names=("a", "b"), column="cls")) == [1]
    assert class_numbers(decoded(kind="b"), LabelConfig(names=("a", "b"), column="kind")) == [1]
    assert class_numbers(decoded(kind=["z", "a"]), LabelConfig(names=("a", "b"), column="kind")) == [0]
    samples = [decoded(kind=["b", "c"]), decoded()]
    fields = label_fields(samples, LabelConfig(names=("a", "b", "c"), column="kind", multi=True))
    assert fields["label_ids"].tolist() == [1, -1]
    assert fields["multi_labels"].tolist() == [[0, 1, 1], [0, 0, 0]]
    for names in ((), ("a", "a"), tmp_path / "nowhere.txt"):
        with pytest.raises(ConfigError, match=r"data\.labels\.names"):
            class_numbers(decoded(), LabelConfig(names=names))


def test_optional_fields_are_there_only_when_asked_for(
    starter_shards: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    plain = make(starter_shards, tokenizer).make_batch(0)
    assert plain.views is None
    assert plain.extra_tokens is None
    for field in ("label_ids", "multi_labels", "weight", "source_ids"):
        with pytest.raises(MissingField):
            plain.require(field, by="test")
    pq.write_table(pa.table({"key": list(plain.keys[:3]), "weight": [0.5, 0.0, 2.0]}), tmp_path / "w.parquet")
    labels = sorted({label for sample in make(starter_shards, tokenizer).draw(0).samples for label in sample.labels})
    full = make(
        starter_shards, tokenizer, views=3, texts=2, weights=tmp_path / "w.parquet", augment={"flip": 0.5, "hue": 0.3},
        labels={"names": labels, "multi": True}, captions={"labels": 0.5, "eda": {}},
    ).make_batch(0)  # fmt: skip
    assert full.keys == plain.keys, "options change no order"
    assert full.require("weight", "test").tolist() == [0.5, 0.0, 2.0, *[1.0] * 29]
    assert full.views is not None
    assert full.extra_tokens is not None
    pictures = [full.pixels, *full.views]
    assert len(pictures) == 3
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(pictures, 2))
    assert len(full.extra_tokens) == 1
    assert not torch.equal(full.tokens, full.extra_tokens[0])
    assert (full.require("label_ids", "test") >= 0).all()
    assert full.require("multi_labels", "test").shape == (32, len(labels))


def test_a_mixture_says_which_part_a_sample_is_from(starter_shards: Path, tokenizer: Tokenizer) -> None:
    train = {str(starter_shards / name): weight for name, weight in (("unseen_concepts", 3), ("unseen_vendor", 1))}
    loader = make(starter_shards, tokenizer, train=train)
    batches = [loader.make_batch(step) for step in range(3)]
    numbers = torch.cat([batch.require("source_ids", "test") for batch in batches])
    assert (numbers == 0).float().mean() == pytest.approx(0.75, abs=0.02)
    first = {sample.key for sample in map(loader.shards.read, range(int(loader.shards.sizes[0])))}
    keys = [key for batch in batches for key in batch.keys]
    assert {key for key, number in zip(keys, numbers.tolist(), strict=True) if number == 0} <= first


def test_grouping_by_length_shortens_the_padding(starter_shards: Path, tokenizer: Tokenizer) -> None:
    def padded(**changes: object) -> float:
        loader = make(starter_shards, tokenizer, batch_size=16, **changes)
        batches = [loader.make_batch(step) for step in range(loader.plan.steps)]
        return float(np.mean([(batch.tokens != 0).sum(dim=1).max().item() for batch in batches]))

    assert padded(group_by_length=16) < 0.9 * padded()
