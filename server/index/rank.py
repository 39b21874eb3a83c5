"""Rankings made of hits: one vector out of several queries, vectors and keywords fused, near-twins spread out.

Done here and not in the engines, so that every index gives the same answer and each hit keeps its cosine.
Suffixes: Q queries, C candidates, D vector width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.index import Hit, Index, PointId, Row, Where

RRF_K = 60
"""Reciprocal rank fusion: how slowly the worth of a rank falls (Cormack, Clarke and Buettcher, 2009)."""


CANDIDATES = 200


@dataclass(frozen=True, slots=True)
class Ask:
    """What to search for, and how the hits are chosen."""

    limit: int
    offset: int = 0
    query: Row | None = None
    """Unit vector; None with keywords alone."""
    keywords: str | None = None
    share: float = 0.5
    """Weight of the vector in the fused ranking; keywords have the rest."""
    where: Where | None = None
    exact: bool = False
    threshold: float | None = None
    """Least cosine of a hit."""
    diversity: float = 0.0
    """0 ranks by score alone, 1 by unlikeness to what was chosen before."""
    candidates: int = CANDIDATES
    """Hits looked at before fusing and spreading. The same for all pages, or these would not fit together."""
    vectors: bool = False
    """Whether results carry their vectors."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """One result: `score` orders it, `cosine` is its likeness to the query (None with keywords alone)."""

    hit: Hit
    score: float
    cosine: float | None
    bm25: float | None = None


def combine(rows_QD: Sequence[Row], weights_Q: Sequence[float]) -> Row:
    """Unit vector of the weighted sum; a negative weight leads away. Raises ValueError when nothing is left."""
    total_D = np.tensordot(np.asarray(weights_Q, np.float64), np.stack(rows_QD).astype(np.float64), axes=1)
    length = float(np.linalg.norm(total_D))
    if not length > 1e-6 * sum(map(abs, weights_Q)):
        raise ValueError("the queries cancel each other: nothing is left to search for")
    unit: Row = (total_D / length).astype(np.float32)
    return unit


def rank(index: Index, ask: Ask) -> list[Ranked]:
    """Results `offset` to `offset + limit` of a search. Blocks."""
    reach = ask.offset + ask.limit
    if ask.keywords is None and not ask.diversity:
        found = _by_vector(index, ask, reach, vectors=ask.vectors)
    else:
        width = max(reach, ask.candidates)
        found = _fused(index, ask, width) if ask.keywords is not None else _by_vector(index, ask, width, vectors=True)
        if ask.diversity:
            found = spread(found, reach, ask.diversity)
    return found[ask.offset : reach]


def _by_vector(index: Index, ask: Ask, limit: int, vectors: bool) -> list[Ranked]:
    assert ask.query is not None
    hits = index.search(ask.query, limit, ask.where, ask.exact, vectors=vectors)
    found = [Ranked(hit, hit.score, hit.score) for hit in hits]
    return [item for item in found if ask.threshold is None or item.score >= ask.threshold]


def _fused(index: Index, ask: Ask, width: int) -> list[Ranked]:
    """Reciprocal rank fusion of vector and keywords; with keywords alone, their own order and score."""
    assert ask.keywords is not None
    worded = index.keywords(ask.keywords, width, ask.where, vectors=True)
    if ask.query is None:
        return [Ranked(hit, hit.score, None, hit.score) for hit in worded]
    near = index.search(ask.query, width, ask.where, ask.exact, vectors=True)
    return fuse(near, worded, ask.query, ask.share, ask.threshold)


def fuse(
    near: Sequence[Hit], worded: Sequence[Hit], query_D: Row, share: float, threshold: float | None = None
) -> list[Ranked]:
    """One ranking of two: score = share / (K + rank by vector) + (1 - share) / (K + rank by keywords)."""
    scores: dict[PointId, float] = {}
    hits: dict[PointId, Hit] = {}
    for weight, ranking in ((share, near), (1 - share, worded)):
        if weight:
            for place, hit in enumerate(ranking, start=1):
                scores[hit.id] = scores.get(hit.id, 0.0) + weight / (RRF_K + place)
                hits.setdefault(hit.id, hit)
    bm25 = {hit.id: hit.score for hit in worded}
    found = []
    for id in sorted(scores, key=lambda id: -scores[id]):
        row = hits[id].vector
        assert row is not None
        cosine = float(np.dot(row, query_D) / np.linalg.norm(row))
        if threshold is None or cosine >= threshold:
            found.append(Ranked(hits[id], scores[id], cosine, bm25.get(id)))
    return found


def spread(found: Sequence[Ranked], limit: int, diversity: float) -> list[Ranked]:
    """Maximal marginal relevance (Carbonell and Goldstein, 1998), one by one:

    (1 - diversity) x score, brought to 0..1 over the candidates, - diversity x cosine to the nearest chosen one.
    Without bringing it there, pictures' cosines to each other (about .8) would outweigh those to a text (about .3).
    """
    if not found:
        return []
    rows_CD = np.stack([item.hit.vector for item in found if item.hit.vector is not None])
    rows_CD = rows_CD / np.linalg.norm(rows_CD, axis=1, keepdims=True)
    scores_C = np.array([item.score for item in found])
    low, high = scores_C.min(), scores_C.max()
    worth_C = (1 - diversity) * ((scores_C - low) / (high - low) if high > low else np.ones_like(scores_C))
    nearest_C = np.full(len(found), -np.inf)
    chosen: list[int] = []
    left_C = np.ones(len(found), np.bool_)
    for _ in range(min(limit, len(found))):
        marginal_C = worth_C - diversity * np.where(np.isfinite(nearest_C), nearest_C, 0.0)
        pick = int(np.where(left_C, marginal_C, -np.inf).argmax())
        chosen.append(pick)
        left_C[pick] = False
        nearest_C = np.maximum(nearest_C, rows_CD @ rows_CD[pick])
    return [found[number] for number in chosen]
