"""Figures of search: our index against faiss's flat one, lancedb and milvus-lite, on the same generated vectors.

Each store runs in a process of its own (`peer_search`), is built once and asked in turns, one query at a time. What is
compared is the time of all processors per query: lancedb spreads a query over the cores and hangs when it may not.
Suffixes: N rows, D vector width, Q queries, K neighbours.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_kit import ROOT, Row, compare, missing, take_turns
from numpy.typing import NDArray
from peer_search import GROUP, LIMIT

HERE = Path(__file__).resolve().parent
STORES = Path(sys.prefix) / "peers/stores/bin/python"
VERSIONS = {
    "faiss": ("faiss Flat", "1.15.1"),
    "lancedb": ("lancedb IVF_PQ", "0.40.0"),
    "milvus": ("milvus-lite", "3.2.2"),
}
GROUPS = 10
"""Values of the payload field, so that a filter passes a tenth."""
RECALL = 0.95


@dataclass(frozen=True)
class Contest:
    """One row: a way of searching of ours and a peer's."""

    name: str
    peer: str
    ours: str
    """Mode of our index."""
    theirs: str
    goal: str
    repeats: tuple[int, int]
    """How often the queries are asked in a round, of us and of the peer."""


CONTESTS = (
    Contest("search-graph", "faiss", "plain", "plain", ">= 10", (10, 1)),
    Contest("search-exact", "faiss", "exact", "plain", ">= 2.2", (2, 1)),
    Contest("filtered-lancedb", "lancedb", "filtered", "filtered", ">= 10", (10, 1)),
    Contest("filtered-milvus", "milvus", "filtered", "filtered", ">= 10", (10, 1)),
)


def write_vectors(folder: Path, rows: int, dim: int, queries: int, centres: int = 1000) -> None:
    """base.npy, group.npy and queries.npy: unit vectors around centres, queries drawn like them but not among them."""
    chance = np.random.default_rng(0)
    centre_CD = chance.standard_normal((centres, dim), dtype=np.float32)
    for name, count in (("base", rows), ("queries", queries)):
        near_ND = centre_CD[chance.integers(centres, size=count)]
        near_ND = near_ND + chance.standard_normal((count, dim), dtype=np.float32)
        np.save(folder / f"{name}.npy", near_ND / np.linalg.norm(near_ND, axis=1, keepdims=True))
    np.save(folder / "group.npy", chance.integers(GROUPS, size=rows))


def nearest(folder: Path, filtered: bool) -> NDArray[np.int64]:
    """QK: what an exact search finds, among all rows or those of the group."""
    base_ND, group_N, queries_QD = (np.load(folder / f"{name}.npy") for name in ("base", "group", "queries"))
    scores_QN = queries_QD @ base_ND.T
    if filtered:
        scores_QN[:, group_N != GROUP] = -np.inf
    best_QK: NDArray[np.int64] = np.argsort(-scores_QN, axis=1, kind="stable")[:, :LIMIT]
    return best_QK


def recall(found: list[list[int]], best_QK: NDArray[np.int64]) -> float:
    """Share of the nearest that were found, in the mean over the queries that were asked."""
    pairs = zip(found, best_QK[: len(found)].tolist(), strict=True)
    return float(np.mean([len({*ids} & {*best}) / len(best) for ids, best in pairs]))


class Store:
    """A process of `peer_search`."""

    def __init__(self, engine: str, process: "subprocess.Popen[str]") -> None:
        self.engine, self._process = engine, process
        self.built = float(self._line()["built"])

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # some libraries print as well
                told: dict[str, Any] = json.loads(line)
                return told
        raise RuntimeError(f"the process of {self.engine} ended with {self._process.wait()}")

    def ask(self, mode: str, repeats: int) -> dict[str, Any]:
        """Seconds per query and the ids found."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{mode} {repeats}\n")
        self._process.stdin.flush()
        return self._line()

    def seconds(self, mode: str, repeats: int) -> float:
        """Of all processors, per query."""
        return float(self.ask(mode, repeats)["cpu"])


@contextmanager
def opened(engine: str, folder: Path) -> Iterator[Store]:
    """A store that has built itself; ended at the end."""
    interpreter = sys.executable if engine == "edge" else str(STORES)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "LANCE_LOG": "error",
    }
    process = subprocess.Popen(
        [interpreter, str(HERE / "peer_search.py"), engine, str(folder)], cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Store(engine, process)
    finally:
        process.kill()
        process.communicate()


def search_rows(rounds: int, rows: int = 100_000, dim: int = 512, queries: int = 100) -> list[Row]:
    """All of CONTESTS."""
    if not STORES.exists():
        why = f"no peers in {STORES.parents[1]}: make bench-serve installs them"
        return [missing(contest.name, VERSIONS[contest.peer], contest.goal, why) for contest in CONTESTS]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        write_vectors(folder, rows, dim, queries)
        best = {mode: nearest(folder, mode == "filtered") for mode in ("plain", "exact", "filtered")}
        stores = {engine: stack.enter_context(opened(engine, folder)) for engine in ("edge", *VERSIONS)}
        return [_row(contest, stores, best, rounds, rows, dim) for contest in CONTESTS]


def _row(
    contest: Contest, stores: dict[str, Store], best: dict[str, NDArray[np.int64]], rounds: int, rows: int, dim: int
) -> Row:
    modes = {"edge": contest.ours, contest.peer: contest.theirs}
    recalls = {engine: recall(stores[engine].ask(mode, 1)["ids"], best[mode]) for engine, mode in modes.items()}
    variants: dict[str, Callable[[], float]] = {
        engine: partial(stores[engine].seconds, mode, contest.repeats[engine != "edge"])
        for engine, mode in modes.items()
    }
    taken = take_turns(variants, rounds)
    rates = {engine: 1 / float(np.median(times)) for engine, times in taken.items()}
    note = (
        f"{rows:,} x {dim}, clustered, one query at a time: {rates['edge']:,.0f} per CPU second at recall@10 "
        f"{recalls['edge']:.3f}, peer {rates[contest.peer]:,.0f} at {recalls[contest.peer]:.3f}"
    )
    equal = recalls["edge"] >= RECALL
    return compare(contest.name, VERSIONS[contest.peer], taken["edge"], taken[contest.peer], contest.goal, equal, note)
