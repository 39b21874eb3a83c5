"""`vlp export`."""

from pathlib import Path

import click

from data_pipelines.console import command, emit, json_option

FOLDER = click.Path(path_type=Path)


@command(
    epilog="""Examples:

\b
  vlp export runs/demo --format open_clip --out exported
  vlp export runs/demo --format hf --out for-transformers
  vlp export runs/demo --format onnx --out for-onnxruntime"""
)
@click.argument("bundle", type=FOLDER)
@click.option(
    "--format", "form", type=click.Choice(["open_clip", "hf", "onnx"]), default="open_clip", show_default=True
)
@click.option("--out", type=FOLDER, required=True, help="New folder.")
@json_option
def export(bundle: Path, form: str, out: Path, as_json: bool) -> None:
    """Write BUNDLE for others, with the same features.

    open_clip: a `local-dir:` of open_clip. hf: CLIPModel and CLIPProcessor of transformers, for models they can
    express. onnx: image.onnx and text.onnx, from normalised pixels and token ids to normalised embeddings.
    """
    from vlp.bundle import load_bundle
    from vlp.export import export as run_export

    result = run_export(load_bundle(bundle), form, out)
    lines = [f"wrote {result['out']}"]
    if "max_abs_difference" in result:
        found = ", ".join(f"{name} {value:.1e}" for name, value in result["max_abs_difference"].items())
        lines.append(f"loaded again and compared; highest difference of a feature: {found}")
    emit(
        {"format": form, **result}, as_json, [*lines, "use it:", *(f"  {line}" for line in result["use"].splitlines())]
    )
