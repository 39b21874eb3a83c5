"""Cluster labels: spherical k-means on a bundle's picture embeddings, the closest centres of every picture.

The labels of MLCD (An et al. 2024, arXiv 2407.17331): one clustering, l closest centres per picture. Rows come from
disk in blocks and centres are compared in tiles. The same files, options, machine and number of threads give the same
clusters. Suffixes: N pictures, B of a block, K centres, D width, L labels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.errors import ConfigError
from data_pipelines.sidecar import CLUSTERS, write_sidecar
from vlp.curate.pictures import BLOCK, Advance, Pictures

Ids = NDArray[np.int64]
TILE = 16_384
"""Centres compared with a block at a time."""
SEEDED = 1024
"""Clusters up to which the first centres are spread by k-means++; beyond, they are drawn evenly."""
PER_CENTRE = 256
"""Pictures per cluster that the centres are fitted on, unless asked otherwise."""
CANDIDATES = 32
"""Centres per picture that a bounded assignment tries in order."""
SETTLED = 1e-4
"""Share of pictures that change their cluster below which the centres stay."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to cluster."""

    k: int
    closest: int = 1
    """Centres written for each picture, the closest first."""
    capacity: float | None = None
    """The first label holds at most so many times N / K pictures; the others stay the closest."""
    iterations: int = 25
    fit_rows: int | None = None
    """Pictures that the centres are fitted on; default PER_CENTRE per cluster."""
    seed: int = 0

    def check(self, count: int) -> None:
        """Raise ConfigError for what so many pictures cannot be cut into."""
        if not 2 <= self.k <= count:
            raise ConfigError(f"--k {self.k}: must be 2 to {count:,}, the number of pictures")
        if not 1 <= self.closest <= self.k:
            raise ConfigError(f"--closest {self.closest}: must be 1 to --k {self.k}")
        if self.capacity is not None and self.capacity < 1:
            raise ConfigError(f"--capacity {self.capacity}: must be 1 or more times the mean size of a cluster")
        if self.iterations < 1:
            raise ConfigError(f"--iterations {self.iterations}: must be 1 or more")
        if self.fit_rows is not None and self.fit_rows < self.k:
            raise ConfigError(f"--fit-rows {self.fit_rows}: must be at least --k {self.k}")


def cluster(
    pictures: Pictures, out: Path, options: Options, device: torch.device, advance: Advance = lambda step: None
) -> dict[str, Any]:
    """Cluster pictures and write the sidecar `out`; the account of it. `advance` is told of pictures looked at.

    Raises ConfigError.
    """
    options.check(len(pictures))
    centres_KD, iterations = fit(pictures, options, device, advance)
    if options.capacity is None:
        labels = assign(pictures, centres_KD, options.closest, advance)
    else:
        limit = math.ceil(options.capacity * len(pictures) / options.k)
        labels = bounded(pictures, centres_KD, options.closest, limit, advance)
    sizes, cosines = np.zeros(options.k, dtype=np.int64), np.zeros(len(pictures), dtype=np.float32)
    info = {"kind": "cluster", "clusters": options.k, "closest": options.closest, "capacity": options.capacity,
            "seed": options.seed, **pictures.made_of}  # fmt: skip
    write_sidecar(out, _tables(pictures, labels, sizes, cosines), info)
    return {
        "out": str(out),
        "pictures": len(pictures),
        "skipped": pictures.skipped,
        "clusters": options.k,
        "closest": options.closest,
        "empty": int((sizes == 0).sum()),
        "sizes": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())},
        "cosine": float(cosines.mean()),
        "iterations": iterations,
    }


def _tables(
    pictures: Pictures, labels: Iterator[tuple[Ids, NDArray[np.float32]]], sizes: Ids, cosines: NDArray[np.float32]
) -> Iterator[pa.Table]:
    """One table per block; counts the first labels in `sizes` and keeps their cosines on the way."""
    keys = (key for some in pictures.keys() for key in some)  # noqa: SIM118 - no mapping
    done = 0
    for ids_BL, scores_BL in labels:
        np.add.at(sizes, ids_BL[:, 0], 1)
        cosines[done : done + len(ids_BL)] = scores_BL[:, 0]
        done += len(ids_BL)
        columns = {
            "key": pa.array([next(keys) for _ in ids_BL], pa.string()),
            CLUSTERS: _lists(ids_BL.astype(np.int32)),
            "cosines": _lists(scores_BL),
        }
        yield pa.table(columns)


