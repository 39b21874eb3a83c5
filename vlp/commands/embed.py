"""`vlp embed`."""

from pathlib import Path

import click

from data_pipelines.console import command, emit, json_option, progress

FOLDER = click.Path(path_type=Path)


@command(
    epilog="""Example:

\b
  vlp embed runs/demo --data shards/starter/val --out embeddings
  vlp index build embeddings --out index
  vlp serve runs/demo --index index""",
)
@click.argument("bundle", type=FOLDER)
@click.option("--data", type=FOLDER, required=True, help="Folder of shards.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the arrays; an interrupted run goes on there.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@click.option("--overwrite", is_flag=True, help="Replace embeddings of another model or other shards.")
@json_option
def embed(bundle: Path, data: Path, out: Path, dtype: str, device: str, overwrite: bool, as_json: bool) -> None:
    """Embed pictures and captions of shards with BUNDLE, in clip-retrieval's folder layout."""
    from data_pipelines.reader import open_shards
    from vlp.bundle import load_bundle
    from vlp.distributed import pick_device
    from vlp.embed import embed_shards, weights_digest

    total = sum(len(shard) for shard in open_shards(data))
    model = load_bundle(bundle, pick_device(device))
    with progress("embedding", total, unit="samples") as advance:
        result = embed_shards(
            model,
            weights_digest(bundle),
            data,
            out,
            "float16" if dtype == "float16" else "float32",
            advance,
            overwrite=overwrite,
        )
    content = {"bundle": str(bundle), "data": str(data), "out": str(out), "dim": model.dim, **result.model_dump()}
    lines = [f"{result.rows:,} embeddings of width {model.dim} in {result.parts} parts: {out}"]
    if result.reused:
        lines.append(f"{result.reused} parts were already there")
    if result.skipped:
        lines.append(f"skipped: {result.skipped}")
    emit(content, as_json, [*lines, f"search them: vlp index build {out} --out INDEX"])
