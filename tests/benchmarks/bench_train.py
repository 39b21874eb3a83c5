"""All figures of the trainer: `make bench-train`, or some rows: `make bench-train ROWS=step`."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import click
from bench_data import SMALL, shards_of
from bench_kit import Row, measure
from bench_loss import loss_rows
from bench_objectives import objective_rows
from bench_runs import overhead_row, ranks_row, speed_row, starter_rows
from bench_step import step_rows


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the quick suite uses little."""

    photos: int = 1024
    model: str = "ViT-B-32"
    batch: int = 16
    steps: int = 3
    rounds: int = 5
    seconds: float = 60.0
    """Training time of both sides on the starter data."""
    seeds: int = 3


def rows_of(sizes: Sizes) -> dict[str, Callable[[], list[Row]]]:
    """Name of every row or group of rows -> how it is measured."""

    def step() -> list[Row]:
        return step_rows(shards_of(SMALL, sizes.photos), sizes.model, sizes.batch, sizes.steps, sizes.rounds)

    return {
        "step": step,
        "loss": lambda: loss_rows(rounds=sizes.rounds),
        "objectives": lambda: objective_rows(rounds=sizes.rounds),
        "speed": lambda: [speed_row(shards_of(SMALL, sizes.photos), sizes.rounds)],
        "starter": lambda: starter_rows(sizes.seconds, sizes.seeds),
        "checkpoints": lambda: [overhead_row(shards_of(SMALL, sizes.photos), sizes.rounds)],
        "two_ranks": lambda: [ranks_row(shards_of(SMALL, sizes.photos), sizes.rounds)],
    }


@click.command()
@click.option("--rows", default="", help="Names of rows, separated by commas.  [default: all]")
@click.option("--rounds", default=5, show_default=True, help="Timed rounds of every row.")
@click.option("--readme/--no-readme", default=True, help="Renew README's table.")
def main(rows: str, rounds: int, readme: bool) -> None:
    """Measure, write tests/benchmarks/results/train.json, renew README's table."""
    logging.basicConfig(level=logging.ERROR)
    measure("train", rows_of(Sizes(rounds=rounds)), rows, readme)


if __name__ == "__main__":
    main()