def _lists(rows_BL: NDArray[Any]) -> pa.ListArray:
    ends = np.arange(0, rows_BL.size + 1, rows_BL.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, rows_BL.reshape(-1))


def fit(
    pictures: Pictures, options: Options, device: torch.device, advance: Advance = lambda step: None
) -> tuple[Tensor, int]:
    """(KD centres of length 1 on `device`, iterations done): Lloyd's algorithm with cosines.

    A cluster that runs empty starts anew at the picture that is farthest from its centre.
    """
    rng = np.random.default_rng([options.seed, options.k])
    count = min(len(pictures), options.fit_rows or PER_CENTRE * options.k)
    rows = np.sort(rng.choice(len(pictures), count, replace=False))
    centres_KD = _first_centres(pictures, rows, options.k, rng).to(device)
    before = np.full(count, -1, dtype=np.int64)
    iterations, settled = 0, False
    while iterations < options.iterations and not settled:
        iterations += 1
        sums_KD = torch.zeros(options.k, pictures.dim, dtype=torch.float64)
        sizes_K = torch.zeros(options.k, dtype=torch.int64)
        now, cosines = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.float32)
        done = 0
        for rows_BD in pictures.blocks(rows):
            scores_BL, ids_BL = closest_centres(rows_BD.to(device), centres_KD, 1)
            ids_B = ids_BL[:, 0].cpu()
            # on the CPU, in a fixed order: a GPU's sums would depend on its timing
            sums_KD.index_add_(0, ids_B, F.normalize(rows_BD, dim=1).double())
            sizes_K += torch.bincount(ids_B, minlength=options.k)
            now[done : done + len(ids_B)], cosines[done : done + len(ids_B)] = ids_B, scores_BL[:, 0].cpu()
            done += len(ids_B)
            advance(len(ids_B))
        empty = (sizes_K == 0).nonzero()[:, 0].numpy()
        if len(empty):
            farthest = np.argsort(cosines, kind="stable")[: len(empty)]
            sums_KD[empty] = pictures.take(rows[np.sort(farthest)]).double()
        centres_KD = F.normalize(sums_KD, dim=1).float().to(device)
        settled = not len(empty) and int((now != before).sum()) <= SETTLED * count
        before = now
    return centres_KD, iterations


def _first_centres(pictures: Pictures, rows: Ids, k: int, rng: np.random.Generator) -> Tensor:
    """KD: pictures drawn evenly, or for few clusters by k-means++ (Arthur and Vassilvitskii 2007)."""
    if k > SEEDED:
        return F.normalize(pictures.take(np.sort(rng.choice(rows, k, replace=False))), dim=1)
    some_ND = F.normalize(pictures.take(np.sort(rng.choice(rows, min(len(rows), 32 * k), replace=False))), dim=1)
    chosen = [int(rng.integers(len(some_ND)))]
    distance_N = 1 - some_ND @ some_ND[chosen[0]]
    while len(chosen) < k:
        weights = distance_N.double().clamp(min=0).numpy()
        weights[chosen] = 0
        bounds = weights.cumsum()
        if bounds[-1] > 0:
            place = min(int(np.searchsorted(bounds, rng.random() * bounds[-1], "right")), len(some_ND) - 1)
        else:  # nothing but copies of the centres so far
            place = int(rng.choice(np.setdiff1d(np.arange(len(some_ND)), chosen)))
        chosen.append(place)
        distance_N = torch.minimum(distance_N, 1 - some_ND @ some_ND[place])
    return some_ND[chosen]


