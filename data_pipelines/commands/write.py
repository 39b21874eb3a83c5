"""Commands that write shards: the default of `vlp shard`, extend, retry, and plan, which only estimates."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from data_pipelines import console
from data_pipelines.errors import PipelineError

F = TypeVar("F", bound=Callable[..., Any])

SETTINGS = {
    "folder": "dir", "template": "template", "caption_col": "caption_col", "label_col": "label_col",
    "box_col": "box_col", "image_col": "image_col", "columns": "columns", "keys": "keys", "split_by": "split_by",
    "images": "images", "layout": "layout", "names": "names", "languages": "languages", "damaged": "damaged",
    "vendors": "vendors", "pictures": "pictures", "side": "side", "seed": "seed",
}  # fmt: skip
"""Option of the command line -> setting of the source."""
FETCH = ("timeout", "retries", "allow_private")
"""Options that say how pictures are fetched (FetchOptions)."""


def several(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
    """Values of a repeatable option, each of which may be several names with commas; None when it was not given."""
    return tuple(name.strip() for text in value for name in text.split(",")) or None


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several option decorators as one; the first is listed first."""
    return lambda function: functools.reduce(lambda inner, outer: outer(inner), reversed(decorators), function)


source_options = options(
    click.option("--kind", help="How SOURCE is read.  [default: recognised]"),
    click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder of a named data set's packages."),
    click.option("--template", help='Caption of pictures with a label only: "a photo of a {label}".'),
    click.option("--caption-col", "--caption_col", multiple=True, callback=several, help="Captions' column; repeat."),
    click.option("--label-col", "--label_col", multiple=True, callback=several, help="Labels' column; repeat."),
    click.option("--box-col", "--box_col", help="Boxes' column."),
    click.option("--image-col", "--image_col", "--url-col", "--url_col", "image_col", help="Column of paths or URLs."),
    click.option(
        "--columns", "--save-additional-columns", "--save_additional_columns", "columns", multiple=True,
        callback=several, help="Further columns to keep, by commas.  [default: all]",
    ),
    click.option("--keys", type=click.Path(path_type=Path), help="Keep-list: only samples with these keys."),
    click.option("--split-by", "--split_by", help="Column that names each row's split."),
    click.option("--images", type=click.Path(path_type=Path), help="COCO: folder of the pictures.  [default: beside]"),
    click.option("--layout", help="Folder: captions or classes.  [default: recognised]"),
    click.option("--names", multiple=True, callback=several, help="IDX files: names of the classes, by commas."),
    click.option("--languages", multiple=True, callback=several, help="Named data sets: languages, by commas."),
    click.option("--vendors", multiple=True, callback=several, help="emoji: whose, by commas.  [default: all]"),
    click.option("--pictures", multiple=True, callback=several, help="detection-starter: split=number, by commas."),
    click.option("--side", type=int, help="detection-starter: pixels.  [default: 320]"),
    click.option("--seed", type=int, help="detection-starter: which pictures are composed.  [default: 0]"),
    click.option("--damaged", help="Shards: stop at a damaged one, or count it as a failure.  [default: stop]"),
)  # fmt: skip
run_options = options(
    click.option("--workers", "--thread-count", "--thread_count", "workers", type=int,
                 help="Threads.  [default: one per core]"),
    click.option("--on", help="ray[:ADDRESS]: write on a Ray cluster that sees the same files.  [default: here]"),
    click.option("--fetch-concurrency", type=int, help="URLs fetched at the same time.  [default: 32]"),
    click.option("--timeout", type=float, help="Seconds to wait for a server.  [default: 10]"),
    click.option("--retries", type=int, help="Further attempts per URL.  [default: 2]"),
    click.option("--allow-private", is_flag=True, default=None, help="Fetch from private addresses, too."),
)  # fmt: skip
picture_options = options(
    click.option("--image-size", "--image_size", type=int,
                 help="Side in pixels.  [default: pictures stay; starter: 144]"),
    click.option(
        "--resize-mode", "--resize_mode",
        type=click.Choice(["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]),
        help="keep_ratio: short side to the size; keep_ratio_largest: long side.  [default with --image-size: "
        "keep_ratio]",
    ),
    click.option(
        "--resize-only-if-bigger/--resize-always", "--resize_only_if_bigger/--resize_always", "resize_only_if_bigger",
        default=None, help="Whether smaller pictures stay as they are.  [default: they stay]",
    ),
    click.option("--encode-format", "--encode_format", type=click.Choice(["jpg", "png", "webp"]),
                 help="[default: the picture's own]"),
    click.option("--encode-quality", "--encode_quality", type=int,
                 help="1-100; png: compression 0-9.  [default: 95; png: 6]"),
    click.option(
        "--samples-per-shard", "--number-sample-per-shard", "--number_sample_per_shard", "samples_per_shard", type=int,
        help="Rows per shard.  [default: 1000]",
    ),
    click.option("--oom-shard-count", "--oom_shard_count", type=int, help="Digits of a shard's name.  [default: 5]"),
    click.option("--max-pixels", type=int, help="Limit of width x height.  [default: 50000000]"),
)  # fmt: skip


@console.command(hidden=True)
@click.argument("source")
@click.option(
    "--out", "--output-folder", "--output_folder", "out", required=True,
    help="Folder to write, or a URL such as s3://bucket/folder; train/ val/ ... below it for splits.",
)  # fmt: skip
@source_options
@picture_options
@run_options
@click.option("--overwrite", is_flag=True, help="Replace shards that another source or other options wrote.")
@console.json_option
def write(source: str, out: str, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Write SOURCE as WebDataset shards in img2dataset's layout.

    SOURCE is a folder of images (same-stem .txt or .json beside them, or class folders), a table of paths or URLs, a
    folder of shards, or the name of a data set: starter, emoji, clipart, detection-starter. Running the same command
    again does nothing; an interrupted one goes on after its last finished shard.

    \b
    Examples:
      vlp shard starter --out data/starter
      vlp shard photos/ --out shards --image-size 256 --encode-format jpg --encode-quality 90
      vlp shard classes/ --out shards --template "a photo of a {label}"
      vlp shard verify shards
    """
    from data_pipelines import job

    _own_pixel_limit()
    found = resolve(source, given)
    result = job.shard(found, out, write_options(found, given), overwrite=overwrite, progress=True)
    console.emit(result, as_json, job.lines(result))


@console.command()
@click.argument("folder_of_shards", metavar="DIR")
@click.argument("source")
@source_options
@run_options
@console.json_option
def extend(folder_of_shards: str, source: str, as_json: bool, **given: Any) -> None:
    """Add the records of SOURCE to the finished shards in DIR, as new shards with the same picture options.

    Shards that are there do not change. Running the same command again does nothing; an interrupted one goes on.

    Example: vlp shard extend shards more-photos/
    """
    from data_pipelines import job

    _own_pixel_limit()
    result = job.extend(resolve(source, given), folder_of_shards, run_time(given), progress=True)
    console.emit(result, as_json, job.lines(result))


@console.command()
@click.argument("folder_of_shards", metavar="DIR")
@run_options
@console.json_option
def retry(folder_of_shards: str, as_json: bool, **given: Any) -> None:
    """Try the failed rows of DIR again, and no other; what succeeds fills the place in its shard that was left empty.

    The shards become those of a run in which these rows had not failed. The source must still be where it was.

    Example: vlp shard retry shards --timeout 30 --retries 5
    """
    from data_pipelines import retry as again

    _own_pixel_limit()
    result = again.retry(folder_of_shards, run_time(given), progress=True)
    console.emit(result, as_json, again.lines(result))


@console.command()
@click.argument("source")
@source_options
@picture_options
@run_options
@click.option("--sample", type=int, default=64, show_default=True, help="Pictures to try.")
@console.json_option
def plan(source: str, sample: int, as_json: bool, **given: Any) -> None:
    """Say what `vlp shard SOURCE` would write: records, shards, bytes, time; from the listing and a few pictures.

    Example: vlp shard plan photos/ --image-size 256
    """
    from data_pipelines import survey

    _own_pixel_limit()
    found = resolve(source, given)
    result = survey.plan(found, write_options(found, given), sample)
    console.emit(result, as_json, survey.plan_lines(result))


def _own_pixel_limit() -> None:
    from PIL import Image

    # Above half of its hard limit Pillow warns; our own limit decides there, and says so per picture.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def resolve(source: str, given: dict[str, Any]) -> Any:
    """The Source that the command line names, with the settings given on it."""
    from data_pipelines import sources

    settings = {setting: given[option] for option, setting in SETTINGS.items() if given[option] is not None}
    return sources.resolve(source, given["kind"], **settings)


def write_options(source: Any, given: dict[str, Any]) -> Any:
    """WriteOptions from the source's own defaults and the options given; None means not given."""
    from data_pipelines.pictures import WriteOptions

    chosen = {
        name: value for name, value in given.items()
        if value is not None and name in WriteOptions.model_fields
    }  # fmt: skip
    merged = dict(getattr(source.module, "WRITE", {})) | chosen
    if chosen.get("resize_mode") == "no" and "image_size" not in chosen:
        merged.pop("image_size", None)
    elif merged.get("image_size") is not None:
        merged.setdefault("resize_mode", "keep_ratio")
    elif "resize_only_if_bigger" in chosen:
        raise PipelineError("--resize-only-if-bigger/--resize-always has no effect without --image-size")
    return WriteOptions(**merged, fetch={name: given[name] for name in FETCH if given[name] is not None})


def run_time(given: dict[str, Any]) -> Any:
    """WriteOptions that hold only what does not shape the output."""
    from data_pipelines.pictures import WriteOptions

    chosen = {name: given[name] for name in ("workers", "on", "fetch_concurrency") if given[name] is not None}
    return WriteOptions(**chosen, fetch={name: given[name] for name in FETCH if given[name] is not None})
