"""Tokenizers as data: one JSON of the `tokenizers` library plus three numbers, whatever the vocabulary's origin.

`clip_tokenizer` rebuilds OpenAI CLIP's byte-level BPE from the vocabulary file that open_clip ships; `learn_tokenizer`
makes a small one from training texts. Both travel in the bundle, and open_clip reads the exported form.
"""

import gzip
import html
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError

START, END = "<start_of_text>", "<end_of_text>"
PAD = "<pad>"
CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
NEEDS_CLEANING = re.compile(r"[^\x20-\x7e]|&")


class TokenizerConfig(StrictModel):
    """The numbers beside the vocabulary."""

    context_length: int = 77
    pad_id: int = 0
    lower: bool = True
    """Lower-case before tokenizing, as CLIP does."""


def clean(text: str, lower: bool) -> str:
    """Mojibake repaired, HTML entities decoded twice, white space collapsed; skipped where it cannot matter."""
    if NEEDS_CLEANING.search(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split())
    return text.lower() if lower else text


class Tokenizer:
    """Texts to padded token ids. Holds the vocabulary; immutable in use."""

    def __init__(self, vocabulary: str, config: TokenizerConfig) -> None:
        """`vocabulary`: JSON text of a `tokenizers.Tokenizer` with its special-token template."""
        self.config = config
        self.vocabulary = vocabulary
        self._backend = Backend.from_str(vocabulary)
        self._backend.enable_truncation(config.context_length)
        self._backend.enable_padding(pad_id=config.pad_id, length=config.context_length)

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """N texts to NL int64 ids; too long texts are cut, the end token stays."""
        cleaned = [clean(text, self.config.lower) for text in texts]
        encoded = self._backend.encode_batch_fast(cleaned)
        rows = [item.ids for item in encoded]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.config.context_length)


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