def closest_centres(rows_BD: Tensor, centres_KD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(BL cosines, BL numbers) of the `count` closest centres of each row, the closest first."""
    rows_BD = F.normalize(rows_BD, dim=1)
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(centres_KD), TILE):
        scores, ids = (rows_BD @ centres_KD[start : start + TILE].T).topk(min(count, len(centres_KD) - start, TILE))
        ids += start
        if best is not None:
            scores, ids = torch.cat([best[0], scores], 1), torch.cat([best[1], ids], 1)
            scores, places = scores.topk(min(count, scores.shape[1]))
            ids = ids.gather(1, places)
        best = (scores, ids)
    assert best is not None
    return best


def assign(
    pictures: Pictures, centres_KD: Tensor, count: int, advance: Advance = lambda step: None
) -> Iterator[tuple[Ids, NDArray[np.float32]]]:
    """(BL numbers, BL cosines) of the closest centres, block by block."""
    for rows_BD in pictures.blocks():
        scores_BL, ids_BL = closest_centres(rows_BD.to(centres_KD.device), centres_KD, count)
        yield ids_BL.cpu().numpy(), scores_BL.cpu().numpy()
        advance(len(rows_BD))


def bounded(
    pictures: Pictures, centres_KD: Tensor, count: int, limit: int, advance: Advance = lambda step: None
) -> Iterator[tuple[Ids, NDArray[np.float32]]]:
    """As `assign`, but each centre comes first for at most `limit` pictures; the closest centres others follow.

    Pictures ask for centres in the order of their cosines, a full centre keeps the closest of those that ask (Gale and
    Shapley 1962). Keeps CANDIDATES numbers per picture in memory.
    """
    wide = min(len(centres_KD), max(CANDIDATES, count))
    found = list(assign(pictures, centres_KD, wide, advance))
    ids_NL, scores_NL = (np.concatenate([part[side] for part in found]) for side in (0, 1))
    place_N = _stable(ids_NL, scores_NL, limit)
    first_N = np.where(place_N < wide, np.take_along_axis(ids_NL, place_N[:, None] % wide, 1)[:, 0], -1)
    cosine_N = np.take_along_axis(scores_NL, place_N[:, None] % wide, 1)[:, 0]
    _place_rest(pictures, centres_KD, limit, first_N, cosine_N)
    for start in range(0, len(first_N), BLOCK):
        part = slice(start, start + BLOCK)
        others = np.argsort(ids_NL[part] == first_N[part, None], axis=1, kind="stable")[:, : count - 1]
        ids_BL = np.concatenate([first_N[part, None], np.take_along_axis(ids_NL[part], others, 1)], 1)
        scores_BL = np.concatenate([cosine_N[part, None], np.take_along_axis(scores_NL[part], others, 1)], 1)
        yield ids_BL, scores_BL


def _stable(ids_NL: Ids, scores_NL: NDArray[np.float32], limit: int) -> Ids:
    """N: which of its candidates every picture gets; L for one that all of them refuse."""
    wide = ids_NL.shape[1]
    place_N = np.zeros(len(ids_NL), dtype=np.int64)
    while True:
        asking = np.flatnonzero(place_N < wide)
        wanted, score = ids_NL[asking, place_N[asking]], scores_NL[asking, place_N[asking]]
        refused = asking[_over(wanted, score, np.full(int(ids_NL.max()) + 1, limit))]
        if not len(refused):
            return place_N
        place_N[refused] += 1


def _over(wanted: Ids, score: NDArray[np.float32], room_K: Ids) -> NDArray[np.bool_]:
    """Who finds no room at the centre it asks for; the highest scores go first."""
    order = np.lexsort((-score, wanted))
    _, first, counts = np.unique(wanted[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, counts)
    over = np.empty(len(order), dtype=np.bool_)
    over[order] = rank >= room_K[wanted[order]]
    return over


def _place_rest(
    pictures: Pictures, centres_KD: Tensor, limit: int, first_N: Ids, cosine_N: NDArray[np.float32]
) -> None:
    """Pictures without a centre take the closest one that has room; changes `first_N` and `cosine_N`."""
    while len(rest := np.flatnonzero(first_N < 0)):
        room_K = limit - np.bincount(first_N[first_N >= 0], minlength=len(centres_KD))
        open_K = np.flatnonzero(room_K > 0)
        found = [closest_centres(rows.to(centres_KD.device), centres_KD[open_K], 1) for rows in pictures.blocks(rest)]
        score, place = (torch.cat([part[side] for part in found])[:, 0].cpu().numpy() for side in (0, 1))
        wanted = open_K[place]
        taken = ~_over(wanted, score, room_K)
        first_N[rest[taken]], cosine_N[rest[taken]] = wanted[taken], score[taken]
