"""`vlp guard`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_pipelines.console import command, emit, json_option, progress

if TYPE_CHECKING:
    from vlp.backdoor.guard import Mode

FOLDER = click.Path(path_type=Path)


@command(
    epilog="""Modes:

\b
  fast      averages of up to 8 layers in the later half of the image tower
  standard  averages and deviations of these layers
  thorough  averages and deviations of up to 16 layers of the whole tower; finds no more in the trials so far

Examples:

\b
  vlp guard runs/demo --data shards/starter/val --out guard.safetensors
  vlp serve runs/demo --guard guard.safetensors"""
)
@click.argument("bundle", type=FOLDER)
@click.option("--data", type=FOLDER, required=True, help="Shards of clean pictures, not those of the training.")
@click.option("--out", type=FOLDER, required=True, help="The guard, one safetensors file.")
@click.option(
    "--labels",
    type=FOLDER,
    help="Labels, one a line or json.  [default: the shards', where every picture carries one; else clusters of them]",
)
@click.option(
    "--template", "templates", multiple=True, default=("{}",), show_default=True, help="Prompts of labels; repeat."
)
@click.option("--fpr", type=float, default=0.01, show_default=True, help="Share of clean pictures to be flagged.")
@click.option("--mode", type=click.Choice(["fast", "standard", "thorough"]), default="standard", show_default=True)
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@json_option
def guard(
    bundle: Path, data: Path, out: Path, labels: Path | None, templates: tuple[str, ...], fpr: float, mode: "Mode",
    device: str, as_json: bool,
) -> None:  # fmt: skip
    """Learn from clean pictures how BUNDLE sees them, so that `vlp serve --guard` can flag triggered ones.

    It flags pictures whose triggers the model answers to, not every picture that carries one.
    """
    from data_pipelines.errors import ConfigError
    from data_pipelines.shard_set import ShardSet
    from vlp.backdoor.guard import MOST, fit_guard, save_guard
    from vlp.bundle import load_bundle
    from vlp.distributed import pick_device
    from vlp.embed import weights_digest
    from vlp.evals._labels import read_labels, read_templates, sole_labels
    from vlp.infer import label_head

    model = load_bundle(bundle, pick_device(device))
    try:
        names = read_labels(labels).names if labels is not None else sole_labels(data)
        head = label_head(model, names, read_templates(templates)) if names else None
    except ValueError as error:
        raise ConfigError(f"--labels, --template: {error}") from error
    total = min(MOST, len(ShardSet(data)))
    with progress("looking", total, unit="pictures") as advance:
        info, profile = fit_guard(model, weights_digest(bundle), data, mode, fpr, head, advance)
    save_guard(out, info, profile)
    classes = f"{info.classes} {'labels' if names else 'clusters'}"
    lines = [
        f"{len(info.layers)} layers of {info.model!r}, fitted on {info.fitted:,} pictures of {classes}: {out}",
        f"  threshold {info.threshold:.3f} from {info.calibrated:,} others, of which {info.fpr:.2%} lie above",
        f"serve with it: vlp serve {bundle} --guard {out}",
    ]
    emit({"out": str(out), **info.model_dump(mode="json")}, as_json, lines)
