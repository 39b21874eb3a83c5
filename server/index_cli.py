"""`vlp index build | import | export | push`. Heavy imports wait until a command runs."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_pipelines.console import CONTEXT, Group, emit, json_option, progress
from data_pipelines.errors import PipelineError
from data_pipelines.pictures import THUMBNAIL_SIDE, THUMBNAIL_SIDES

if TYPE_CHECKING:
    from server.index import Index, IndexInfo
    from server.index.folders import Modality
    from server.index.pictures import Thumbnailer
    from server.index.stores import Store

FOLDER = click.Path(path_type=Path)
MODALITY = click.option("--modality", type=click.Choice(["image", "text"]), default="image", show_default=True)
FIELDS = click.option("--field", "fields", multiple=True, help="Metadata column to keep and filter by; repeatable.")
COLLECTIONS = click.option("--collections", type=FOLDER, help="Folder of collections, as `vlp serve --collections`.")
QDRANT = click.option("--qdrant", metavar="URL", help="Qdrant server instead; key in VLP_QDRANT_API_KEY.")
THUMBNAILS = click.option(
    "--thumbnails", "side", type=click.IntRange(*THUMBNAIL_SIDES), is_flag=False, flag_value=THUMBNAIL_SIDE,
    metavar="[SIDE]", help=f"Keep small JPEGs of the pictures, SIDE pixels long ({THUMBNAIL_SIDE} when left out).",
)  # fmt: skip
PICTURES = click.option("--pictures", type=FOLDER, help="For these: the shards, or the folder that image_path is in.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Write points again that are there with this payload.")


@click.group(cls=Group, context_settings=dict(CONTEXT))
def index() -> None:
    """Search indexes: make, fill, export and move them."""


@index.command(
    epilog="""Examples:

\b
  vlp index build embeddings --out index
  vlp index build embeddings --out index --field width
  vlp index build embeddings --out index --thumbnails --pictures shards"""
)
@click.argument("embeddings", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Index folder; an index that is there is replaced.")
@MODALITY
@FIELDS
@THUMBNAILS
@PICTURES
@json_option
def build(
    embeddings: Path, out: Path, modality: str, fields: tuple[str, ...], side: int | None, pictures: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Build a Qdrant Edge index from EMBEDDINGS, a folder written by `vlp embed` or by clip-retrieval.

    Interrupted, it goes on where it was when it is called again.
    """
    _require_extra()
    from server.index.build import build_index, count_rows

    which = _modality(modality)
    thumbnailer = _thumbnailer(side, pictures, embeddings, which)
    with progress("indexing", count_rows(embeddings, which), unit="rows") as advance:
        info = build_index(embeddings, out, which, fields, advance, thumbnailer)
    told, told_lines = _told(thumbnailer)
    lines = [
        f"{info.points:,} {which} vectors of width {info.dim}, filtered by {', '.join(info.fields)}: {out}",
        *told_lines,
        f"serve it: vlp serve BUNDLE --index {out}",
    ]
    emit({"out": str(out), **info.model_dump(), **told}, as_json, lines)


