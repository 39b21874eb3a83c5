"""Equal and nearly equal pictures in shards, and a keep-list without them.

Equal: the sha256 of the original bytes. Nearly equal: a 64-bit perceptual hash, the signs of the 63 lowest
frequencies and the mean against their median (pHash: Zauner, Implementation and Benchmarking of Perceptual Image Hash
Functions, 2010, with the whole 8 x 8 corner). Two hashes of distance <= 7 agree in one of four bands of 16 bits but
for one bit, so candidates come from sorted bands, never from all pairs.
"""

import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_pipelines import console
from data_pipelines.errors import BadSample, ConfigError
from data_pipelines.folders import read_members, read_rows
from data_pipelines.images import flatten, open_checked
from data_pipelines.store import Store, join
from data_pipelines.survey import parquets

SIDE, CORNER = 32, 8
MAX_DISTANCE = 7
KEEP = "keep.txt"
CHUNK = 1 << 17
"""Hashes looked up at a time; bounds the memory for candidates."""
Hashes = NDArray[np.uint64]
Name = tuple[str, str]
"""Split and key of a sample."""


def dedup(
    out: Path | str, *, distance: int = 4, exact_only: bool = False, keep: str = KEEP, workers: int = 0, progress: bool
) -> dict[str, Any]:
    """Find duplicates over all splits, and write one keep-list per split (one key per line) beside its shards.

    Of a group the copy that stays is the first, one outside `train` before one inside, so that training never holds a
    picture of a test. `distance`: bits of 64 in which nearly equal pictures may differ, 0 to 7. Returns counts and the
    groups: the sample kept, those dropped, their distances (0 and `exact` for equal bytes).
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(f"distance {distance}: must be 0 to {MAX_DISTANCE} of the 64 bits")
    began = time.monotonic()
    store = Store(out)
    shards = list(parquets(store))
    shards.sort(key=lambda shard: shard[0] == "train")  # stable: order inside and between the others stays
    names, digests = _read_digests(store, shards)
    dropped = _exact(digests)
    exact = len(dropped)
    if not exact_only:
        near = _near(_hash_all(store, shards, names, workers, progress), distance, dropped)
        dropped = {row: near.get(first, (first, bits)) for row, (first, bits) in dropped.items()} | near
    _write_lists(store, shards, names, dropped, keep)
    groups: dict[int, list[dict[str, Any]]] = {}
    for row, (first, bits) in sorted(dropped.items()):
        copy = {"key": join(*names[row]), "distance": bits, "exact": digests[row] == digests[first]}
        groups.setdefault(first, []).append(copy)
    return {
        "out": str(store),
        "samples": len(names),
        "exact": exact,
        "near": len(dropped) - exact,
        "kept": len(names) - len(dropped),
        "keep": [str(store) + "/" + join(split, keep) for split in sorted({split for split, _ in shards})],
        "groups": [{"kept": join(*names[first]), "dropped": rows} for first, rows in groups.items()],
        "seconds": round(time.monotonic() - began, 1),
    }


def _read_digests(store: Store, shards: list[tuple[str, str]]) -> tuple[list[Name], list[str]]:
    names: list[Name] = []
    digests: list[str] = []
    for split, name in shards:
        for row in read_rows(store, split, name):
            if row["status"] == "success":
                names.append((split, row["key"]))
                digests.append(row.get("sha256") or join(split, row["key"]))
    return names, digests


def _exact(digests: list[str]) -> dict[int, tuple[int, int]]:
    """Row -> (first row with the same bytes, 0)."""
    first: dict[str, int] = {}
    dropped = {}
    for row, digest in enumerate(digests):
        if (before := first.setdefault(digest, row)) != row:
            dropped[row] = (before, 0)
    return dropped


def _hash_all(
    store: Store, shards: list[tuple[str, str]], names: list[Name], workers: int, progress: bool
) -> list[int | None]:
    """Perceptual hash of every sample; None for a picture that cannot be read or has no structure."""
    found: dict[Name, int | None] = {}
    with (
        console.progress("hashing pictures", len(names), progress, "pictures") as advance,
        ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool,
    ):
        for split, name in shards:
            files = read_members(store, split, name)
            images = {key: content for key, extension, _, content in files if extension not in ("json", "txt")}
            for key, value in zip(images, pool.map(_hash, images.values()), strict=True):
                found[split, key] = value
                advance(1)
    return [found.get(name) for name in names]


def _hash(data: bytes) -> int | None:
    try:
        return perceptual_hash(data)
    except BadSample:
        return None


def perceptual_hash(data: bytes) -> int | None:
    """64-bit hash of an encoded picture; None for one without structure, which would be near to every other such.

    Raises BadSample when it cannot be decoded.
    """
    grey = _grey(data)
    matrix = _cosines()
    corner = matrix @ grey @ matrix.T
    if np.abs(corner).ravel()[1:].max() < 8.0:  # a plain area: less than a quarter of a grey level
        return None
    bits = (corner > np.median(corner)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _grey(data: bytes) -> NDArray[np.float64]:
    """SIDE x SIDE grey levels; JPEGs are decoded at an eighth where that is enough."""
    try:
        pixels = simplejpeg.decode_jpeg(data, "GRAY", min_height=SIDE, min_width=SIDE)[:, :, 0]
        image = Image.fromarray(pixels)
    except ValueError:
        image = flatten(open_checked(data)).convert("L")
    small = image.resize(
        (SIDE, SIDE), Image.Resampling.BOX if min(image.size) > 4 * SIDE else Image.Resampling.BILINEAR
    )
    return np.asarray(small, dtype=np.float64)


@cache
def _cosines() -> NDArray[np.float64]:
    """CORNER x SIDE: the lowest frequencies of the orthonormal DCT-II."""
    k, n = np.mgrid[:CORNER, :SIDE]
    matrix = np.sqrt(2 / SIDE) * np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))
    matrix[0] /= np.sqrt(2)
    return np.asarray(matrix, dtype=np.float64)


def _near(
    values: list[int | None], distance: int, skip: dict[int, tuple[int, int]]
) -> dict[int, tuple[int, int]]:  # fmt: skip
    """Row -> (kept row near to it, bits apart). Only kept rows attract, so that no chain grows."""
    rows = np.array([row for row, value in enumerate(values) if value is not None and row not in skip], dtype=np.int64)
    hashes = np.array([values[row] for row in rows], dtype=np.uint64)
    unique, inverse = np.unique(hashes, return_inverse=True)
    neighbours: dict[int, list[int]] = {}
    for a, b in near_pairs(unique, distance):
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    kept: dict[int, int] = {}
    dropped: dict[int, tuple[int, int]] = {}
    for row, code in zip(rows.tolist(), inverse.tolist(), strict=True):
        near = [
            (int(np.bitwise_count(unique[code] ^ unique[n])), kept[n]) for n in neighbours.get(code, []) if n in kept
        ]
        if code in kept:
            near.append((0, kept[code]))
        if near:
            bits, first = min(near)
            dropped[row] = (first, bits)
        else:
            kept[code] = row
    return dropped


def near_pairs(unique: Hashes, distance: int) -> Iterator[tuple[int, int]]:
    """Positions of all pairs of distinct hashes that differ in at most `distance` (<= 7) bits, each once."""
    found = [np.empty((0, 2), dtype=np.int64)]
    flips = [0, *(1 << bit for bit in range(16))] if distance > 3 else [0]
    for band in range(4):
        part = ((unique >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        ordered = part[order]
        for flip, begin in itertools.product(flips, range(0, len(part), CHUNK)):
            probes = part[begin : begin + CHUNK] ^ flip
            low, high = np.searchsorted(ordered, probes, "left"), np.searchsorted(ordered, probes, "right")
            counts = high - low
            left = np.repeat(np.arange(begin, begin + len(probes)), counts)
            # 0, 1, 2 ... inside every run of candidates, on top of where that run begins
            inside = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
            right = order[np.repeat(low, counts) + inside]
            close = (left < right) & (np.bitwise_count(unique[left] ^ unique[right]) <= distance)
            found.append(np.stack([left[close], right[close]], axis=1))
    yield from np.unique(np.concatenate(found), axis=0).tolist()


def _write_lists(
    store: Store, shards: list[tuple[str, str]], names: list[Name], dropped: dict[int, tuple[int, int]], keep: str
) -> None:
    lists: dict[str, list[str]] = {split: [] for split, _ in shards}
    for row, (split, key) in enumerate(names):
        if row not in dropped:
            lists[split].append(key)
    for split, keys in lists.items():
        store.write(join(split, keep), "".join(f"{key}\n" for key in sorted(keys)).encode())


def lines(result: dict[str, Any], most: int = 10) -> list[str]:
    """The report for people; the first groups only."""
    text = [
        f"{result['out']}: {result['samples']:,} samples, {result['kept']:,} kept, {result['seconds']:.1f} s",
        f"  copies: {result['exact']:,} equal, {result['near']:,} nearly equal",
    ]
    for group in result["groups"][:most]:
        copies = ", ".join(f"{row['key']} ({'equal' if row['exact'] else row['distance']})" for row in group["dropped"])
        text.append(f"  {group['kept']}: {copies}"[:200])
    if len(result["groups"]) > most:
        text.append(f"  ... and {len(result['groups']) - most:,} more groups; --json lists all")
    return [*text, *(f"  keep-list: {path}" for path in result["keep"])]
