"""From a folder of embeddings to an index of its own, with its graph; goes on where it was interrupted."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipelines.errors import PipelineError
from data_pipelines.files import fsync_dir, write_atomic
from server.index import IndexInfo
from server.index.edge import INFO, EdgeIndex, create_index, open_index, write_info
from server.index.folders import Modality, batches, count_rows, info_of, parts_of

__all__ = ["Modality", "build_index", "count_rows"]

STATE = "build.json"
"""In an unfinished index: of what it is, and how many rows are in it."""
SAVE_EVERY = 20
"""Batches between two states."""


def build_index(
    embeddings: Path,
    out: Path,
    modality: Modality,
    fields: Sequence[str],
    advance: Callable[[int], None],
) -> IndexInfo:
    """Index every row of `embeddings` into `out`, whole or not at all; an existing index there is replaced.

    `fields`: further metadata columns to keep as payload and to filter by. `advance` is told the rows done.
    Interrupted, it leaves `.<out>.building` and goes on there when it is called with the same again.
    """
    out = out.absolute()
    if out.exists() and not (out / INFO).exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(f"{out} exists and is not an index: choose another --out")
    info = info_of(embeddings, modality, fields)
    signature = _signature(embeddings, modality, info)
    building = out.with_name(f".{out.name}.building")
    index, start = _begin(building, info, signature)
    try:
        advance(start)
        _fill(index, embeddings, modality, fields, start, advance, lambda rows: _save(building, signature, rows))
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


def _signature(embeddings: Path, modality: Modality, info: IndexInfo) -> str:
    """Changes when the folder's files or what is made of them change."""
    parts = parts_of(embeddings, modality)
    files = sorted({path for part in parts for path in (part.array, part.table)})
    seen = [(str(path.relative_to(embeddings)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([seen, info.model_dump()]).encode()).hexdigest()


def _begin(building: Path, info: IndexInfo, signature: str) -> tuple[EdgeIndex, int]:
    """(index, rows that are in it already)."""
    try:
        state = json.loads((building / STATE).read_bytes())
        if state["signature"] == signature:
            write_info(building, info)
            return open_index(building), int(state["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it cannot be used
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    index = create_index(building, info)
    _save(building, signature, 0)
    return index, 0


def _save(building: Path, signature: str, rows: int) -> None:
    content = json.dumps({"signature": signature, "rows": rows}).encode()
    write_atomic(building / STATE, lambda stream: stream.write(content))


def _fill(
    index: EdgeIndex,
    embeddings: Path,
    modality: Modality,
    fields: Sequence[str],
    start: int,
    advance: Callable[[int], None],
    save: Callable[[int], None],
) -> None:
    rows = start
    for number, (ids, vectors_ND, payloads) in enumerate(
        batches(embeddings, modality, index.info.dim, fields, start), 1
    ):
        index.add(ids, vectors_ND, payloads)
        rows += len(ids)
        if number % SAVE_EVERY == 0:
            index.sync()
            save(rows)
        advance(len(ids))
