"""Exact search of small collections: an int8 scan in memory whose candidates are ranked in float32.

The scan is exact, not nearly so. Rows and query are rounded to int8; by Cauchy and Schwarz a score can be wrong by no
more than |q||x - x'| + |q - q'||x'|, which is known for every row. Every row that could be among the best within its
bound is scored again in float32. The integer products are SimSIMD's.

Suffixes: N rows, D vector width, K candidates.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simsimd
import torch
from numpy.typing import NDArray

from server.index import Hit, Index, IndexInfo, Point, PointId, Row, Where, unit_rows

MOST_BYTES = 256_000_000
"""Of float32 vectors held; larger collections go without a scan."""
ROUND = 1024
"""Rows by which the arrays grow."""
PAGE = 2000
LEVELS = 127


@dataclass(slots=True)
class _Rows:
    """Arrays with room to grow; rows below `count` never change but in `alive`, so that readers need no lock."""

    exact_ND: NDArray[np.float32]
    rounded_ND: NDArray[np.int8]
    step_N: NDArray[np.float32]
    """What one int8 level of a row is worth."""
    error_N: NDArray[np.float32]
    """|x - x'|."""
    length_N: NDArray[np.float32]
    """|x'|."""
    alive_N: NDArray[np.bool_]
    ids: list[PointId]
    count: int = 0


def _empty(room: int, dim: int) -> _Rows:
    return _Rows(
        np.zeros((room, dim), np.float32),
        np.zeros((room, dim), np.int8),
        np.zeros(room, np.float32),
        np.zeros(room, np.float32),
        np.zeros(room, np.float32),
        np.zeros(room, np.bool_),
        [],
    )


