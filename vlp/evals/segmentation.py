"""Zero-shot segmentation by patches: every place of the model's map against texts (MaskCLIP, arXiv 2112.01071).

Truth is the json column `segments`: a grid of cells over the stored picture, in runs; without it the boxes stand for
their objects, the smaller on top, which counts a box's corners as object too. A place's truth is what covers most of
it, in the geometry in which the model sees the picture; places outside of the picture and objects that are none of the
labels do not count. Suffixes: N pictures, G cells of the truth on a side, C classes, H, W places of the model's map.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, MissingField, PipelineError
from data_pipelines.geometry import Placement, placement
from data_pipelines.ledger import Ledger
from data_pipelines.preprocess import ImageConfig, decode, fit
from data_pipelines.reader import Sample
from data_pipelines.records import BOX_FIELDS
from data_pipelines.shard_set import ShardSet, Train
from data_pipelines.stream import Decoded, cut, decoded_blocks
from vlp import distributed
from vlp.detection.modality import Modality
from vlp.detection.segment import Classes, classes_of, dense_embeddings, sized
from vlp.evals._encode import Encoder, together
from vlp.evals._labels import Labels, LabelSet, Templates, label_set
from vlp.infer import BATCH, make_prompts

Truth = Literal["segments", "boxes"]
FINE = 8
"""Points on a side of a place at which the truth is looked up."""
BOX_GRID = 64
"""Cells on a side in which boxes are painted."""
OUTSIDE = -1
"""No truth: outside of the picture, or an object that is none of the labels."""


class Config(StrictModel):
    """Options of `segmentation`."""

    labels: Labels | None = None
    """Classes: a list, a file (one per line; json list; json {label: [synonyms]}); default those of the truth."""
    truth: Truth | None = None
    """segments: the column of masks. boxes: weaker. Default segments where the shards have them."""
    background: tuple[str, ...] = ()
    """Texts of what is no object: together one more class. None: every place is taken for an object, and those without
    one do not count."""
    templates: Templates = ("{}",)
    """Prompts of the classes, as for zero-shot."""
    modality: Modality = "rgb"
    """What the model sees; edges: the student of dense_distill."""
    size: int | None = None
    """Side of the model's input, where its tower takes others; default its own."""


def run(encoder: Encoder, data: Train | Path, config: Config) -> Iterator[tuple[str, float]]:
    """miou, accuracy, dead_classes; iou/NAME of every class of the truth; pictures, skipped."""
    shards = ShardSet(data)
    truth = config.truth or ("segments" if _has_segments(shards) else "boxes")
    labels = config.labels or label_set(dict.fromkeys(_names(shards, truth, data), ()))
    named = dict(zip(labels.names, labels.texts, strict=True))
    classes = classes_of(named, config.background)
    prototype_PD = encoder.prompts([make_prompts(texts, config.templates) for texts in classes.texts])
    image = sized(encoder.bundle.image, config.size)

    def read(sample: Sample) -> Decoded:
        picture_CHW, full_size = decode(sample.image, image)
        owner_GG = _owners(sample, truth, labels, first=len(classes.names) - len(labels.names))
        columns = {"owner": owner_GG, "size": full_size}
        return Decoded(sample.key, fit(picture_CHW, full_size, image), (), (), sample.source, columns)

    counts_CC, pictures, ledger = _count(encoder, shards, read, classes, prototype_PD, image, config.modality)
    if not pictures:
        raise PipelineError(f"{data}: not one sample can be used ({dict(ledger.quarantined)})")
    yield from scores(counts_CC, classes.names, with_background=bool(config.background))
    yield "pictures", float(pictures)
    yield "skipped", float(ledger.quarantined.total())


