"""All figures of the data path: `make bench-data`, or one row: `make bench-data ROWS=tokens_default`."""

import logging
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from bench_inputs import captions, photo_folder
from bench_kit import Row, compare, measure, take_turns
from bench_loader import Job, in_process, loader_row
from bench_rows import read_row, tokens_row
from bench_shard import call, shard_rows, verify_row

from data_pipelines.files import cache_dir
from data_pipelines.images import MAX_PIXELS
from data_pipelines.ledger import Ledger
from data_pipelines.preprocess import ImageConfig
from data_pipelines.reader import open_shards
from data_pipelines.stream import iterate
from vlp import __version__

SMALL, LARGE = (640, 480), (1600, 1200)


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the quick suite uses little."""

    photos: int = 1024
    large: int = 256
    stored: int = 6000
    images: int = 2000
    captions: int = 10_000
    rounds: int = 5
    batches: int = 12


def shards_of(size: tuple[int, int], count: int, *options: str) -> Path:
    """Shards of the photographs, written once by our command; eight of them, so that two workers have four each."""
    folder = photo_folder(count, size)
    out = folder.with_name(folder.name.replace("photos", "-".join(("shards", *options[1::2]))))
    if not out.exists():
        call(
            sys.executable, "-m", "vlp", "shard", folder, "--out", out, "--samples-per-shard", str(count // 8), *options
        )  # fmt: skip
    return out


def faulty_copy(shards: Path, share: float, out: Path) -> int:
    """The same shards with this share of the pictures destroyed from their middle on; how many these are."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(shards, out, ignore=shutil.ignore_patterns("*.json", "*.parquet"))
    total = 0
    for path in sorted(out.glob("*.tar")):
        data = bytearray(path.read_bytes())
        for shard in open_shards(shards):
            if shard.path.name == path.name:
                for row in random.Random(path.name).sample(range(len(shard)), math.ceil(share * len(shard))):
                    picture = shard.read(row).image
                    middle = data.find(picture) + len(picture) // 2
                    data[middle : middle + 64] = b"\xff\xd9" * 32
                    total += 1
        path.write_bytes(data)
    assert total
    return total


def faults_row(sizes: Sizes) -> Row:
    """Our loader on damaged shards against our loader on the same shards undamaged."""
    clean = shards_of(SMALL, sizes.photos)
    faulty = cache_dir() / "bench/faulty"
    damaged = faulty_copy(clean, 0.01, faulty)
    ledger = Ledger(max_share=0.05)
    delivered = sum(1 for _ in iterate(faulty, ImageConfig(), ledger, MAX_PIXELS))
    equal = (delivered, ledger.quarantined.total()) == (sizes.photos - damaged, damaged)
    bad = Job("ours", faulty, batches=sizes.batches, max_bad_share=0.05)
    good = Job("ours", clean, batches=sizes.batches)
    taken = take_turns({"bad": in_process(bad), "good": in_process(good)}, sizes.rounds)
    note = f"{damaged} of {sizes.photos} pictures damaged; all of them, and no others, are skipped and counted"
    return compare(
        "faults", ("same loader, clean data", __version__), taken["bad"], taken["good"], "<= 1.05", equal, note
    )


def rows_of(sizes: Sizes) -> dict[str, Callable[[], list[Row]]]:
    """Name of every row (or pair of rows) -> how it is measured."""
    again = sizes.rounds

    def loader(name: str, size: tuple[int, int], goal: str, needed: float, scaled: bool, *options: str) -> list[Row]:
        count = sizes.photos if size == SMALL else sizes.large
        shards = shards_of(size, count, *options)
        return [loader_row(name, shards, goal, needed, again, count, scaled, sizes.batches)]

    def read(name: str, goal: str, shuffled: bool) -> list[Row]:
        return [read_row(name, shards_of(SMALL, sizes.stored), goal, again, shuffled)]

    def tokens(name: str, goal: str, foreign: float, accelerated: bool, on_the_wall: bool = False) -> list[Row]:
        return [tokens_row(name, captions(sizes.captions, foreign), goal, again, accelerated, on_the_wall)]

    def shard() -> list[Row]:
        with tempfile.TemporaryDirectory() as scratch:
            return shard_rows(photo_folder(sizes.images, SMALL), Path(scratch), ">= 3", again)

    return {
        "loader_640": partial(loader, "loader_640", SMALL, ">= 2.3", 70, False),
        "loader_640_scaled": partial(loader, "loader_640_scaled", SMALL, ">= 3.3", 40, True),
        "loader_1600_scaled": partial(loader, "loader_1600_scaled", LARGE, ">= 4", 40, True),
        "loader_256": partial(loader256, sizes),
        "read_sequential": partial(read, "read_sequential", ">= 8", False),
        "read_random": partial(read, "read_random", ">= 7", True),
        "tokens_default": partial(tokens, "tokens_default", ">= 2", 0.17, False),
        "tokens_default_batched": partial(tokens, "tokens_default_batched", ">= 3", 0.17, False, True),
        "tokens_accelerated_mixed": partial(tokens, "tokens_accelerated_mixed", ">= 6", 0.17, True),
        "tokens_accelerated_ascii": partial(tokens, "tokens_accelerated_ascii", ">= 15", 0.0, True),
        "shard": shard,
        "verify": lambda: [verify_row("verify", shards_of(SMALL, sizes.stored), "<= 1.5", again)],
        "faults": lambda: [faults_row(sizes)],
    }


def loader256(sizes: Sizes) -> list[Row]:
    """Ours on 256-pixel shards against the peer on the originals of 640x480; agreement is that on equal shards."""
    small = shards_of(SMALL, sizes.photos, "--image-size", "256", "--encode-format", "jpg", "--encode-quality", "95")
    same = loader_row("loader_256", small, ">= 5", 70, 1, sizes.photos, batches=2)
    ours = in_process(Job("ours", small, batches=sizes.batches))
    peer = in_process(Job("peer", shards_of(SMALL, sizes.photos), batches=sizes.batches))
    taken = take_turns({"ours": ours, "peer": peer}, sizes.rounds)
    note = f"the peer reads the 640x480 originals; on equal shards: {same.note}, ratio {same.ratio}"
    return [
        compare("loader_256", (same.peer, same.peer_version), taken["ours"], taken["peer"], ">= 5", same.equal, note)
    ]


@click.command()
@click.option("--rows", default="", help="Names of rows, separated by commas.  [default: all]")
@click.option("--rounds", default=5, show_default=True, help="Timed rounds of every row.")
@click.option("--images", default=2000, show_default=True, help="Pictures that are sharded; the goal speaks of 20000.")
@click.option("--readme/--no-readme", default=True, help="Renew README's table.")
def main(rows: str, rounds: int, images: int, readme: bool) -> None:
    """Measure, write tests/benchmarks/results/data.json, renew README's table."""
    logging.basicConfig(level=logging.ERROR)
    measure("data", rows_of(Sizes(rounds=rounds, images=images)), rows, readme)


if __name__ == "__main__":
    main()
