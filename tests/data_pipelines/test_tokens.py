"""Tokenizers: ids equal to open_clip's on real multilingual names and on made-up texts; the learned vocabulary."""

import json
import random
from collections.abc import Sequence
from functools import cache

import ftfy.bad_codecs  # noqa: F401 - registers the sloppy code pages
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from data_pipelines import tokens
from data_pipelines.files import cache_dir
from data_pipelines.packages import fetch_package, read_members
from data_pipelines.sources.emoji import PACKAGES
from data_pipelines.tokens import Tokenizer, clean, clip_tokenizer, learn_tokenizer
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402


@cache
def names() -> list[str]:
    """Every name and list of tags of emojibase, in all its languages."""
    archive = fetch_package(PACKAGES["names"], cache_dir() / "packages")
    files = read_members(archive, lambda name: name.count("/") == 2 and name.endswith("/data.json"))
    texts = [
        text for _, rows in files for row in json.loads(rows) for text in (row["label"], ", ".join(row.get("tags", ())))
    ]
    assert len(texts) > 100_000
    return texts


@cache
def tokenizers() -> list[Tokenizer]:
    """CLIP's without and, where it is installed, with the accelerator."""
    plain, fast = clip_tokenizer(), clip_tokenizer()
    plain._accelerator = None
    return [plain, fast] if fast._accelerator is not None else [plain]


def different(texts: Sequence[str]) -> list[str]:
    """The texts whose ids differ from open_clip's."""
    expected = open_clip.get_tokenizer("ViT-B-32")(list(texts))
    rows = {int(row) for each in tokenizers() for row in (each(texts) != expected).any(dim=1).nonzero().flatten()}
    return [texts[row] for row in sorted(rows)]


HARD = [
    "", "   spaced \t out \n", "&lt;b&gt; &amp;amp; it's", "schÃ¶n", "I'LL DON'T", "x" * 400, "word " * 200, "a1b22c",
    "日本語の絵文字", "😀 emoji", "ŒUVRE Ǆ", "a\u00a0b", "<start_of_text",
    "<start_of_text> a <END_OF_TEXT>", "!<end_of_text>",
    "'ſ Kelvin \u212a", "“don’t”", "e\u0301 o\u0308", "ﬁｎｅ", "a\x00b\x1b[31mred\x1c", "\ud800", "&#28;&nbsp;&Tab;",
    "ΣΑΣ İ",
    "\ua7ce\U00011de0\U0002ebf0",  # letters and digits younger than the Unicode tables of the libraries
]  # fmt: skip
BITS = [
    *HARD[2:5], *HARD[7:11], *HARD[12:], *"<>&;'\"!?_-…—’‘“„²½Ⅳ१€µΩßẞñÑéœ한ไन\u200d\ufe0f\ufeff\ufffd\u2028\u3000",
    *"\xad\x85\r\n\t ",
    "&amp;", "&#39;", "<b>", "'s", "'S", "’s", "Ã©", "â€™", "Ð¿Ñ", "$5", "a1b2", "__", "...", "Photo", "of", "  ", " ",
    "ａ１", "ｶﾞ",
]  # fmt: skip


def test_clip_ids_equal_open_clips_in_every_language() -> None:
    assert different([*HARD, *names()[::23]]) == []


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.sampled_from(BITS), max_size=14).map("".join), max_size=20),
    st.lists(st.text(st.characters(exclude_categories=()), max_size=24), max_size=10),
    st.lists(st.text(st.characters(max_codepoint=0x17F), max_size=16), max_size=10),
)
def test_clip_ids_equal_open_clips_on_made_up_texts(mixed: list[str], any_text: list[str], latin: list[str]) -> None:
    assert different([*mixed, *any_text, *latin]) == []


@pytest.mark.parametrize("page", ["latin-1", "sloppy-windows-1252", "macroman", "cp437", "sloppy-windows-1251"])
def test_clip_ids_equal_open_clips_on_mojibake(page: str) -> None:
    rng = random.Random(page)
    texts = [f"{name.encode().decode(page, 'ignore')} {rng.choice(names())}" for name in rng.sample(names(), 150)]
    assert different(texts) == []


@pytest.mark.slow
def test_clip_ids_equal_open_clips_on_all_names_and_all_characters() -> None:
    assert different(names()) == []
    rng = random.Random(0)
    assert different(["".join(rng.choices(BITS, k=rng.randint(1, 14))) for _ in range(100_000)]) == []
    assert different([f"a{chr(i)}b!{chr(i)}1{chr(i)}{chr(i)}" for i in range(0x110000)]) == []


def test_the_word_table_gives_what_the_library_gives_and_does_not_grow_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [name.lower() for name in names()[::999]]
    for tokenizer in (tokenizers()[0], learn_tokenizer(texts, vocab_size=600, context_length=77)):
        library = Backend.from_str(tokenizer.vocabulary)
        library.enable_truncation(77)
        library.enable_padding(pad_id=0, length=77)
        monkeypatch.setattr(tokens, "MAX_WORDS", 3)
        for _ in range(2):
            cleaned = [clean(text, lower=True) for text in texts]
            assert tokenizer(texts).tolist() == [row.ids for row in library.encode_batch(cleaned)]


def test_a_vocabulary_that_cuts_otherwise_is_left_to_the_library() -> None:
    vocabulary = json.loads(learn_tokenizer(["red car", "green car"], vocab_size=300, context_length=8).vocabulary)
    vocabulary["pre_tokenizer"] = {"type": "Whitespace"}
    tokenizer = Tokenizer(json.dumps(vocabulary), tokens.TokenizerConfig(context_length=6))
    assert tokenizer._words is None
    assert tokenizer(["r", "r r r r r r r"])[:, 0].unique().numel() == 1
    assert tokenizer(["r", "r r r r r r r"]).shape == (2, 6)


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