@index.command(
    name="import",
    epilog="""Examples:

\b
  vlp index import embeddings --collections collections --name photos
  vlp index import clip-retrieval-folder --qdrant http://localhost:6333 --name photos --field width
  vlp index import embeddings --collections collections --name photos --thumbnails 96 --pictures photos""",
)
@click.argument("embeddings", type=FOLDER)
@click.option("--name", required=True, help="Collection; it is made when it is not there.")
@COLLECTIONS
@QDRANT
@MODALITY
@FIELDS
@THUMBNAILS
@PICTURES
@OVERWRITE
@json_option
def import_(
    embeddings: Path, name: str, collections: Path | None, qdrant: str | None, modality: str,
    fields: tuple[str, ...], side: int | None, pictures: Path | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Put every row of EMBEDDINGS, a folder of `vlp embed` or clip-retrieval, into a collection.

    Interrupted or called again, it leaves alone what has arrived. Point ids are row positions, or the column point_id.
    """
    _require_extra()
    from server.index.folders import batches, count_rows, info_of
    from server.index.transfer import put

    which = _modality(modality)
    thumbnailer = _thumbnailer(side, pictures, embeddings, which)
    info = info_of(embeddings, which, fields).model_copy(update={"thumbnails": side or 0})
    with _collection(collections, qdrant, name, info) as target:
        _same_model(info, target.info, name)
        if side:
            _same_thumbnails(side, target.info, name)
        kept = [field for field in target.info.fields if field not in ("key", "source", "labels")]
        wanted = sorted({*fields, *_present(embeddings, which, kept)})
        with progress("importing", count_rows(embeddings, which), unit="rows") as advance:
            rows = batches(embeddings, which, target.info.dim, wanted)
            written = put(rows, target, advance, overwrite, thumbnailer)
        compacted = _compact(target)
        points = target.info.points
        bare = thumbnailer is None and target.info.thumbnails > 0
    told, told_lines = _told(thumbnailer)
    lines = [f"{written:,} points written, {points:,} in collection {name!r}" + (", graph built" if compacted else "")]
    if bare:
        lines.append("those written have no thumbnails, as the others may: --thumbnails and --pictures make them")
    emit({"name": name, "written": written, "points": points, **told}, as_json, [*lines, *told_lines])


@index.command(
    epilog="""Examples:

\b
  vlp index export index --out embeddings
  vlp index export collections/photos --out embeddings
  vlp index export --qdrant http://localhost:6333 --name photos --out embeddings"""
)
@click.argument("source", type=FOLDER, required=False)
@click.option("--out", type=FOLDER, required=True, help="Embedding folder in clip-retrieval's layout.")
@click.option("--name", help="Collection, with --qdrant.")
@QDRANT
@json_option
def export(source: Path | None, out: Path, name: str | None, qdrant: str | None, as_json: bool) -> None:
    """Write the index folder SOURCE, or a collection of a Qdrant server, as an embedding folder.

    Interrupted, it goes on after the last whole part. Thumbnails stay behind: `vlp index push` takes them along.
    """
    _require_extra()
    from server.index.transfer import export as export_index

    if (source is None) == (qdrant is None) or (qdrant is None) != (name is None):
        raise PipelineError("export either an index folder, or --qdrant URL --name COLLECTION")
    with _opened(source, qdrant, name) as found:
        with progress("exporting", found.info.points, unit="points") as advance:
            parts = export_index(found, out, advance)
        points, side = found.info.points, found.info.thumbnails
    lines = [f"{points:,} points in {parts} parts: {out}", *(["their thumbnails are not among it"] if side else [])]
    emit({"out": str(out), "parts": parts, "points": points}, as_json, lines)


@index.command(
    epilog="""Examples:

\b
  vlp index push index --qdrant http://localhost:6333 --name photos
  vlp index push collections/photos --qdrant https://cluster.example:6333 --name photos"""
)
@click.argument("source", type=FOLDER)
@click.option("--qdrant", metavar="URL", required=True, help="Qdrant server or cluster; key in VLP_QDRANT_API_KEY.")
@click.option("--name", required=True, help="Collection there; it is made when it is not there.")
@OVERWRITE
@json_option
def push(source: Path, qdrant: str, name: str, overwrite: bool, as_json: bool) -> None:
    """Copy the index folder SOURCE to a Qdrant server or cluster. Called again, it sends what is missing."""
    _require_extra()
    from server.index.transfer import pages, put

    with _opened(source, None, None) as found, _collection(None, qdrant, name, found.info) as target:
        _same_model(found.info, target.info, name)
        if dict(target.info.fields) != dict(found.info.fields):
            raise PipelineError(f"collection {name!r} filters by other fields: {', '.join(target.info.fields)}")
        _same_thumbnails(found.info.thumbnails, target.info, name)
        with progress("pushing", found.info.points, unit="points") as advance:
            written = put(
                pages(found), target, advance, overwrite, lambda ids, _: list(map(found.thumbnails(ids).get, ids))
            )
        points = target.info.points
    lines = [f"{written:,} points sent, {points:,} in collection {name!r} of {qdrant}"]
    emit({"name": name, "written": written, "points": points}, as_json, lines)


