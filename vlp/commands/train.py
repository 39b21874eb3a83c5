"""`vlp train`, `vlp recipes`, `vlp objectives`."""

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipelines.console import Group, command, emit, json_option
from data_pipelines.errors import ConfigError
from data_pipelines.mirror import as_url

if TYPE_CHECKING:
    from vlp.mirror import Mirror

EXIT_INTERRUPTED = {2: 130, 10: 138, 15: 143}
"""Signal -> exit code; a scheduler tells a preempted run from a failed one by it."""


@command(
    epilog="""Examples:

\b
  vlp train starter/clip
  vlp train starter/clip optim.lr=1e-3 run.steps=100 --run-dir runs/short
  vlp train starter/clip --run-dir runs/short --resume
  vlp train mine.yaml --run-dir s3://bucket/runs/mine"""
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Folder or URL; default runs/<utc>-<recipe>.")
@click.option("--resume", is_flag=True, help="Continue the run in --run-dir from its newest checkpoint.")
@click.option("--dry-run", is_flag=True, help="Build everything, take no step, say what would happen.")
@json_option
def train(
    recipe: str, overrides: tuple[str, ...], run_dir: Path | None, resume: bool, dry_run: bool, as_json: bool
) -> None:
    """Train RECIPE (a name from `vlp recipes` or a YAML file), with dotted KEY=VALUE changes."""
    from vlp.recipe import load_recipe

    resolved = load_recipe(recipe, overrides)
    if resume and run_dir is None:
        raise ConfigError("--resume needs --run-dir, the folder of the run to continue")
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    folder = (
        run_dir
        or Path("runs") / f"{stamp}-{Path(recipe).stem if recipe.endswith('.yaml') else recipe.replace('/', '-')}"
    )
    mirror = None
    if url := as_url(folder):
        mirror, folder = _mirrored(url, resume)
    if dry_run:
        result = _describe(resolved, folder)
        emit(result, as_json, [f"{key}: {value}" for key, value in result.items()])
        return
    from vlp.distributed import env_rank
    from vlp.report import write_report
    from vlp.train import Interrupted
    from vlp.train import train as run_training

    try:
        summary = run_training(resolved, folder, resume, mirror=mirror)
    except Interrupted as stop:
        if env_rank() == 0:
            click.echo(str(stop), err=True)
        raise SystemExit(EXIT_INTERRUPTED.get(stop.signal_number, 1)) from stop
    finally:
        if mirror is not None and env_rank() == 0 and folder.is_dir():
            mirror.end(finished=False)  # how it ended
    if env_rank() > 0:
        return
    report = write_report(folder)
    if mirror is not None:
        mirror.end(finished=True)
    emit(
        {**summary, "report": str(report)},
        as_json,
        [
            *(f"{name:40} {value:.4g}" for name, value in summary["metrics"].items()),
            f"trained {summary['steps']} steps in {summary['train_seconds']} s",
            f"bundle  {summary['bundle']}",
            f"report  {report}",
        ],
    )


def _mirrored(url: str, resume: bool) -> "tuple[Mirror, Path]":
    """The run at a URL and its copy here. Raises ConfigError where either holds a run that was not asked for."""
    from vlp.distributed import env_rank
    from vlp.mirror import Mirror

    mirror = Mirror(url)
    if not resume and env_rank() == 0:
        if mirror.exists():
            raise ConfigError(f"{url} holds a run already: continue it with --resume, or choose another --run-dir")
        if (mirror.folder / "checkpoints").exists():
            raise ConfigError(
                f"{url} is empty, but its copy {mirror.folder} holds a run: --resume sends it, or remove it"
            )
    return mirror, mirror.folder


def _describe(recipe: Any, folder: Path) -> dict[str, Any]:
    from vlp.memory import estimate
    from vlp.run import prepare

    run = prepare(recipe, folder)
    return {
        "run_dir": str(folder),
        "device": str(run.device),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "trainable": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "objective_trainable": sum(p.numel() for p in run.objective.parameters() if p.requires_grad),
        "vocabulary": run.tokenizer.vocab_size,
        "samples": run.loader.plan.samples,
        "steps_per_epoch": run.loader.plan.steps,
        "steps": run.total,
        "gflops_per_sample": round(run.flops.sample(recipe.data.image.size, recipe.tokenizer.context_length) / 1e9, 3),
        **{f"memory_gb_{name}": value for name, value in estimate(run).items()},
    }


@click.group(cls=Group, invoke_without_command=True, epilog="Example: vlp recipes cp starter/clip my.yaml")
@json_option
@click.pass_context
def recipes(ctx: click.Context, as_json: bool) -> None:
    """List the recipes that come with vlp; `show` prints one, `cp` copies it to a file to change."""
    from vlp.recipe import load_recipe, recipe_names

    if ctx.invoked_subcommand is None:
        found = {name: load_recipe(name).description for name in recipe_names()}
        emit({"recipes": found}, as_json, [f"{name:28} {text}" for name, text in found.items()])


@recipes.command(epilog="Example: vlp recipes show starter/clip")
@click.argument("name")
@click.option("--resolved", is_flag=True, help="With every default filled in.")
@json_option
def show(name: str, resolved: bool, as_json: bool) -> None:
    """Print recipe NAME."""
    from vlp.recipe import dump, load_recipe, recipe_text

    text = dump(load_recipe(name)) if resolved else recipe_text(name)
    emit({"name": name, "text": text}, as_json, [text.rstrip()])


@recipes.command(epilog="Example: vlp recipes cp starter/clip my.yaml")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path))
@json_option
def cp(name: str, target: Path, as_json: bool) -> None:
    """Copy recipe NAME to the file TARGET, which `vlp train` then accepts."""
    from vlp.recipe import recipe_text

    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"target {str(target)!r}: the file name must end in .yaml")
    if target.exists():
        raise ConfigError(f"target {str(target)!r} exists; choose another name")
    target.write_text(recipe_text(name), encoding="utf-8")
    emit({"name": name, "file": str(target)}, as_json, [f"{target}: change it, then vlp train {target}"])


@command(epilog="Example: vlp objectives --json")
@click.option("--markdown", is_flag=True, help="As the table of the README.")
@json_option
def objectives(markdown: bool, as_json: bool) -> None:
    """List the training objectives: paper, batch fields needed, how ranks share them, recipe, claims and verdicts."""
    from vlp.claims.results import read_rows, zoo, zoo_table
    from vlp.commands.runs import columns

    rows = read_rows()
    found = zoo(rows)
    head = ("objective", "paper", "needs", "coupling", "recipe", "claim: verdict")
    table = [
        (
            name,
            row["paper"],
            ", ".join(row["needs"]),
            row["coupling"],
            row["recipe"] or "none",
            ", ".join(f"{claim}: {state}" for claim, state in row["claims"].items()) or "none",
        )
        for name, row in found.items()
    ]
    emit({"objectives": found}, as_json, [zoo_table(rows)] if markdown else columns([head, *table]))
