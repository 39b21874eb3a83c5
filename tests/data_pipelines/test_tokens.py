"""Tokenizers: ids equal to open_clip's on real multilingual names, and the small learned vocabulary."""

import json

import pytest
import torch

from data_pipelines.files import cache_dir
from data_pipelines.packages import fetch_package, read_members
from data_pipelines.sources.emoji import PACKAGES
from data_pipelines.tokens import clean, clip_tokenizer, learn_tokenizer
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402


def names(per_language: int) -> list[str]:
    archive = fetch_package(PACKAGES["names"], cache_dir() / "packages")
    files = read_members(archive, lambda name: name.count("/") == 2 and name.endswith("/data.json"))
    texts = [row["label"] for _, content in files for row in json.loads(content)[40 : 40 + per_language]]
    assert len(texts) > 25 * per_language
    return texts


HARD = [
    "",
    "   spaced \t out \n",
    "&lt;b&gt; &amp;amp; it's",
    "schÃ¶n",
    "I'LL DON'T",
    "x" * 400,
    "word " * 200,
    "a1b22c",
    "日本語の絵文字",
    "😀 emoji",
    "ŒUVRE Ǆ",
    "a\u00a0b",
    "<start_of_text",
]


def test_clip_ids_equal_open_clips() -> None:
    texts = [*HARD, *names(120)]
    assert torch.equal(clip_tokenizer()(texts), open_clip.get_tokenizer("ViT-B-32")(texts))


def test_cleaning_is_skipped_only_where_it_changes_nothing() -> None:
    assert clean("A  plain\tone ", lower=True) == "a plain one"
    assert clean("&amp;amp;", lower=True) == "&"
    assert clean("ÜBER", lower=False) == "ÜBER"


def test_learned_vocabulary_is_small_framed_and_deterministic() -> None:
    texts = ["red apple", "green apple", "a red car", "car park"] * 5
    tokenizer = learn_tokenizer(texts, vocab_size=300, context_length=8)
    assert {learn_tokenizer(texts, vocab_size=300, context_length=8).vocabulary for _ in range(5)} == {
        tokenizer.vocabulary
    }, "hash order must not decide the ids"
    assert tokenizer.vocab_size <= 300
    ids = tokenizer(["Red  APPLE", "zzz"])
    assert ids.shape == (2, 8)
    assert ids[0].max() == tokenizer.vocab_size - 1, "the end token has the highest id, for arg-max pooling"
    assert ids[0].argmax() == (ids[0] != 0).sum() - 1
    assert (ids[1] != 0).sum() == 6, "an unseen word is spelled: start, word mark, three letters, end"


@pytest.mark.parametrize("length", [4, 8])
def test_long_texts_keep_their_end_token(length: int) -> None:
    tokenizer = learn_tokenizer(["red apple on a green table"], vocab_size=300, context_length=length)
    ids = tokenizer(["red apple on a green table " * 5])
    assert ids.shape == (1, length)
    assert int(ids[0, -1]) == tokenizer.vocab_size - 1


def test_no_text_gives_no_row() -> None:
    assert clip_tokenizer()([]).shape == (0, 77)
