"""`vlp claims`: what the methods are said to gain, measured on real data."""

import os
from pathlib import Path

import click

from data_pipelines.console import Group, emit, json_option
from data_pipelines.errors import ConfigError

FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(cls=Group, epilog="Example: vlp claims run clip")
def claims() -> None:
    """Measure what the methods are said to gain: paired runs, several seeds, a verdict."""


@claims.command(epilog="Example: vlp claims ls --json")
@json_option
def ls(as_json: bool) -> None:
    """List the claims: verdict, objective, what they say."""
    from vlp.claims import claim_names, load_claim
    from vlp.claims.results import read_rows, verdict

    rows = read_rows()
    found = {}
    for name in claim_names():
        claim = load_claim(name)
        found[name] = {"verdict": verdict(name, rows), **claim.model_dump(mode="json")}
    lines = [f"{name:20} {row['verdict']:12} {row['objective']:16} {row['statement']}" for name, row in found.items()]
    emit({"claims": found}, as_json, lines)


@claims.command(
    epilog="""A claim trains every arm with every seed in small runs of one core, some side by side, ten minutes in all
on two cores. One that was stopped goes on with the same command; runs that claims share are trained once.

Examples:

\b
  vlp claims run clip
  vlp claims run all
  vlp claims run clip --on val --seeds 1      # while choosing options: the validation split, kept nowhere
  vlp claims run my-claim.yaml --results my-results.json"""
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--seeds", type=click.IntRange(1), help="Seeds of every arm.  [default: the claim's]")
@click.option(
    "--on", type=click.Choice(["test", "val"]), default="test", show_default=True, help="Split to measure on."
)
@click.option("--workers", type=click.IntRange(1), help="Runs side by side.  [default: one per core, at most 8]")
@click.option("--results", type=FILE, help="File that keeps the outcomes.  [default: that of the tables]")
@json_option
def run(
    names: tuple[str, ...], seeds: int | None, on: str, workers: int | None, results: Path | None, as_json: bool
) -> None:
    """Run the claims NAME... (`all`, names from `vlp claims ls`, or YAML files) and keep their outcomes.

    Fewer seeds than the claim asks for, or --on val, are kept nowhere. Exit code 0 whatever the verdicts.
    """
    from vlp.claims import claim_names, engine, load_claim
    from vlp.claims.results import keep, outcome

    side_by_side = workers or min(8, len(os.sched_getaffinity(0)))
    chosen = claim_names() if "all" in names else list(names)
    found = []
    for name, claim in [(name, load_claim(name)) for name in chosen]:
        count = seeds or claim.seeds
        jobs = engine.plan(claim, count, engine.places_of(claim, show=True), on)
        try:
            done = engine.run_jobs(jobs, side_by_side, show=True, title=name)
        except KeyboardInterrupt as stop:
            click.echo("stopped; the same command goes on", err=True)
            raise SystemExit(130) from stop
        row = outcome(Path(name).stem, claim, done, count)
        kept = on == "test" and count >= claim.seeds and (results is not None or name in claim_names())
        row["kept"] = str(keep(row, results)) if kept else None
        found.append(row)
        if not as_json:
            emit(row, False, _lines(row))
    if as_json:
        emit({"claims": found}, True)


def _lines(row: dict[str, object]) -> list[str]:
    from vlp.claims.results import percent

    values, checks = row["values"], row["checks"]
    assert isinstance(values, dict)
    assert isinstance(checks, list)
    return [
        f"{row['name']}: {'holds' if row['met'] else 'FAILS'}  ({row['note']})",
        *(f"  {key:24} {percent(entry)}  ({entry['low']:.3f} to {entry['high']:.3f})" for key, entry in values.items()),
        *(
            f"  {'yes' if check['holds'] else 'NO':4} {check['check']}  left side {check['left']:.3f}, "
            f"{check['seeds_that_hold']} of {row['seeds']} seeds"
            for check in checks
        ),
        f"  {row['core_seconds']} s of one core; " + (f"kept in {row['kept']}" if row["kept"] else "kept nowhere"),
    ]


@claims.command(epilog="Example: vlp claims table --readme README.md")
@click.option("--readme", type=FILE, help="Renew both tables between the markers of this page.")
@click.option("--results", type=FILE, help="File that keeps the outcomes.  [default: as `run`]")
@json_option
def table(readme: Path | None, results: Path | None, as_json: bool) -> None:
    """Print the outcomes of all claims as a Markdown table."""
    from vlp.claims.results import claims_table, read_rows, renew

    if results is not None and not results.is_file():
        raise ConfigError(f"--results {str(results)!r}: no such file")
    rows = read_rows(results)
    if readme is not None:
        if not readme.is_file():
            raise ConfigError(f"--readme {str(readme)!r}: no such file")
        text = renew(readme, rows)
        readme.write_text(text, encoding="utf-8")
    emit({"rows": rows, "readme": str(readme) if readme else None}, as_json, [claims_table(rows)])


@claims.command(epilog="Example: vlp claims data claims-emoji --out shards/claims-emoji")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace other shards that are there.")
@json_option
def data(name: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write a data set of the claims, for `vlp train claims/...`: claims-emoji, claims-clipart, claims-fashion,
    claims-detection."""
    from data_pipelines.job import lines
    from vlp.claims.data import write

    summary = write(name, out, overwrite=overwrite)
    emit(summary, as_json, lines(summary))
