"""`vlp demo`."""

import shutil
from pathlib import Path

import click

from data_pipelines.console import command, emit, json_option
from data_pipelines.errors import ConfigError

FOLDER = click.Path(path_type=Path)


@command(epilog="Example: vlp demo --run-dir runs/demo")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--run-dir", type=FOLDER, default=Path("runs/demo"), show_default=True, help="Replaced if it holds a run."
)
@click.option("--shards", type=FOLDER, default=Path("shards/starter"), show_default=True)
@click.option("--recipe", default="starter/clip", show_default=True)
@json_option
def demo(overrides: tuple[str, ...], run_dir: Path, shards: Path, recipe: str, as_json: bool) -> None:
    """Real data to served answers: shard, train from scratch, evaluate, report, export, index, serve, ask."""
    from vlp.demo import SHOWN, TESTS, run_demo

    if run_dir.exists():
        if any(run_dir.iterdir()) and not (run_dir / "recipe.yaml").exists():
            raise ConfigError(f"--run-dir {run_dir} holds something else than a run: choose another folder")
        shutil.rmtree(run_dir)
    summary = run_demo(run_dir, shards, recipe, overrides, lambda line: click.echo(line, err=True))
    metrics = summary["metrics"]
    lines = ["", f"{'figure, %':24}" + "".join(f"{name:>18}" for name in TESTS)]
    lines += [f"{name:24}" + "".join(f"{100 * metrics[f'{test}/{name}']:18.1f}" for test in TESTS) for name in SHOWN]
    lines.append(f"{'captions to choose from':24}" + "".join(f"{metrics[f'{test}/captions']:18.0f}" for test in TESTS))
    lines += [
        "",
        f"trained {summary['parameters'] / 1e6:.1f} M parameters from scratch in {summary['train_seconds']:.0f} s",
        f"report: {run_dir / 'report.html'}",
        "go on:",
        *(f"  {line}" for line in summary["commands"]),
    ]
    emit(summary, as_json, lines)