def _count(
    encoder: Encoder, shards: ShardSet, read: Any, classes: Classes, prototype_PD: Tensor, image: ImageConfig,
    modality: Modality,
) -> tuple[Tensor, int, Ledger]:  # fmt: skip
    """(CC: places by truth and answer, pictures, ledger) of all ranks; each takes a run of blocks."""
    owners_P, count, ledger = torch.tensor(classes.owners), len(classes.names), Ledger()

    def work() -> tuple[Tensor, int]:
        blocks = cut(len(shards), BATCH)
        share = distributed.share(len(blocks))
        counts_CC, pictures = torch.zeros(count, count, dtype=torch.int64), 0
        threads = max(2, torch.get_num_threads())
        for block in decoded_blocks(shards, blocks[share.start : share.stop], read, ledger, threads):
            if not block:
                continue
            pixels_NCSS = torch.stack([sample.pixels for sample in block])
            features_NDHW = dense_embeddings(encoder.bundle, pixels_NCSS, image, modality)
            taken_NHW = owners_P[torch.einsum("pd,ndhw->nphw", prototype_PD, features_NDHW).argmax(dim=1)]
            for sample, taken_HW in zip(block, taken_NHW, strict=True):
                truth_HW = truth_of(sample.columns["owner"], sample.columns["size"], image, taken_HW.shape)
                counts_CC += confusion(truth_HW, taken_HW, count)
            pictures += len(block)
            encoder.advance(len(block))
        return counts_CC, pictures

    counts_CC, pictures = together(work)
    whole = Ledger()
    for report in distributed.from_all_ranks(ledger.report()):
        whole.add(report)
    whole.check()
    found = distributed.from_all_ranks((counts_CC.tolist(), pictures))
    return sum((torch.tensor(part) for part, _ in found), torch.zeros_like(counts_CC)), sum(n for _, n in found), whole


def confusion(truth_HW: Tensor, taken_HW: Tensor, classes: int) -> Tensor:
    """CC int64: places by truth (row) and answer (column), those without truth left out."""
    known_HW = truth_HW >= 0
    pairs = truth_HW[known_HW] * classes + taken_HW[known_HW]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def scores(counts_CC: Tensor, names: Sequence[str], with_background: bool) -> Iterator[tuple[str, float]]:
    """Intersection over union of every class of the truth, means, and the classes that are never answered.

    miou is over the objects' classes; miou_with_background counts the background as one more.
    """
    hits_C, truth_C, taken_C = counts_CC.diagonal().double(), counts_CC.sum(dim=1), counts_CC.sum(dim=0)
    iou_C = hits_C / (truth_C + taken_C - hits_C).clamp(min=1)
    there = [number for number in range(len(names)) if truth_C[number]]
    objects = [number for number in there if number or not with_background]
    yield "miou", _mean(iou_C[objects])
    if with_background:
        yield "miou_with_background", _mean(iou_C[there])
    yield "accuracy", float(hits_C.sum() / counts_CC.sum().clamp(min=1))
    yield "dead_classes", float(sum(int(taken_C[number]) == 0 for number in objects))
    yield "classes", float(len(objects))
    yield "places", float(counts_CC.sum())
    for number in there:
        yield f"iou/{names[number]}", float(iou_C[number])


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def truth_of(owner_GG: Tensor, full_size: tuple[int, int], image: ImageConfig, grid: Sequence[int]) -> Tensor:
    """HW int64: what covers most of every place of a map of the model's input, of a grid over the whole picture.

    Each place is asked at FINE x FINE points; between equally frequent answers the smallest number is taken.
    """
    rows, columns = grid
    across, down = ((torch.arange(n * FINE, dtype=torch.float64) + 0.5) / (n * FINE) for n in (columns, rows))
    place = placement(full_size, image)
    x, y = _fractions(place, across, 0, full_size[1]), _fractions(place, down, 1, full_size[0])
    cells = owner_GG.shape[0]
    column, row = ((value * cells).floor().long() for value in (x, y))
    inside = ((y >= 0) & (y < 1))[:, None] & ((x >= 0) & (x < 1))[None]
    seen = owner_GG[row.clamp(0, cells - 1)[:, None], column.clamp(0, cells - 1)[None]]
    fine = torch.where(inside, seen, OUTSIDE).view(rows, FINE, columns, FINE)
    return fine.transpose(1, 2).reshape(rows, columns, -1).mode(dim=2).values


