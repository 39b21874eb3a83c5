"""`vlp eval`."""

from pathlib import Path

import click

from data_pipelines.console import command, emit, json_option

FOLDER = click.Path(path_type=Path)


@command(
    "eval",
    epilog="""Examples:

\b
  vlp eval runs/demo --data shards/starter/unseen_vendor
  vlp eval runs/demo/bundle --data shards/starter/val --task zero-shot --json""",
)
@click.argument("bundle", type=FOLDER)
@click.option("--data", type=FOLDER, required=True, help="Folder of shards.")
@click.option("--task", default="retrieval", show_default=True, help="retrieval | zero-shot")
@click.option("--device", default="auto", show_default=True)
@json_option
def evaluate(bundle: Path, data: Path, task: str, device: str, as_json: bool) -> None:
    """Evaluate BUNDLE (a bundle, a run folder or an exported open_clip folder) on a folder of shards."""
    from vlp import evals
    from vlp.bundle import load_bundle, pick_device

    metrics = evals.evaluate(load_bundle(bundle, pick_device(device)), task, data)
    result = {"bundle": str(bundle), "data": str(data), "task": task, "metrics": metrics}
    emit(result, as_json, [f"{name:32} {value:.4f}" for name, value in metrics.items()])
