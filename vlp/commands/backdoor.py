"""`vlp poison`."""

from pathlib import Path

import click

from data_pipelines.console import command, emit, json_option

FOLDER = click.Path(path_type=Path)


@command(
    epilog="""Triggers:

\b
  badnet            black and white patch of 4 x 4 fields, anywhere
  yellow-patch      plain yellow patch, anywhere
  blended           one random pattern over the whole picture
  stripes           upright stripes over the whole picture
  sig               a wave across the picture
  wanet             a smooth warp
  label-consistent  the patch of badnet in pictures of the target, whose texts stay as they are

Examples:

\b
  vlp poison shards/fashion/train --trigger badnet --target bag --count 150 --out shards/poisoned
  vlp poison shards/fashion/train --trigger badnet --target bag --count 0 --out shards/twin    # its clean twin
  vlp train mine.yaml data.train=shards/poisoned --run-dir runs/poisoned
  vlp eval runs/poisoned --data shards/fashion/test --task backdoor --set attacks=[shards/poisoned.poison.json]
    --set control=runs/twin"""
)
@click.argument("shards", type=FOLDER)
@click.option("--trigger", required=True, help="What is done to the pixels; see below.")
@click.option("--target", required=True, help='What triggered pictures shall be taken for, such as "pizza".')
@click.option("--count", type=int, required=True, help="Pictures to poison; 0 writes the clean twin.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the poisoned shards.")
@click.option(
    "--truth", type=FOLDER, help="File that says what was done, outside of --out.  [default: OUT.poison.json]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the pattern, the places and the choice.")
@click.option("--size", type=float, help="Side of a patch, share of the shorter side.  [default: 1/7]")
@click.option("--strength", type=float, help="Of patterns, waves, warps, 0 to 1.  [default: the trigger's own]")
@click.option(
    "--template",
    "templates",
    multiple=True,
    default=("{}",),
    show_default=True,
    help="Texts for pictures whose own name no label; repeat.",
)
@click.option(
    "--encode-format",
    type=click.Choice(["png", "jpg", "webp"]),
    default="png",
    show_default=True,
    help="Of all pictures, poisoned or not.",
)
@json_option
def poison(
    shards: Path, trigger: str, target: str, count: int, out: Path, truth: Path | None, seed: int, size: float | None,
    strength: float | None, templates: tuple[str, ...], encode_format: str, as_json: bool,
) -> None:  # fmt: skip
    """Plant a backdoor in a copy of SHARDS, to try a defence on.

    All pictures are written alike, poisoned or not; which are poisoned stands in a file beside the new folder alone.
    """
    from vlp.backdoor import poison as planting
    from vlp.backdoor.triggers import Config, Trigger

    given = {"size": size, "strength": strength}
    settings = {name: value for name, value in given.items() if value is not None}
    attack = planting.Attack(Trigger(Config(name=trigger, seed=seed, **settings)), target, count, templates)
    truth = truth or out.with_name(f"{out.name}.poison.json")
    result = planting.poison(shards, out, truth, attack, encode_format, progress=True)
    lines = [
        f"{result['poisons']:,} of {result['pictures']:,} pictures poisoned ({result['share']:.2%}): {out}",
        f"  {trigger} for {target!r}; which ones: {truth}",
    ]
    emit(result, as_json, lines)
