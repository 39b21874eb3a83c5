"""Tokenizers as data: one JSON of the `tokenizers` library plus three numbers, whatever the vocabulary's origin.

`clip_tokenizer` rebuilds OpenAI CLIP's byte-level BPE from the vocabulary file that open_clip ships; `learn_tokenizer`
makes a small one from training texts. Both travel in the bundle, and open_clip reads the exported form.

Both split texts by CLIP's pattern, so every word is looked up in a table of words met before and given to the library
once only. Cleaning (ftfy, HTML) runs where a cheap test says that it may change something.
"""

import gzip
import hashlib
import html
import importlib
import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import regex
import torch
from ftfy.badness import is_bad
from numpy.typing import NDArray
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError

START, END = "<start_of_text>", "<end_of_text>"
PAD = "<pad>"
CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
WORDS = regex.compile(f"{START}|{END}|{CLIP_PATTERN}", regex.IGNORECASE)
"""How open_clip cuts a text, a written special token included."""
ASCII_WORDS = re.compile(rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII)
"""The same for lower-case ASCII, in a third of the time."""
CLIP_ENTRIES = "2e6dac1ffa773a206f069084495615909303f921e22845ed422125216976babc"
"""sha256 of CLIP's 49,408 entries, one a line."""
MAY_NEED_FTFY = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f&"  # controls, terminal escapes, HTML entities
    "\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06"  # ligatures
    "\u2028\u2029\u206a-\u206f\u3000\ud800-\udfff\ufeff-\uffff]"  # separators, surrogates, wide and half-wide forms
)
QUOTES = re.compile("[\u02bc\u2018-\u201f]")
STRAIGHT = {**dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"), **dict.fromkeys(range(0x201C, 0x2020), '"')}
"""What ftfy makes of the usual curved quotation marks."""
MAX_WORDS = 1 << 20
"""Words remembered; then the table is emptied. About 200 MB."""


class TokenizerConfig(StrictModel):
    """The numbers beside the vocabulary."""

    context_length: int = 77
    pad_id: int = 0
    lower: bool = True
    """Lower-case before tokenizing, as CLIP does."""


def clean(text: str, lower: bool) -> str:
    """Mojibake repaired, HTML entities decoded twice, white space collapsed; each skipped where it cannot matter."""
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(_fix(text)))
    text = " ".join(text.split())
    return text.lower() if lower else text


def _fix(text: str) -> str:
    """ftfy.fix_text, which costs as much as the rest of tokenizing, from its own test for mojibake where that will do.

    A text that is not bad, holds no character of the table above and is in normal form changes in its quotation marks
    alone. They count as signs of mojibake, so the test is made with and without them.
    """
    if MAY_NEED_FTFY.search(text) or not unicodedata.is_normalized("NFC", text):
        return ftfy.fix_text(text)
    if text.isascii():
        return text
    straight = text.translate(STRAIGHT) if QUOTES.search(text) else text
    bad = is_bad(text) or (straight is not text and is_bad(straight))
    return ftfy.fix_text(text) if bad else straight


class Tokenizer:
    """Texts to padded token ids. Holds the vocabulary and the ids of words met before."""

    def __init__(self, vocabulary: str, config: TokenizerConfig) -> None:
        """`vocabulary`: JSON text of a `tokenizers.Tokenizer` with its special-token template."""
        self.config = config
        self.vocabulary = vocabulary
        self._backend = Backend.from_str(vocabulary)
        self._words = _word_table(self._backend, vocabulary, config.lower)
        self._accelerator = _accelerator(self._backend) if self._words is not None else None
        if self._words is None:
            self._backend.enable_truncation(config.context_length)
            self._backend.enable_padding(pad_id=config.pad_id, length=config.context_length)

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """N texts to NL int64 ids; too long texts are cut, the end token stays."""
        cleaned = [clean(text, self.config.lower or self._words is not None) for text in texts]
        if self._words is None:
            rows = [item.ids for item in self._backend.encode_batch_fast(cleaned)]
            return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.config.context_length)
        ids = np.full((len(cleaned), self.config.context_length), self.config.pad_id, dtype=np.int64)
        if self._accelerator is None:
            self._look_up(cleaned, ids, slice(None))
        else:
            # ASCII alone: of newer letters the accelerator's Unicode tables know nothing; special tokens it spells out
            plain = np.array([t.isascii() and START not in t and END not in t for t in cleaned], dtype=bool)
            if plain.any():
                easy = [text for text, is_plain in zip(cleaned, plain, strict=True) if is_plain]
                ids[plain] = self._accelerator.tokenize_batch(easy, context_length=self.config.context_length)
            self._look_up([text for text, is_plain in zip(cleaned, plain, strict=True) if not is_plain], ids, ~plain)
        return torch.from_numpy(ids)

    def _look_up(self, texts: Sequence[str], ids_NL: NDArray[np.int64], which: Any) -> None:
        """Write the ids of texts into the rows that `which` selects, word by word."""
        assert self._words is not None
        words, length = self._words, self.config.context_length
        if len(words) > MAX_WORDS:
            words.clear_met()
        rows = []
        for text in texts:
            found = (ASCII_WORDS if text.isascii() else WORDS).findall(text)
            row = [words.start, *chain.from_iterable(map(words.__getitem__, found))][: length - 1]
            row.append(words.end)
            rows.append(row)
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        part = ids_NL[which]
        part[np.arange(length) < counts[:, None]] = np.fromiter(chain.from_iterable(rows), np.int64, int(counts.sum()))
        ids_NL[which] = part


