"""The files of an embedding folder, in clip-retrieval's layout. Torch-free: building an index needs no model.

    img_emb/img_emb_<n>.npy   text_emb/text_emb_<n>.npy   [N, D]
    metadata/metadata_<n>.parquet                         image_path (the key), caption, json columns
    embeddings.json                                       which model, which shards (ours; others ignore it)

Row i means the same sample in all three files. A part's metadata is written last: it marks the part as done.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import ValidationError

from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import PipelineError
from data_pipelines.reader import Sample
from data_pipelines.shard_files import COLUMNS

INFO = "embeddings.json"
EMBEDDERS: Mapping[str, str] = {"image": "img_emb", "text": "text_emb"}
"""Modality -> folder and file stem."""
FROM_COLUMNS = frozenset({"caption", "metadata", "image_path"})
"""Names the layout keeps for itself: a json field of this name is left out."""


class EmbedInfo(StrictModel):
    """Content of embeddings.json: what a folder was, or is being, made from."""

    format: int = 1
    model: str
    weights_sha256: str
    dim: int
    dtype: Literal["float32", "float16"]
    shards: dict[str, int]
    """Shard name -> bytes."""
    manifest_sha256: str = ""
    """Of the shards' manifest, where there is one."""


def read_embed_info(folder: Path) -> EmbedInfo | None:
    """embeddings.json; None for a folder another tool wrote."""
    path = folder / INFO
    if not path.is_file():
        return None
    try:
        return EmbedInfo.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise PipelineError(f"{path}: {explain(error)}") from error


def find_parts(folder: Path, stem: str) -> list[tuple[Path, Path]]:
    """(array, metadata) of every part in name order. Raises PipelineError when a part is incomplete."""
    tables = sorted((folder / "metadata").glob("metadata_*.parquet"))
    parts = [(folder / stem / f"{table.stem.replace('metadata', stem)}.npy", table) for table in tables]
    if not parts:
        raise PipelineError(f"{folder}: holds no embeddings; `vlp embed BUNDLE --data SHARDS --out DIR` makes some")
    lacking = [array for array, _ in parts if not array.is_file()]
    if lacking:
        raise PipelineError(f"{lacking[0]} is missing: {folder} has no complete {stem!r}; run `vlp embed` again")
    info = read_embed_info(folder)
    if info is not None and len(parts) != len(info.shards):
        raise PipelineError(f"{folder}: {len(parts)} of {len(info.shards)} parts are done; run `vlp embed` again")
    return parts


def own_caption(sample: Sample) -> str:
    """The caption that stands for a sample: its first, or the empty text."""
    return sample.captions[0] if sample.captions else ""


def metadata_table(samples: Sequence[Sample]) -> pa.Table:
    """One row per sample: image_path, caption, then the json columns, nested ones flattened with dots."""
    rows = [dict(_flatten(sample.columns)) for sample in samples]
    names = dict.fromkeys(name for row in rows for name in row)  # in order of appearance
    columns = {
        "image_path": pa.array([sample.key for sample in samples], pa.string()),
        "caption": pa.array([own_caption(sample) for sample in samples], pa.string()),
    }
    for name in names:
        if name not in FROM_COLUMNS:
            columns[name] = _column(name, [row.get(name) for row in rows])
    return pa.table(columns)


def _flatten(columns: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in columns.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _column(name: str, values: list[Any]) -> pa.Array:
    """Values with the type the shards give this column, else their common type, else as text."""
    known = COLUMNS.get(name)
    if known is not None and not pa.types.is_list(known):
        try:
            return pa.array(values, known)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pass  # a shard of another tool uses the name for something else
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, list) and all(isinstance(v, str) for v in value) for value in present):
        return pa.array(values, pa.list_(pa.string()))
    kinds = {type(value) for value in present}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in present):
        return pa.array(values, pa.int64())
    if float in kinds and kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([_text(value) for value in values], pa.string())


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