def _round(rows_ND: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8 rows, value of one level per row)."""
    step_N = np.abs(rows_ND).max(axis=1) / LEVELS
    rounded_ND = np.rint(rows_ND / step_N[:, None]).astype(np.int8)
    return rounded_ND, step_N.astype(np.float32)


class Scan:
    """Vectors in memory. One writer at a time; searches may run beside it."""

    def __init__(self, dim: int) -> None:
        self._rows = _empty(ROUND, dim)
        self._publishing = threading.Lock()
        """Held for a moment, so that a search sees a replaced row once: as it was, or as it is."""
        self._place: dict[PointId, int] = {}

    def __len__(self) -> int:
        return len(self._place)

    def put(self, ids: Sequence[PointId], unit_ND: NDArray[np.float32]) -> None:
        """Add or replace vectors of length 1."""
        last = {id: number for number, id in enumerate(ids)}  # of an id that comes twice the last one stands
        if len(last) < len(ids):
            ids, unit_ND = list(last), unit_ND[list(last.values())]
        rows = self._with_room(len(ids))
        at = slice(rows.count, rows.count + len(ids))
        rounded_ND, step_N = _round(unit_ND)
        back_ND = rounded_ND * step_N[:, None]
        rows.exact_ND[at], rows.rounded_ND[at], rows.step_N[at] = unit_ND, rounded_ND, step_N
        rows.error_N[at] = np.linalg.norm(unit_ND - back_ND, axis=1)
        rows.length_N[at] = np.linalg.norm(back_ND, axis=1)
        with self._publishing:
            rows.ids.extend(ids)
            rows.alive_N[at] = True
            rows.count += len(ids)
            for number, id in enumerate(ids, start=at.start):
                self._forget(id)
                self._place[id] = number

    def remove(self, ids: Sequence[PointId]) -> None:
        """Drop vectors; ids that are not there are no error."""
        with self._publishing:
            for id in ids:
                self._forget(id)
                self._place.pop(id, None)

    def _forget(self, id: PointId) -> None:
        if (before := self._place.get(id)) is not None:
            self._rows.alive_N[before] = False

    def _with_room(self, more: int) -> _Rows:
        rows = self._rows
        if rows.count + more <= len(rows.alive_N):
            return rows
        kept_K = np.flatnonzero(rows.alive_N[: rows.count])
        needed = len(kept_K) + more
        grown = _empty(-(-max(needed, needed + needed // 4) // ROUND) * ROUND, rows.exact_ND.shape[1])
        grown.count = len(kept_K)
        for name in ("exact_ND", "rounded_ND", "step_N", "error_N", "length_N", "alive_N"):
            getattr(grown, name)[: grown.count] = getattr(rows, name)[kept_K]
        grown.ids = [rows.ids[number] for number in kept_K.tolist()]
        with self._publishing:
            self._place = {id: number for number, id in enumerate(grown.ids)}
            self._rows = grown
        return grown

    def search(self, query_D: Row, limit: int) -> list[tuple[PointId, float, Row]]:
        """Best `limit` (id, cosine, vector), best first: exactly those of a float32 scan."""
        with self._publishing:
            rows = self._rows
            count = rows.count
            alive_N = rows.alive_N[:count].copy()
        limit = min(limit, int(alive_N.sum()))
        if limit == 0:
            return []
        query_D = query_D / np.linalg.norm(query_D)
        rounded_1D, step_1 = _round(query_D[None])
        dots_N = np.asarray(simsimd.cdist(rounded_1D, rows.rounded_ND[:count], metric="dot"))[0]
        about_N = (dots_N * (rows.step_N[:count] * step_1[0])).astype(np.float32)
        about_N[~alive_N] = -np.inf
        query_error = float(np.linalg.norm(query_D - rounded_1D[0] * step_1[0]))
        bound_N = rows.error_N[:count] + query_error * rows.length_N[:count] + 1e-6
        first_K = torch.topk(torch.from_numpy(about_N), limit, sorted=False).indices.numpy()
        # the limit-th best score is at least this, so a row that cannot reach it is out
        floor = float((rows.exact_ND[first_K] @ query_D).min())
        chosen_K = np.flatnonzero(about_N + bound_N >= floor)
        scores_K = rows.exact_ND[chosen_K] @ query_D
        order = np.argsort(-scores_K, kind="stable")[:limit]
        found = zip(chosen_K[order].tolist(), scores_K[order].tolist(), strict=True)
        return [(rows.ids[number], score, rows.exact_ND[number]) for number, score in found]


class ScanIndex:
    """An index whose unfiltered searches are scanned in memory as long as it is small; see the protocol `Index`.

    For collections that nobody else writes to.
    """

    def __init__(self, inner: Index, most_bytes: int = MOST_BYTES, exact_below: int = 10_000) -> None:
        """`exact_below`: collections up to that size are always scanned, larger ones when `exact` is asked for."""
        self.inner = inner
        self._most = most_bytes // (4 * inner.info.dim)
        self._exact_below = exact_below
        self._scan: Scan | None = None
        self._lock = threading.Lock()

    @property
    def info(self) -> IndexInfo:
        """What it holds."""
        return self.inner.info

    def search(
        self, query: Row, limit: int, where: Where | None = None, exact: bool = False, *, vectors: bool = False
    ) -> list[Hit]:
        """Best hits by cosine."""
        points = self.inner.info.points
        wanted = not where and points <= self._most and (exact or points <= self._exact_below)
        scan = self._ready() if wanted else None
        if scan is None:
            return self.inner.search(query, limit, where, exact, vectors=vectors)
        found = scan.search(query, limit)
        payloads = {point.id: point.payload for point in self.inner.get([id for id, _, _ in found])}
        # a point that was deleted since has no payload, and is left out
        return [Hit(id, s, payloads[id], row.copy() if vectors else None) for id, s, row in found if id in payloads]

    def _ready(self) -> Scan | None:
        """The scan, loaded at its first use; None when another thread is loading it, or there is too much by now."""
        if (scan := self._scan) is not None or not self._lock.acquire(blocking=False):
            return scan
        try:
            scan, after = Scan(self.inner.info.dim), None
            while True:
                points, after = self.inner.scroll(after, PAGE, vectors=True)
                if points:
                    scan.put([point.id for point in points], unit_rows(points))
                if len(scan) > self._most:
                    return None
                if after is None:
                    self._scan = scan
                    return scan
        finally:
            self._lock.release()

    def upsert(self, points: Sequence[Point]) -> None:
        """Insert or replace points."""
        with self._lock:
            self.inner.upsert(points)
            if self._scan is not None and points:
                self._scan.put([point.id for point in points], unit_rows(points))
                if len(self._scan) > self._most:
                    self._scan = None

    def delete(self, ids: Sequence[PointId]) -> None:
        """Remove points."""
        with self._lock:
            self.inner.delete(ids)
            if self._scan is not None:
                self._scan.remove(ids)

    def keywords(self, text: str, limit: int, where: Where | None = None, *, vectors: bool = False) -> list[Hit]:
        """Best captions by BM25."""
        return self.inner.keywords(text, limit, where, vectors=vectors)

    def get(self, ids: Sequence[PointId], *, vectors: bool = False) -> list[Point]:
        """Points by id."""
        return self.inner.get(ids, vectors=vectors)

    def thumbnails(self, ids: Sequence[PointId]) -> dict[PointId, bytes]:
        """JPEGs of points."""
        return self.inner.thumbnails(ids)

    def scroll(
        self, after: PointId | None, limit: int, where: Where | None = None, *, vectors: bool = False
    ) -> tuple[list[Point], PointId | None]:
        """Points in the order of their ids."""
        return self.inner.scroll(after, limit, where, vectors=vectors)

    def count(self, where: Where | None = None) -> int:
        """Points that fulfil `where`."""
        return self.inner.count(where)

    def close(self) -> None:
        """Close what is behind it."""
        self.inner.close()
