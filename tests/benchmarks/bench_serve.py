"""All figures of the server: `make bench-serve`, or some rows: `make bench-serve ROWS=search`."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import click
from bench_kit import Row, measure
from overload_rows import overload_rows
from search_rows import search_rows
from serve_rows import embedding_rows


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    model: str = "ViT-B-32-quickgelu"
    """The shape of OpenAI's CLIP, which all sides can run."""
    rounds: int = 5
    points: int = 100_000
    dim: int = 512
    seconds: float = 20.0
    """Of each stream of the overload rows."""


def rows_of(sizes: Sizes, backend: str) -> dict[str, Callable[[], list[Row]]]:
    """Name of every group of rows -> how it is measured."""
    return {
        "embedding": lambda: embedding_rows(sizes.model, sizes.rounds, backend),
        "search": lambda: search_rows(sizes.rounds, sizes.points, sizes.dim),
        "overload": lambda: overload_rows(sizes.model, sizes.rounds, backend, sizes.seconds),
    }


@click.command()
@click.option("--rows", default="", help="embedding, search, overload, separated by commas.  [default: all]")
@click.option("--rounds", default=5, show_default=True, help="Timed rounds of every row.")
@click.option("--backend", default="auto", show_default=True, help="Of our server.")
@click.option("--readme/--no-readme", default=True, help="Renew README's table.")
def main(rows: str, rounds: int, backend: str, readme: bool) -> None:
    """Measure, write tests/benchmarks/results/serve.json, renew README's table."""
    logging.basicConfig(level=logging.ERROR)
    measure("serve", rows_of(Sizes(rounds=rounds), backend), rows, readme)


if __name__ == "__main__":
    main()
