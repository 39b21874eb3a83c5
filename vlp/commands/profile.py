"""`vlp profile`."""

from datetime import datetime, timezone
from pathlib import Path

import click

from data_pipelines.console import command, emit, json_option


@command(
    epilog="""Examples:

\b
  vlp profile starter/clip
  vlp profile starter/clip run.processes=1 data.batch_size=64 --steps 50 --trace"""
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--steps", type=int, default=20, show_default=True, help="Steps measured, after three to warm up.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results; default runs/profile-<utc>.")
@click.option("--trace", is_flag=True, help="Also write trace.json of two more steps, for perfetto.dev.")
@json_option
def profile(recipe: str, overrides: tuple[str, ...], steps: int, out: Path | None, trace: bool, as_json: bool) -> None:
    """Take some real training steps of RECIPE and show where their time goes; nothing is kept of the training."""
    from vlp.distributed import env_rank
    from vlp.profile import headline
    from vlp.profile import profile as run_profile
    from vlp.recipe import load_recipe

    folder = out or Path("runs") / f"profile-{datetime.now(timezone.utc).strftime('%Y%m%d-%H%M%S')}"
    result = run_profile(load_recipe(recipe, overrides), folder, steps, trace)
    if env_rank() > 0:
        return
    phases = result["phases"].items()
    lines = [f"{name:14} {1e3 * part['seconds']:10,.2f} ms {100 * part['share']:6.1f} %" for name, part in phases]
    emit(result, as_json, [headline(result), *lines, *(f"wrote {name}" for name in result["files"])])
