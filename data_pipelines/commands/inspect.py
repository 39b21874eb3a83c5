"""Commands that look at shards: verify, stats, ls, show, dedup."""

from pathlib import Path

import click

from data_pipelines import console

shards_argument = click.argument("folder", metavar="DIR")


@console.command()
@shards_argument
@click.option("--workers", type=int, default=0, help="Shards checked at the same time.  [default: one per core]")
@click.option("--max-pixels", type=int, help="Limit of width x height.  [default: as written, else 50000000]")
@console.json_option
@click.pass_context
def verify(context: click.Context, folder: str, workers: int, max_pixels: int | None, as_json: bool) -> None:
    """Check every byte of the shards in DIR, their index, parquet, statistics and manifest; exit code 1 on a fault.

    Names shard, key and byte of each fault. Shards of other tools are checked as far as they describe themselves.

    Example: vlp shard verify shards --json
    """
    from data_pipelines import verify as check

    result = check.verify(folder, workers=workers, max_pixels=max_pixels, progress=not as_json)
    console.emit(result, as_json, check.lines(result))
    if result["faults"]:
        context.exit(1)


@console.command()
@shards_argument
@console.json_option
def stats(folder: str, as_json: bool) -> None:
    """Say what the shards in DIR hold: sizes, captions, labels, sources, failures. Reads the parquet files alone.

    Example: vlp shard stats shards
    """
    from data_pipelines import survey

    result = survey.stats(folder)
    console.emit(result, as_json, survey.stats_lines(result))


@console.command()
@shards_argument
@click.option("--failed", is_flag=True, help="Only rows that did not become samples.")
@click.option("--limit", type=int, help="At most so many rows.")
@console.json_option
def ls(folder: str, failed: bool, limit: int | None, as_json: bool) -> None:
    """List the rows of the shards in DIR: key, status or reason, size, origin, caption.

    Example: vlp shard ls shards --failed
    """
    from data_pipelines import survey

    rows = survey.ls(folder, failed=failed, limit=limit)
    if as_json:
        console.emit({"rows": list(rows)}, True)
    else:
        console.emit({}, False, map(survey.ls_line, rows))


@console.command()
@shards_argument
@click.argument("key")
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Write the picture to this file.")
@console.json_option
def show(folder: str, key: str, save: Path | None, as_json: bool) -> None:
    """Show all that is known about the sample KEY (or SPLIT/KEY) in DIR, and where its bytes lie.

    Example: vlp shard show shards 00000042 --save 42.jpg
    """
    from data_pipelines import survey
    from data_pipelines.errors import ConfigError

    row, extension, image = survey.show(folder, key)
    if save:
        if not image:
            raise ConfigError(f"--save: {key} failed ({row['error_message']}), so there is no picture of it")
        save.write_bytes(image)
    console.emit(row | {"format": extension}, as_json, survey.show_lines(row | {"format": extension}))


@console.command()
@shards_argument
@click.option("--distance", type=int, default=4, show_default=True, help="Bits of 64 that near copies may differ in.")
@click.option("--exact-only", is_flag=True, help="Compare bytes only, decode nothing.")
@click.option("--keep", default="keep.txt", show_default=True, help="Name of the keep-list beside each split's shards.")
@click.option("--workers", type=int, default=0, help="Threads.  [default: one per core]")
@console.json_option
def dedup(folder: str, distance: int, exact_only: bool, keep: str, workers: int, as_json: bool) -> None:
    """Find equal and nearly equal pictures in DIR and write a keep-list without the copies. Changes no shard.

    \b
    Examples:
      vlp shard dedup shards
      vlp shard shards --out unique --keys shards/keep.txt
    """
    from data_pipelines import dedup as find

    result = find.dedup(
        folder, distance=distance, exact_only=exact_only, keep=keep, workers=workers, progress=not as_json
    )
    console.emit(result, as_json, find.lines(result))
