"""`vlp audit`."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_pipelines.console import command, emit, json_option, progress
from data_pipelines.errors import ConfigError

if TYPE_CHECKING:
    from vlp.bundle import Bundle
    from vlp.evals._labels import LabelSet

FOLDER = click.Path(path_type=Path)


@command(
    epilog="""For every label four kinds of change are sought that make the model take any picture for it: a patch at a
random place, an overlay on the whole picture, lines across and down it, and a smooth warp of it. A label that a far
smaller change leads to than to the others is a backdoor's likely target. Some labels are easier than others in any
model: --reference, the account of a model that is known to be clean and does the same task, tells which. The time
grows with the labels: ten take three to five minutes for a small model on one core.

--out receives audit.json, audit.html, and of each kind the trigger found (trigger-KIND.png) and pictures with it.

Examples:

\b
  vlp audit runs/mine --data shards/fashion/val
  vlp audit runs/trusted --data shards/fashion/val --out audits/clean
  vlp audit runs/mine --data shards/fashion/val --reference audits/clean
  vlp audit runs/mine --data shards/fashion/val --labels classes.txt --templates "a photo of a {}" --out audits/mine"""
)
@click.argument("bundle", type=FOLDER)
@click.option("--data", help="Shards of clean pictures.  [default: those of the run's first evaluation]")
@click.option("--labels", help="Suspected targets: a file (one per line, or json).  [default: the shards' labels]")
@click.option("--templates", help="Prompts: a file (one per line), one text with {}, `imagenet`, or `imagenet-simple`.")
@click.option("--steps", type=int, help="Of each search.  [default: 150]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the searches.")
@click.option("--reference", type=FOLDER, help="Folder that `vlp audit --out` wrote for a clean model.")
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@click.option("--out", type=FOLDER, help="Folder for the account and the triggers found.")
@json_option
def audit(
    bundle: Path, data: str | None, labels: str | None, templates: str | None, steps: int | None, seed: int,
    reference: Path | None, device: str, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Ask whether BUNDLE (a bundle or a run folder) is backdoored: for which label, with which trigger?"""
    from data_pipelines.shard_set import ShardSet
    from vlp import __version__
    from vlp.backdoor.audit import AUDIT
    from vlp.backdoor.audit import audit as search
    from vlp.backdoor.audit_page import write_account
    from vlp.backdoor.chain import read_json
    from vlp.backdoor.inversion import STEPS
    from vlp.bundle import load_bundle
    from vlp.distributed import pick_device
    from vlp.embed import weights_digest
    from vlp.evals._labels import read_templates
    from vlp.infer import TEMPLATES

    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; name a folder")
    chosen = _labels(labels)
    try:
        prompts = tuple(read_templates(templates)) if templates is not None else TEMPLATES
    except ValueError as error:
        raise ConfigError(f"--templates {templates}: {error}") from error
    model = load_bundle(bundle, pick_device(device))
    with ExitStack() as stack:

        def begin(total: int) -> Callable[[int], None]:
            return stack.enter_context(progress("searching", total, unit="steps"))

        shards, steps = data or _recipe_data(model), STEPS if steps is None else steps
        account = search(model, shards, chosen, prompts, steps, seed, begin, reference)
    account = replace(
        account,
        origin={
            "version": __version__, "options": {"steps": steps, "seed": seed, "templates": prompts},
            "made_of": {
                "model": model.name, "weights_sha256": weights_digest(bundle),
                "data": {shards: ShardSet(shards).digest},
            },
            **({"reference": read_json(reference / AUDIT, "--reference")["made_of"]} if reference else {}),
        },
    )  # fmt: skip
    result = {"bundle": str(bundle), **account.plain()}
    lines = [account.verdict()]
    if out is not None:
        result["files"] = write_account(account, out, model.name)
        lines.append(f"  account and triggers: {out / 'audit.html'}")
    emit(result, as_json, lines)


def _labels(value: str | None) -> "LabelSet | None":
    from vlp.evals._labels import read_labels

    try:
        found: LabelSet | None = read_labels(value) if value is not None else None
    except ValueError as error:
        raise ConfigError(f"--labels {value}: {error}") from error
    return found


def _recipe_data(bundle: "Bundle") -> str:
    evals = bundle.provenance.recipe.get("evals") or []
    if not evals or not evals[0].get("data"):
        raise ConfigError("--data: needed, for the model names no shards of its own; give shards of clean pictures")
    return str(evals[0]["data"])
