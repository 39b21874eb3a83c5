"""Embeddings of a shard folder on disk: one part per shard, resumable. The files are described in `embed_files`."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch

from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, PipelineError
from data_pipelines.files import sha256_file, write_atomic
from data_pipelines.images import MAX_PIXELS
from data_pipelines.ledger import Ledger
from data_pipelines.preprocess import load_image
from data_pipelines.reader import Sample, Shard, open_shards
from data_pipelines.records import MANIFEST
from data_pipelines.stream import cut, in_blocks
from vlp.bundle import WEIGHTS, Bundle, find_bundle
from vlp.embed_files import INFO, EmbedInfo, metadata_table, own_caption, read_embed_info
from vlp.infer import encode_pixels, encode_texts

BATCH = 256


class EmbedResult(StrictModel):
    """Outcome of a run."""

    rows: int
    """Rows in the folder now, earlier runs included."""
    parts: int
    reused: int
    """Parts that were already there."""
    skipped: dict[str, int]
    """Reason -> samples left out in this run."""


def weights_digest(bundle_path: Path) -> str:
    """What identifies a model in embeddings and indexes: sha256 of its weights file."""
    path = find_bundle(bundle_path) / WEIGHTS
    return sha256_file(path) if path.is_file() else ""


def embed_shards(
    bundle: Bundle,
    weights_sha256: str,
    data: Path,
    out: Path,
    dtype: Literal["float32", "float16"] = "float32",
    progress: Callable[[int], None] = lambda step: None,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    captions: bool = True,
) -> EmbedResult:
    """Embed pictures and captions of all shards in `data` into `out`, leaving out parts that are done.

    A sample's first caption is embedded (the empty text where it has none); without `captions`, pictures alone. Raises
    PipelineError when `out` holds embeddings of another model or other shards, unless `overwrite` says to replace them.
    """
    shards = open_shards(data)
    info = EmbedInfo(
        model=bundle.name,
        weights_sha256=weights_sha256,
        dim=bundle.dim,
        dtype=dtype,
        shards={shard.path.name: shard.path.stat().st_size for shard in shards},
        manifest_sha256=sha256_file(data / MANIFEST) if (data / MANIFEST).is_file() else "",
    )
    if overwrite and (out / INFO).is_file():
        shutil.rmtree(out)
    _claim(out, info)
    digits = len(str(len(shards)))  # clip-retrieval: floor(log10(parts)) + 1
    ledger = Ledger()
    rows = reused = 0
    wanted = ("img_emb", "text_emb") if captions else ("img_emb",)
    for number, shard in enumerate(shards):
        name = f"{number:0{digits}d}"
        table = out / "metadata" / f"metadata_{name}.parquet"
        if table.is_file() and all((out / stem / f"{stem}_{name}.npy").is_file() for stem in wanted):
            reused += 1
            progress(len(shard))
        else:
            _embed_part(bundle, shard, out, name, np.dtype(dtype), ledger, progress, max_pixels, captions)
        rows += pq.read_metadata(table).num_rows
    if not rows:
        raise PipelineError(f"{data}: not one sample could be embedded ({dict(ledger.quarantined)})")
    return EmbedResult(rows=rows, parts=len(shards), reused=reused, skipped=dict(ledger.quarantined))


def _claim(out: Path, info: EmbedInfo) -> None:
    """Make `out` the folder of `info`, or refuse."""
    there = read_embed_info(out)
    if there is not None and there != info:
        different = [name for name in EmbedInfo.model_fields if getattr(there, name) != getattr(info, name)]
        if different == ["model"] and info.weights_sha256:
            return  # the same model from another folder
        raise PipelineError(
            f"{out}: holds embeddings made with another {', '.join(different)}: use another --out, or --overwrite"
        )
    if there is None and out.is_dir() and any(out.iterdir()):
        raise PipelineError(f"{out} is not empty and holds no {INFO}: choose another --out")
    content = info.model_dump_json(indent=2).encode()
    write_atomic(out / INFO, lambda stream: stream.write(content))


def _embed_part(
    bundle: Bundle,
    shard: Shard,
    out: Path,
    name: str,
    dtype: np.dtype[Any],
    ledger: Ledger,
    progress: Callable[[int], None],
    max_pixels: int,
    captions: bool,
) -> None:
    image_rows = [np.empty((0, bundle.dim), np.float32)]
    text_rows = [np.empty((0, bundle.dim), np.float32)]
    samples: list[Sample] = []
    threads = max(2, torch.get_num_threads())
    for decoded in in_blocks(lambda row: _decode(shard, row, bundle, max_pixels), cut(len(shard), BATCH), threads):
        good = list(_account(decoded, ledger))
        if good:
            image_rows.append(encode_pixels(bundle, torch.stack([pixels for _, pixels in good])).numpy())
            if captions:
                text_rows.append(_text_rows(bundle, [own_caption(sample) for sample, _ in good]))
            samples.extend(sample for sample, _ in good)
        progress(len(decoded))
    for stem, rows in (("img_emb", image_rows), *([("text_emb", text_rows)] if captions else [])):
        array = np.concatenate(rows).astype(dtype)
        write_atomic(out / stem / f"{stem}_{name}.npy", lambda stream, array=array: np.save(stream, array))  # type: ignore[misc]
    table = metadata_table(samples)
    write_atomic(out / "metadata" / f"metadata_{name}.parquet", lambda stream: pq.write_table(table, stream))


def _text_rows(bundle: Bundle, captions: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """ND; equal captions are embedded once."""
    places = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    found: np.ndarray[Any, np.dtype[np.float32]] = encode_texts(bundle, list(places)).numpy()
    return found[[places[caption] for caption in captions]]


def _decode(shard: Shard, row: int, bundle: Bundle, max_pixels: int) -> tuple[Sample, torch.Tensor] | BadSample:
    try:
        sample = shard.read(row)
        return sample, load_image(sample.image, bundle.image, max_pixels)
    except BadSample as error:
        return BadSample(error.reason, f"{shard.path.name}: row {row}: {error}")


def _account(
    decoded: Sequence[tuple[Sample, torch.Tensor] | BadSample], ledger: Ledger
) -> Iterator[tuple[Sample, torch.Tensor]]:
    for item in decoded:
        if isinstance(item, BadSample):
            ledger.bad(item)
        else:
            ledger.good()
            yield item
