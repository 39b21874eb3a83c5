"""Entities: found in captions, linked by their company, kept where the model sees them, counted where it does not."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.loader import DataConfig, Loader
from data_pipelines.sidecar import CLUSTERS, load_sidecar
from data_pipelines.tokens import learn_tokenizer
from vlp.cli import cli
from vlp.curate import entity as curation
from vlp.curate.entity import Options, Pairs, agreement, disambiguate, label_entities, select, survival, texts_of
from vlp.curate.gazetteer import Entity, make_gazetteer, mine, one_slip, read_entities, words
from vlp.curate.pictures import Pictures
from vlp.testing import micro_bundle

PLACES = [
    Entity("New York", ("NYC",)), Entity("York"), Entity("bat (animal)", ("bat",)), Entity("bat (sport)", ("bat",)),
    Entity("butterfly"), Entity("cave"), Entity("ball"),
]  # fmt: skip


def found(text: str, fuzzy: bool = True) -> list[tuple[int, ...]]:
    return make_gazetteer(PLACES, fuzzy).find(text)


def test_the_longest_name_counts_and_aliases_have_one_number() -> None:
    assert found("A street in New York.") == [(0,)]
    assert found("york, NYC and york again") == [(1,), (0,)]
    assert found("a BAT in a cave") == [(2, 3), (5,)]
    assert found("nothing of the kind") == []
    assert found("") == []


def test_plurals_and_slips_of_a_letter_are_forgiven() -> None:
    assert found("two butterflies, caves") == [(4,), (5,)]
    for text in ("buterfly", "butterrfly", "bufterfly", "btuterfly"):
        assert found(text) == [(4,)], text
        assert found(text, fuzzy=False) == []
    assert found("cavern bell boll balk") == [], "short names are taken by the letter"


def test_one_slip_is_what_a_table_of_edits_says() -> None:
    """Against the optimal string alignment distance, filled in by hand, for all pairs of short words."""

    def distance(a: str, b: str) -> int:
        table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
        for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
            cost = a[i - 1] != b[j - 1]
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + cost)
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
        return table[len(a), len(b)]

    short = ["".join(letters) for size in range(5) for letters in itertools.product("ab", repeat=size)]
    for a, b in itertools.product(short, short):
        assert one_slip(a, b) == (distance(a, b) <= 1), (a, b)


def test_words_are_compared_in_one_form() -> None:
    assert words("Ｃａts’ boxes, the glass_bus: Cities!") == ["cat", "box", "the", "glass", "bus", "city"]


def test_frequent_phrases_are_mined_without_their_parts() -> None:
    captions = ["the red fire engine", "a fire engine of mine", "fire engine", "red apple", "an apple", "red"] * 2
    assert [entity.name for entity in mine(captions, 4)] == ["apple", "fire engine", "red"]
    assert mine(captions, 99) == []


def test_entity_files_of_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cat\n\ndog\n")
    (tmp_path / "b.json").write_text('{"cat": ["pussy"], "dog": {"aliases": ["hound"], "description": "an animal"}}')
    assert read_entities(tmp_path / "a.txt") == [Entity("cat"), Entity("dog")]
    assert read_entities(tmp_path / "b.json") == [Entity("cat", ("pussy",)), Entity("dog", ("hound",), "an animal")]
    assert read_entities(tmp_path / "b.json")[1].text == "dog, an animal"
    for number, content in enumerate(("[]", "{", '{"a": "b"}', '{"a": {"alias": ["b"]}}')):
        (tmp_path / f"{number}.json").write_text(content)
        with pytest.raises(ConfigError, match="--entities"):
            read_entities(tmp_path / f"{number}.json")


def test_ambiguous_names_follow_their_company() -> None:
    """Entities 0 and 1 share a name. 2 lies beside 1: together with 2 the name means 1, alone the context decides."""
    entity_ED = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    assert disambiguate([(0, 1), (2,)], entity_ED) == [1, 2]
    assert disambiguate([(0, 1)], entity_ED, torch.tensor([1.0, 0.0])) == [0]
    assert disambiguate([(0, 1)], entity_ED, torch.tensor([0.0, 1.0])) == [1]


def pairs_of(*rows: tuple[int, int, float]) -> Pairs:
    pictures, entities, scores = zip(*rows, strict=True)
    return Pairs(np.array(pictures), np.array(entities), np.array(scores, dtype=np.float32))


def test_selection_keeps_the_share_of_the_highest_or_a_threshold() -> None:
    pairs = pairs_of(*((number, 0, number / 10) for number in range(8)))
    assert select(pairs, Options(share=0.25)).picture_P.tolist() == [6, 7]
    assert select(pairs, Options(threshold=0.45)).picture_P.tolist() == [5, 6, 7]
    assert len(select(pairs, Options(share=1.0)).picture_P) == 8
    with pytest.raises(PipelineError, match=r"--threshold 2.*highest score is 0\.700"):
        select(pairs, Options(threshold=2.0))


def test_survival_is_written_down_for_every_entity_that_is_mentioned() -> None:
    raw = pairs_of((0, 0, 0.1), (1, 0, 0.5), (2, 2, 0.0))
    table = survival(raw, pairs_of((1, 0, 0.5)), [Entity("a"), Entity("b"), Entity("c")], np.array([0, -1, -1]))
    assert table.to_pylist() == [
        {"entity": "a", "number": 0, "mentions": 2, "kept": 1, "survival": 0.5},
        {"entity": "c", "number": -1, "mentions": 1, "kept": 0, "survival": 0.0},
    ]


def stored(folder: Path, captions: list[list[str]], labels: list[list[str] | None], rows: torch.Tensor) -> Pictures:
    keys = [f"k{row}" for row in range(len(rows))]
    columns = {"image_path": keys, "caption": [some[0] if some else "" for some in captions], "labels": labels}
    several = [some if len(some) > 1 else None for some in captions]
    pq.write_table(pa.table({**columns, "captions": pa.array(several, pa.list_(pa.string()))}), folder / "m.parquet")
    return Pictures(((rows.numpy(), folder / "m.parquet"),), 0, {"model": "micro"})


def test_labels_lie_beside_the_shards_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures 0 and 1 show what they are called, 2 and 3 do not: half of the four pairs is right, both right ones are
    kept. `dog` stands in one kept picture only and is cut by --min-count 2 in the second round."""
    texts = {"cat": torch.tensor([1.0, 0.0, 0.0]), "dog": torch.tensor([0.0, 1.0, 0.0])}
    monkeypatch.setattr(curation, "encode_texts", lambda _, names: torch.stack([texts[name] for name in names]))
    (tmp_path / "names.json").write_text('{"dog": ["hound"], "cat": []}')
    rows = F.normalize(torch.tensor([[1, 0.2, 0], [0.2, 1, 0.0], [0, 0.1, 1], [0.1, 0, 1], [0, 0, 1]]), dim=1)
    captions = [["a cat"], ["what", "my hounds"], ["a dog"], ["cats"], []]
    pictures = stored(tmp_path, captions, [["Cats"], ["hound"], ["tree"], ["tree"], None], rows)
    options = Options(entities=tmp_path / "names.json", share=0.5, least=1, truth="labels")
    result = label_entities(pictures, micro_bundle(), tmp_path / "e.parquet", options)
    assert (result["pairs_raw"], result["pairs"], result["labelled"], result["entities"]) == (4, 2, 2, 2)
    assert (result["precision_raw"], result["precision"], result["recall"]) == (0.5, 1.0, 1.0)
    ids, names = (load_sidecar(tmp_path / "e.parquet", column) for column in (CLUSTERS, "labels"))
    assert [row.tolist() for row in ids.find(["k0", "k1", "k2", "k4"])] == [[0], [1], [], []]
    assert [names.find_texts(key) for key in ("k0", "k1", "k2")] == [("cat",), ("dog",), ()]
    assert names.texts == ("cat", "dog"), "numbers and sorted labels agree"
    assert (ids.clusters, ids.info["kind"]) == (2, "entity")
    assert len(pq.read_table(result["entities_table"])) == 2
    with pytest.raises(PipelineError, match="no entity is left on 2 pictures"):
        label_entities(pictures, micro_bundle(), tmp_path / "e.parquet", Options(options.entities, share=0.5, least=2))
    with pytest.raises(ConfigError, match="--texts kind: the shards have no such column"):
        list(texts_of(pictures, "kind"))
    assert list(texts_of(pictures, "labels")) == [["Cats"], ["hound"], ["tree"], ["tree"], []]
    assert list(texts_of(pictures))[1:3] == [captions[1], captions[2]]
    with pytest.raises(ConfigError, match="--truth kind: the shards have no such column"):
        agreement(pictures, pairs_of((0, 0, 1.0)), pairs_of((0, 0, 1.0)), PLACES, "kind")


