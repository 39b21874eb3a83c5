"""From a folder of embeddings to an index of its own, with its graph; goes on where it was interrupted."""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipelines.errors import PipelineError
from data_pipelines.files import fsync_dir, write_atomic
from server.index import IndexInfo
from server.index.edge import INFO, EdgeIndex, create_index, open_index, write_info
from server.index.folders import Batch, Modality, batches, count_rows, info_of, parts_of
from server.index.pictures import Thumbnailer

__all__ = ["Modality", "build_index", "count_rows"]

STATE = "build.json"
"""In an unfinished index: of what it is, how many rows are in it, and how many of them got thumbnails."""
SAVE_EVERY = 20
"""Batches between two states."""


def build_index(
    embeddings: Path,
    out: Path,
    modality: Modality,
    fields: Sequence[str],
    advance: Callable[[int], None],
    thumbnailer: Thumbnailer | None = None,
) -> IndexInfo:
    """Index every row of `embeddings` into `out`, whole or not at all; an existing index there is replaced.

    `fields`: further metadata columns to keep as payload and to filter by. `advance` is told the rows done.
    `thumbnailer`: makes thumbnails to keep beside the points, and counts them.
    Interrupted, it leaves `.<out>.building` and goes on there when it is called with the same again.
    """
    out = out.absolute()
    if out.exists() and not (out / INFO).exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(f"{out} exists and is not an index: choose another --out")
    info = info_of(embeddings, modality, fields)
    if thumbnailer is not None:
        info = info.model_copy(update={"thumbnails": thumbnailer.side})
    signature = _signature(embeddings, modality, info, thumbnailer)
    building = out.with_name(f".{out.name}.building")
    index, start = _begin(building, info, signature, thumbnailer)
    try:
        advance(start)
        rows = start
        for number, batch in enumerate(batches(embeddings, modality, info.dim, fields, start), 1):
            _add(index, batch, thumbnailer)
            rows += len(batch[0])
            if number % SAVE_EVERY == 0:
                index.sync()
                _save(building, signature, rows, thumbnailer)
            advance(len(batch[0]))
        index.finish()
    except PipelineError:  # the source has to be put right first
        index.close()
        shutil.rmtree(building)
        raise
    except BaseException:
        index.close()
        raise
    info = index.info
    index.close()
    (building / STATE).unlink()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        building.rename(out)
    fsync_dir(out.parent)
    return info


def _signature(embeddings: Path, modality: Modality, info: IndexInfo, thumbnailer: Thumbnailer | None) -> str:
    """Changes when the folder's files or what is made of them change."""
    parts = parts_of(embeddings, modality)
    files = sorted({path for part in parts for path in (part.array, part.table)})
    seen = [(str(path.relative_to(embeddings)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    pictures = "" if thumbnailer is None else str(thumbnailer.root)
    return hashlib.sha256(json.dumps([seen, info.model_dump(), pictures]).encode()).hexdigest()


def _begin(building: Path, info: IndexInfo, signature: str, thumbnailer: Thumbnailer | None) -> tuple[EdgeIndex, int]:
    """(index, rows that are in it already)."""
    try:
        state = json.loads((building / STATE).read_bytes())
        if state["signature"] == signature:
            write_info(building, info)
            if thumbnailer is not None:
                thumbnailer.made, thumbnailer.lacking = state["made"], Counter(state["lacking"])
            return open_index(building), int(state["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it cannot be used
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    index = create_index(building, info)
    _save(building, signature, 0, thumbnailer)
    return index, 0


def _save(building: Path, signature: str, rows: int, thumbnailer: Thumbnailer | None) -> None:
    made = {} if thumbnailer is None else {"made": thumbnailer.made, "lacking": thumbnailer.lacking}
    content = json.dumps({"signature": signature, "rows": rows, **made}).encode()
    write_atomic(building / STATE, lambda stream: stream.write(content))


def _add(index: EdgeIndex, batch: Batch, thumbnailer: Thumbnailer | None) -> None:
    ids, vectors_ND, payloads = batch
    if thumbnailer is not None:
        index.thumbs.put(zip(ids, thumbnailer(ids, payloads), strict=True))
    index.add(ids, vectors_ND, payloads)