def _thumbnailer(
    side: int | None, pictures: Path | None, embeddings: Path, modality: "Modality"
) -> "Thumbnailer | None":
    """What makes thumbnails; None where none are wanted. Raises PipelineError."""
    from server.index.pictures import Thumbnailer

    if (side is None) != (pictures is None):
        raise PipelineError("--thumbnails [SIDE] and --pictures FOLDER go together: how large, and of what")
    return None if side is None or pictures is None else Thumbnailer(pictures, embeddings, modality, side)


def _told(thumbnailer: "Thumbnailer | None") -> tuple[dict[str, object], list[str]]:
    """(part of the answer in JSON, lines) about the thumbnails that were made."""
    if thumbnailer is None:
        return {}, []
    made, lacking = thumbnailer.made, dict(thumbnailer.lacking)
    lines = [
        f"{made:,} thumbnails of up to {thumbnailer.side} pixels"
        + (f"; rows without one: {lacking}" if lacking else "")
    ]
    return {"thumbnails_made": made, "without_thumbnail": lacking}, lines


def _modality(text: str) -> "Modality":
    return "text" if text == "text" else "image"


@contextmanager
def _opened(source: Path | None, qdrant: str | None, name: str | None) -> "Iterator[Index]":
    """An index to read from."""
    from server.index.remote import EdgeProcess
    from server.index.stores import open_store

    if source is not None:
        found: Index = EdgeProcess(source)
        try:
            yield found
        finally:
            found.close()
        return
    store = open_store(None, qdrant)
    assert store is not None
    assert name is not None
    try:
        yield store.open(name)
    finally:
        store.close()


@contextmanager
def _collection(collections: Path | None, qdrant: str | None, name: str, info: "IndexInfo") -> "Iterator[Index]":
    """A collection to write to; made when it is not there."""
    from server.index.stores import NAME, open_store

    store: Store | None = open_store(collections, qdrant)
    if store is None:
        raise PipelineError("say where the collection is: --collections FOLDER or --qdrant URL")
    if NAME.fullmatch(name) is None:
        raise PipelineError(f"--name {name!r}: 1 to 64 letters, digits, _ and -, beginning with a letter or digit")
    try:
        fresh = info.model_copy(update={"points": 0, "indexed": 0, "shard": "edge", "format": 2})
        target = store.open(name) if name in store.names() else store.create(name, fresh)
        try:
            yield target
        finally:
            target.close()
    finally:
        store.close()


def _same_model(source: "IndexInfo", target: "IndexInfo", name: str) -> None:
    """Raises PipelineError when two models made the vectors: distances between them would mean nothing."""
    unlike = source.weights_sha256 and target.weights_sha256 and source.weights_sha256 != target.weights_sha256
    if source.dim != target.dim or unlike:
        raise PipelineError(
            f"collection {name!r} holds vectors of model {target.model or 'unknown'!r} (width {target.dim}), these are "
            f"of {source.model or 'unknown'!r} (width {source.dim}): choose another --name"
        )


def _same_thumbnails(side: int, target: "IndexInfo", name: str) -> None:
    """Raises PipelineError when a collection does not keep thumbnails of this side."""
    if target.thumbnails != side:
        raise PipelineError(
            f"thumbnails of {side} pixels, but collection {name!r} was made for {target.thumbnails or 'none'}: choose "
            "another --name"
        )


def _present(embeddings: Path, modality: "Modality", fields: list[str]) -> list[str]:
    """Those fields that the metadata has."""
    import pyarrow.parquet as pq

    from server.index.folders import parts_of

    names = set(pq.read_schema(parts_of(embeddings, modality)[0].table).names)
    return [field for field in fields if field in names]


def _compact(target: "Index") -> bool:
    """Build the graph of an embedded collection that has grown."""
    from server.index.remote import EdgeProcess
    from server.index.scan import ScanIndex

    engine = target.inner if isinstance(target, ScanIndex) else target
    return isinstance(engine, EdgeProcess) and engine.wants_compaction and engine.compact()


def _require_extra() -> None:
    """Say what to install when the serve extra is missing."""
    if importlib.util.find_spec("qdrant_edge") is None or importlib.util.find_spec("qdrant_client") is None:
        raise PipelineError("qdrant-edge-py and qdrant-client are not installed: pip install 'vlp[serve]'")