class _Words(dict[str, list[int]]):
    """Word -> its ids; a word not met before is given to the library."""

    def __init__(self, backend: Backend, start: int, end: int) -> None:
        self.backend, self.start, self.end = backend, start, end
        self.clear_met()

    def clear_met(self) -> None:
        """Forget all words but the two special ones."""
        self.clear()
        self[START], self[END] = [self.start], [self.end]

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self.backend.encode(word, add_special_tokens=False).ids
        self[word] = ids
        return ids


def _word_table(backend: Backend, vocabulary: str, lower: bool) -> _Words | None:
    """An empty table, if the vocabulary cuts lower-case text as CLIP does; the library cuts no more then."""
    parts = json.loads(vocabulary)
    steps = (parts["pre_tokenizer"] or {}).get("pretokenizers", [])
    start, end = backend.token_to_id(START), backend.token_to_id(END)
    if start is None or end is None or [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    lower = lower or (parts["normalizer"] or {}).get("type") == "Lowercase"
    if not lower or steps[0]["pattern"] != {"Regex": CLIP_PATTERN}:
        return None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=steps[1]["add_prefix_space"], use_regex=False)
    return _Words(backend, start, end)


def _accelerator(backend: Backend) -> Any:
    """The tokenizer of `instant-clip-tokenizer`, if it is installed and the vocabulary is CLIP's; else None."""
    if importlib.util.find_spec("instant_clip_tokenizer") is None or backend.get_vocab_size() != 49408:
        return None
    entries = backend.get_vocab()
    if hashlib.sha256("\n".join(sorted(entries, key=entries.__getitem__)).encode()).hexdigest() != CLIP_ENTRIES:
        return None
    return importlib.import_module("instant_clip_tokenizer").Tokenizer()


def clip_tokenizer(context_length: int = 77) -> Tokenizer:
    """CLIP's tokenizer: 49,408 entries, ids equal to open_clip's SimpleTokenizer."""
    spec = importlib.util.find_spec("open_clip")  # found, not imported: importing it costs seconds
    if spec is None or spec.origin is None:
        raise ConfigError(
            "tokenizer 'clip' reads the vocabulary that open_clip_torch ships: pip install open_clip_torch"
        )
    lines = (
        gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    )
    pairs = (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])
    merges = [(left, right) for left, right in pairs]
    letters = _byte_letters()
    entries = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocab = {entry: number for number, entry in enumerate(entries)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    split = pre_tokenizers.Split(Regex(CLIP_PATTERN), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    _frame(backend, vocab[START], vocab[END])
    return Tokenizer(backend.to_str(), TokenizerConfig(context_length=context_length))


def _byte_letters() -> list[str]:
    """The printable stand-in of every byte value, in the order GPT-2 numbers them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(hidden))]


def _frame(backend: Backend, start: int, end: int) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )


def _id(backend: Backend, entry: str) -> int:
    number = backend.token_to_id(entry)
    assert number is not None  # it was put there
    return number


def learn_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int) -> Tokenizer:
    """A byte-level BPE vocabulary of at most `vocab_size` entries from `texts`; the end token has the highest id.

    The same texts give the same vocabulary. (With word-end suffixes the library numbers letters in hash order.)
    """
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(CLIP_PATTERN), "removed", invert=True)
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of_words])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[PAD, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((clean(text, lower=True) for text in texts), trainer)
    backend.add_special_tokens([END])  # last, so that arg-max pooling finds it as in CLIP
    _frame(backend, _id(backend, START), _id(backend, END))
    return Tokenizer(backend.to_str(), TokenizerConfig(context_length=context_length))