@pytest.mark.parametrize(
    ("options", "message"),
    [(Options(share=0), "--share 0"), (Options(least=0), "--min-count 0"), (Options(prompt="a photo"), "--prompt")],
)
def test_impossible_options_are_refused(options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.check()


def test_entities_of_real_captions_become_labels_and_texts(trained: Path, starter_shards: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "entities.parquet", starter_shards / "val"
    arguments = ["curate", "entity", str(trained), "--data", str(data), "--out", str(out), "--min-count", "3"]
    more = ["--truth", "labels", "--embeddings", str(tmp_path / "store"), "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli, [*arguments, *more])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["entities"] > 10
    assert 0 < result["pairs"] < result["pairs_raw"]
    settings = {
        "train": data, "batch_size": 32, "image": {"size": 16, "resize": "longest"}, "clusters": out,
        "labels": {"sidecar": out}, "captions": {"labels": 1.0, "max_labels": 1},
    }  # fmt: skip
    loader = Loader(DataConfig.model_validate(settings), learn_tokenizer(["face"], 300, 16), seed=0)
    assert loader.classes == loader.clusters == result["entities"]
    drawn = loader.draw(0)
    batch = loader.make_batch(0)
    first = batch.require("cluster_ids", "test")[:, 0]
    assert torch.equal(first, batch.require("label_ids", "test"))
    names = loader.config.labels.table.texts  # type: ignore[union-attr]
    labelled = [row for row in range(32) if first[row] >= 0]
    assert labelled
    assert all(drawn.texts[row] in names for row in labelled)
