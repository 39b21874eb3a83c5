"""Words of captions as sparse vectors: BM25 with the engine's own tokenizer, the same for embedded and cluster.

The engine multiplies with each word's rarity (IDF) when it searches, so that rarity is always that of the points there.
"""

from functools import lru_cache
from typing import Literal

import qdrant_edge as qe

NAME = "words"
"""Of the sparse vector beside the dense one."""
AVERAGE_WORDS = 12.0
"""Captions are short; BM25's usual average of 256 would make their length count for nothing."""
Language = Literal[
    "none", "arabic", "azerbaijani", "basque", "bengali", "catalan", "chinese", "danish", "dutch", "english", "finnish",
    "french", "german", "greek", "hebrew", "hinglish", "hungarian", "indonesian", "italian", "japanese", "kazakh",
    "nepali", "norwegian", "portuguese", "romanian", "russian", "slovene", "spanish", "swedish", "tajik", "turkish",
]  # fmt: skip
"""What the engine has stop words for; `none` takes every word as it is."""


@lru_cache(maxsize=8)
def _model(language: str) -> qe.Bm25:
    words = qe.TokenizerType.Multilingual
    if language == "none":
        nothing, none = qe.StopwordsSet(set(), set()), qe.DisabledStemmer()
        return qe.Bm25(qe.Bm25Config(avg_len=AVERAGE_WORDS, tokenizer=words, stopwords=nothing, stemmer=none))
    return qe.Bm25(qe.Bm25Config(avg_len=AVERAGE_WORDS, tokenizer=words, language=language))


def document_words(text: str, language: str) -> tuple[list[int], list[float]] | None:
    """(words, weights) of a caption; None when no word is left."""
    found = _model(language).embed_document(text)
    return (found.indices, found.values) if found.indices else None


def query_words(text: str, language: str) -> tuple[list[int], list[float]] | None:
    """(words, weights) of a query; None when no word is left."""
    found = _model(language).embed_query(text)
    return (found.indices, found.values) if found.indices else None
