"""`vlp curate`: labels made by a model, as sidecar files."""

from pathlib import Path
from typing import Any

import click

from data_pipelines.console import CONTEXT, Group, emit, json_option, progress

FOLDER = click.Path(path_type=Path)


@click.group(cls=Group, context_settings=dict(CONTEXT))
def curate() -> None:
    """Label pictures with a model. Shards stay as they are: a parquet by sample key is joined while streaming."""


def _shared(function: Any) -> Any:
    """What both commands take."""
    for add in reversed((
        click.argument("bundle", type=FOLDER),
        click.option("--data", type=FOLDER, required=True, multiple=True, help="Folder of shards; may be repeated."),
        click.option("--out", type=FOLDER, required=True, help="The parquet to write."),
        click.option("--embeddings", type=FOLDER, help="Where embeddings are kept for the next time; default: cache."),
        click.option("--device", default="auto", show_default=True, help="torch device, for example cuda"),
        json_option,
    )):  # fmt: skip
        function = add(function)
    return function


def _embed(bundle: Path, data: tuple[Path, ...], embeddings: Path | None, device: str) -> tuple[Any, Any]:
    """(the bundle, the embedded pictures)."""
    from data_pipelines.reader import open_shards
    from vlp.bundle import load_bundle
    from vlp.curate.pictures import embed_pictures
    from vlp.distributed import pick_device

    model = load_bundle(bundle, pick_device(device))
    total = sum(len(shard) for folder in data for shard in open_shards(folder))
    with progress("embedding", total, unit="pictures") as advance:
        return model, embed_pictures(bundle, model, data, embeddings, advance)


@curate.command(
    epilog="""Examples:

\b
  vlp curate cluster runs/demo --data shards/starter/train --k 100 --closest 3 --out clusters.parquet
  vlp train mine.yaml data.clusters=clusters.parquet"""
)
@click.option("--k", required=True, type=int, help="Clusters: about one for 25 to 400 pictures.")
@click.option("--closest", default=1, show_default=True, help="Labels per picture: its closest centres.")
@click.option("--capacity", type=float, help="A cluster comes first for at most so many times the mean size.")
@click.option("--iterations", default=25, show_default=True, help="At most; it ends when the clusters settle.")
@click.option("--fit-rows", type=int, help="Pictures the centres are fitted on; default 256 per cluster.")
@click.option("--seed", default=0, show_default=True)
@_shared
def cluster(
    bundle: Path,
    data: tuple[Path, ...],
    out: Path,
    embeddings: Path | None,
    device: str,
    as_json: bool,
    k: int,
    closest: int,
    capacity: float | None,
    iterations: int,
    fit_rows: int | None,
    seed: int,
) -> None:
    """Cluster pictures by BUNDLE's embeddings (k-means) and write the closest clusters of each.

    `data.clusters` of a recipe takes the file: it fills the batch field `cluster_ids`.
    """
    from vlp.curate import cluster as curation

    options = curation.Options(k, closest, capacity, iterations, fit_rows, seed)
    model, pictures = _embed(bundle, data, embeddings, device)
    with progress("clustering", unit="pictures") as advance:
        result = curation.cluster(pictures, out, options, model.device, advance)
    sizes = result["sizes"]
    lines = [
        f"{result['pictures']:,} pictures in {k:,} clusters after {result['iterations']} iterations: {out}",
        f"  pictures in a cluster: {sizes['min']:,} to {sizes['max']:,}, median {sizes['median']:,.0f}",
        f"  empty: {result['empty']}; mean cosine with the centre: {result['cosine']:.3f}",
        f"train with it: data.clusters={out}",
    ]
    emit({"bundle": str(bundle), **result}, as_json, lines)


@curate.command(
    epilog="""Examples:

\b
  vlp curate entity runs/demo --data shards/starter/train --out entities.parquet
  vlp curate entity runs/demo --data shards/photos --entities names.json --share 0.6 --out entities.parquet
  vlp train mine.yaml data.clusters=entities.parquet data.labels.sidecar=entities.parquet

names.json holds {name: [aliases]} or {name: {"aliases": [...], "description": "..."}}; a text file a name per line."""
)
@click.option("--entities", type=FOLDER, help="Names and aliases; default: frequent phrases of the texts.")
@click.option("--texts", help="Column that holds the texts; default: the captions.")
@click.option("--share", default=0.75, show_default=True, help="Share of the pairs of picture and entity to keep.")
@click.option("--threshold", type=float, help="Keep pairs from this cosine on, in place of --share.")
@click.option("--min-count", default=5, show_default=True, help="Pictures that an entity needs to stay.")
@click.option("--prompt", default="{}", show_default=True, help="Template around the name of an entity.")
@click.option("--fuzzy/--exact", default=True, show_default=True, help="Whether a letter of a name may be wrong.")
@click.option("--truth", help="Column of labels to compare with: adds precision and recall to the account.")
@_shared
def entity(
    bundle: Path,
    data: tuple[Path, ...],
    out: Path,
    embeddings: Path | None,
    device: str,
    as_json: bool,
    entities: Path | None,
    texts: str | None,
    share: float,
    threshold: float | None,
    min_count: int,
    prompt: str,
    fuzzy: bool,
    truth: str | None,
) -> None:
    """Label pictures with entities of their texts that BUNDLE sees in them.

    `data.clusters` of a recipe takes the file for the batch field `cluster_ids`, `data.labels.sidecar` for labels.
    """
    from vlp.curate import entity as curation

    options = curation.Options(entities, texts, share, threshold, min_count, prompt, fuzzy, truth)
    options.check()
    model, pictures = _embed(bundle, data, embeddings, device)
    with progress("linking", len(pictures), unit="pictures") as advance:
        result = curation.label_entities(pictures, model, out, options, advance)
    lines = [
        f"{result['labelled']:,} of {result['pictures']:,} pictures have one of {result['entities']:,} entities: {out}",
        f"  {result['pairs']:,} of {result['pairs_raw']:,} pairs kept, from cosine {result['threshold']:.3f} on",
        f"  {result['lost']:,} of {result['mentioned']:,} entities lost all pictures: {result['entities_table']}",
    ]
    if truth is not None:
        lines.append(
            f"  against {truth}: precision {result['precision_raw']:.3f} before selection, {result['precision']:.3f} "
            f"after, {result['recall']:.3f} of the right pairs kept"
        )
    emit({"bundle": str(bundle), **result}, as_json, [*lines, f"train with it: data.clusters={out}"])