def _fractions(place: Placement, fractions: Tensor, axis: int, length: int) -> Tensor:
    """Fractions of the model's square to fractions of the picture, along one axis."""
    boxes = np.zeros((len(fractions), 4))
    boxes[:, axis] = fractions
    return torch.from_numpy(place.to_original(boxes)[:, axis] / length)


def _owners(sample: Sample, truth: Truth, labels: LabelSet, first: int) -> Tensor:
    """GG int64: class of every cell; 0 or OUTSIDE where nothing is, OUTSIDE for an object that is none of the labels.

    `first`: number of the first label, 1 with a background. Raises BadSample.
    """
    numbers = {label: first + number for label, number in labels.numbers.items()}
    nothing = 0 if first else OUTSIDE
    if truth == "segments":
        names, cells_GG = read_segments(sample.columns.get("segments"), sample.key)
        known = torch.tensor([nothing, *(numbers.get(name, OUTSIDE) for name in names)])
        return known[cells_GG]
    owner_GG = torch.full((BOX_GRID, BOX_GRID), nothing)
    for box in sorted(_boxes(sample), key=lambda box: -(box["x1"] - box["x0"]) * (box["y1"] - box["y0"])):
        rows, columns = ((round(box[a] * BOX_GRID), round(box[b] * BOX_GRID)) for a, b in (("y0", "y1"), ("x0", "x1")))
        owner_GG[slice(*rows), slice(*columns)] = numbers.get(box["label"], OUTSIDE)
    return owner_GG


def read_segments(value: Any, key: str) -> tuple[tuple[str, ...], Tensor]:
    """(names, GG int64: 0 for nothing, k for names[k - 1]) of a column `segments`. Raises BadSample.

    {"grid": G, "names": [...], "runs": [value, length, value, length, ...]}, row by row, as json or as its text.
    """
    try:
        found: Mapping[str, Any] = json.loads(value) if isinstance(value, str) else value
        side, names, runs = int(found["grid"]), tuple(map(str, found["names"])), torch.tensor(found["runs"])
        cells = torch.repeat_interleave(runs[0::2], runs[1::2])
        if len(cells) != side * side or not 0 <= int(cells.min()) <= int(cells.max()) <= len(names):
            raise ValueError(f"{len(cells)} cells of a grid of {side} x {side}, values up to {int(cells.max())}")
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise BadSample("bad_segments", f"{key}: {error}") from error
    return names, cells.view(side, side)


def _boxes(sample: Sample) -> Iterable[Mapping[str, Any]]:
    boxes = sample.columns.get("boxes") or ()
    for box in boxes:
        if not all(name in box for name in BOX_FIELDS):
            raise BadSample("bad_boxes", f"{sample.key}: {box}")
    return boxes


def _has_segments(shards: ShardSet) -> bool:
    """By the first sample that can be read."""
    for number in range(len(shards)):
        try:
            return shards.read(number).columns.get("segments") is not None
        except BadSample:
            continue
    return False


def _names(shards: ShardSet, truth: Truth, data: Train | Path) -> list[str]:
    """All names of the truth, sorted. Raises MissingField without any."""
    names: set[str] = set()
    for number in range(len(shards)):
        try:
            sample = shards.read(number)
            if truth == "boxes":
                names |= {str(box["label"]) for box in _boxes(sample)}
            elif sample.columns.get("segments") is not None:
                names |= set(read_segments(sample.columns["segments"], sample.key)[0])
        except BadSample:
            continue  # counted when the pictures are read
    if not names:
        raise MissingField(f"{data}: no sample carries segments or boxes, which this task needs")
    return sorted(names)
