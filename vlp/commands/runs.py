"""`vlp runs ls` and `vlp runs compare`."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from data_pipelines.console import Group, emit, json_option

FOLDER = click.Path(path_type=Path)


@click.group(cls=Group, epilog="Example: vlp runs ls")
def runs() -> None:
    """List runs, or compare some of them."""


@runs.command(epilog="Example: vlp runs ls runs --json")
@click.argument("folder", type=FOLDER, default=Path("runs"), metavar="[DIR]")
@json_option
def ls(folder: Path, as_json: bool) -> None:
    """List the runs in DIR (default runs): steps, state, last loss, main metrics, seconds of training, recipe."""
    from vlp.runs import list_runs, show

    found = list_runs(folder)
    rows = [
        (
            info.name,
            f"{info.steps}" + (f"/{info.total}" if info.total else ""),
            info.state,
            show("loss", info.loss),
            "  ".join(f"{name} {show(name, value)}" for name, value in list(info.main.items())[:2]),
            f"{info.seconds:,.0f} s",
            info.recipe,
        )
        for info in found
    ]
    head = ("run", "steps", "state", "loss", "metrics", "time", "recipe")
    emit(
        {"runs": [asdict(info) for info in found]},
        as_json,
        columns([head, *rows]) if rows else [f"no runs in {folder}"],
    )


@runs.command(
    epilog="""Examples:

\b
  vlp runs compare runs/a runs/b
  vlp runs compare runs/a runs/b runs/c --out compared.html"""
)
@click.argument("folders", type=FOLDER, nargs=-1, required=True, metavar="A B...")
@click.option("--out", type=FOLDER, help="Write loss and metric curves to FILE.png, or all to FILE.html.")
@json_option
def compare(folders: Sequence[Path], out: Path | None, as_json: bool) -> None:
    """Show where the recipes of the run folders A, B, ... differ, and their metrics side by side."""
    from vlp import runs as all_runs

    result = all_runs.compare(folders)
    if out is not None:
        result["out"] = str(all_runs.write_comparison(folders, out))
    recipe = [(key, *map(str, values)) for key, values in result["recipe"].items()]
    metrics = [(key, *(all_runs.show(key, value) for value in values)) for key, values in result["metrics"].items()]
    head = ("", *all_runs.labels(folders))
    states = ("state", *(run["state"] for run in result["runs"]))
    rows = [head, states, *metrics, tuple("" for _ in head), ("recipe, where it differs",), *(recipe or [("nowhere",)])]
    emit(result, as_json, [*columns(rows), *([f"wrote {out}"] if out else [])])


def columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Rows of unequal length as lines with aligned columns."""
    counts = max(map(len, rows))
    widths = [max((len(row[place]) for row in rows if place < len(row)), default=0) for place in range(counts)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)).rstrip() for row in rows]
