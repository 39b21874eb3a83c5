"""`vlp eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from data_pipelines.console import command, emit, json_option, progress
from data_pipelines.errors import ConfigError, MissingField
from data_pipelines.mirror import as_url

FOLDER = click.Path(path_type=Path)


@command(
    "eval",
    epilog="""Tasks and their options (--set):

\b
  retrieval     pictures find captions and back: R@1, R@5, R@10, median rank
                captions=5  duplicates=merge|keep
  zero-shot     labels as texts: top1, top5, mean per class, mAP with several labels
                labels  templates  column=labels|cls|COLUMN  multi=true|false
  knn           labels from the nearest pictures of --train
                k=20  temperature=0.07  labels  column  multi
  linear-probe  logistic regression fitted on --train: accuracy, or mAP with several labels
                penalties=[1,0.1,...]  validation=0.2  iterations=100  share=1  seed=0  labels  column  multi
  label-retrieval  pictures find pictures with the same label, names of labels find theirs: mAP, P@1, P@5
                match=first|any  templates  labels  column
  label-alignment  do the features order pairs as the labels do: Spearman's rank correlation
                pairs=500000  seed=0  labels  column
  geometry      effective rank, RankMe, alignment, uniformity, modality gap
                alpha=2  t=2
  detection     boxes of shards: AP, AP50, base and novel apart; labels of given boxes; shift sensitivity
                measures=[ap,regions,shift]  labels  base=[...]  frequencies=FILE  templates  frozen=BUNDLE
                scoring={ensemble: true, ...}  shift_pictures=128
  segmentation  places of the model's map against the masks or boxes of shards: miou, and of every class
                labels  truth=segments|boxes  background=[...]  templates  modality=rgb|grey|edges  size
  backdoor      accuracy, and the share that triggers of `vlp poison` mislead, beside a clean twin
                attacks=[FILE.poison.json]  control=BUNDLE  target  labels  templates  column
  all           every task that the data and the options given allow

Shards are a folder, a list or URLs of tars, as for data.train in a recipe. A training run with the same task and
options under `evals:` writes the same numbers to evals.jsonl. Below torchrun, all ranks share the work.

Examples:

\b
  vlp eval runs/demo --data shards/starter/unseen_vendor
  vlp eval runs/demo/bundle --data shards/starter/val --task zero-shot --templates "a photo of a {}." --json
  vlp eval runs/demo --data shards/imagenet/val --task zero-shot --labels imagenet --templates imagenet --set column=cls
  vlp eval runs/demo --data shards/starter/val --task knn --task linear-probe --train shards/starter/train --set k=10
  torchrun --nproc-per-node 2 -m vlp eval runs/demo --data shards/starter/val --task all""",
)
@click.argument("bundle", type=FOLDER)
@click.option("--data", required=True, help="Shards to evaluate on.")
@click.option("--task", "tasks", multiple=True, default=("retrieval",), show_default=True, help="May be repeated.")
@click.option("--train", help="Shards that knn and linear-probe learn from.")
@click.option("--labels", help="Classes: a file (one per line, or json {label: [synonyms]}), or `imagenet`.")
@click.option("--templates", help="Prompts: a file (one per line), one text with {}, `imagenet`, or `imagenet-simple`.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of a task; may be repeated.")
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@json_option
def evaluate(
    bundle: Path,
    data: str,
    tasks: tuple[str, ...],
    train: str | None,
    labels: str | None,
    templates: str | None,
    settings: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Evaluate BUNDLE (a bundle, a run folder or an exported open_clip folder) on shards.

    With one task its metrics stand as they are; with several they begin with the name of their task.
    """
    from vlp import distributed, evals
    from vlp.bundle import load_bundle

    named = {"train": train, "labels": labels, "templates": templates}
    options = {key: value for key, value in named.items() if value is not None} | dict(map(_setting, settings))
    chosen = _share_out(tasks, options)
    with distributed.left_at_the_end():
        lead = distributed.set_up(device)[0] == 0
        with progress("embedding", enabled=lead, unit="pictures") as advance:
            encoder = evals.Encoder(load_bundle(bundle, distributed.pick_device(device)), advance)
            found: dict[str, dict[str, float]] = {}
            for task, own in chosen.items():
                try:
                    found[task] = evals.evaluate(encoder, task, data, own)
                except MissingField as error:
                    if "all" not in tasks:
                        raise
                    if lead:
                        click.echo(f"{task} is left out: {error}", err=True)
    if not lead:
        return
    metrics = {f"{task}/{key}": value for task, own in found.items() for key, value in own.items()}
    metrics = metrics if len(chosen) > 1 else next(iter(found.values()))
    result = {"bundle": as_url(bundle) or str(bundle), "data": data, "task": ", ".join(found), "metrics": metrics}
    emit(result, as_json, [f"{name:36} {value:{'.4f' if value >= 1e-3 else '.4g'}}" for name, value in metrics.items()])


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: expected key=value, for example k=10")
    return key, yaml.safe_load(value)


def _share_out(tasks: Sequence[str], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Task -> the options it knows, all checked. Raises ConfigError for what no task knows or a task lacks."""
    from vlp import evals

    fields = {task: evals.load(task).Config.model_fields for task in (evals.tasks() if "all" in tasks else tasks)}
    unknown = sorted(set(options).difference(*fields.values()))
    if unknown:
        known = "; ".join(f"{task}: {', '.join(names)}" for task, names in fields.items())
        raise ConfigError(f"unknown option {unknown[0]!r}; known: {known}")
    chosen = {}
    for task, names in fields.items():
        lacking = [key for key, field in names.items() if field.is_required() and key not in options]
        if lacking and "all" not in tasks:
            raise ConfigError(f"task {task} needs --{lacking[0]}")
        if not lacking:
            chosen[task] = {key: value for key, value in options.items() if key in names}
            evals.check_options(task, chosen[task])
    return chosen
