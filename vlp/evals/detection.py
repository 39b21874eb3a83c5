"""Open-vocabulary detection on shards with boxes: average precision, region classification, and shift sensitivity.

- ap: COCO's average precision of the detector that fine-tuning made; base and novel classes apart (as DITO, Kim et al.
  2023, arXiv 2310.00161), rare, common and frequent ones where `frequencies` says which are; `alone/...` is the
  detector's score without the frozen tower
- regions: which label is taken for a box of the truth. region_top1 by the region head, region_top1_ensemble by both,
  region_top1_image by the image-level tower alone, its features averaged in the box
- shift: mean of 1 - cosine between the features of the same piece of a picture in two crops half a window apart

A model without a detector's parts is asked for region_top1_image and shift, one that saw no box yet for all but ap.
Boxes and areas are those of the stored picture. Suffixes: B pictures, M boxes, K classes, C channels, D embedding
width, S side of the input, H, W places of a map.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, ConfigError, MissingField, PipelineError
from data_pipelines.geometry import placement
from data_pipelines.ledger import Ledger
from data_pipelines.preprocess import decode, fit, normalise
from data_pipelines.reader import Sample
from data_pipelines.rows import read_boxes
from data_pipelines.shard_set import ShardSet, Train
from data_pipelines.stream import Decoded, cut, decoded_blocks
from vlp import distributed
from vlp.bundle import Bundle, load_bundle
from vlp.detection.boxes import is_valid
from vlp.detection.infer import Detection, Detector, View, in_pixels
from vlp.detection.maps import MapTower, maps_of
from vlp.detection.model import NAME, ROI_BASE, has_parts
from vlp.detection.roi import roi_mean
from vlp.detection.scores import Options, merge_labels, normal_form
from vlp.detection.window import WindowConfig
from vlp.evals._coco import Marked, precisions, read_frequencies, require_library, summary
from vlp.evals._encode import Encoder, together
from vlp.evals._labels import Labels, LabelSet, Templates, label_set
from vlp.infer import BATCH, label_head

Measure = Literal["ap", "regions", "shift"]
AT_ONCE = 8
"""Pictures that go through the tower together."""
WINDOWS = 4
"""Windows a side that half a window is of, for a tower without windows."""
EVERYTHING = 0.0
"""Threshold of score unless another is asked for: precision is measured at every recall."""
Metrics = Iterator[tuple[str, float]]


class Config(StrictModel):
    """Options of `detection`."""

    measures: tuple[Measure, ...] | None = Field(None, min_length=1)
    """ap, regions, shift; default all that the model can do."""
    labels: Labels | None = None
    """Classes: a list, a file (one per line; json list; json {label: [synonyms of the boxes' labels]}); default the
    labels of the boxes."""
    base: tuple[str, ...] | None = None
    """Base classes; all others are novel. Default those of the model's fine-tuning."""
    frequencies: Annotated[dict[str, str], BeforeValidator(read_frequencies)] | None = None
    """{class: training pictures} as a mapping or a json file, or LVIS annotations: rare, common and frequent apart."""
    templates: Templates | None = None
    """Prompts of the classes, as for zero-shot; default those of the model's fine-tuning."""
    scoring: Options = Options(threshold=EVERYTHING)
    """How boxes are scored and chosen, as for `vlp detect`; its threshold is 0 unless given."""
    frozen: Path | None = None
    """Image-level bundle that scores regions as well; default the one that the run started from."""
    shift_pictures: int = Field(128, ge=1)
    """So many pictures are shifted, rounded up to whole batches."""


@dataclass(slots=True)
class Judged:
    """One picture: the marks that AP is made of, and what the other measures found."""

    marked: Marked
    alone: Sequence[tuple[int, float, tuple[float, float, float, float]]] = ()
    """What the detector finds without the frozen tower."""
    regions: dict[str, list[int]] = field(default_factory=dict)
    """Measure -> class that is taken for each box of `region_truth`."""
    region_truth: list[int] = field(default_factory=list)
    shift: float | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """The models and the options of one evaluation."""

    detector: Detector | None
    image: Bundle
    """The image-level tower."""
    labels: tuple[str, ...]
    measures: tuple[Measure, ...]
    scoring: Options


def run(encoder: Encoder, data: Train | Path, config: Config) -> Metrics:
    """AP, AP50, AP75, by group; region_top1 and its kin; shift_sensitivity; classes, boxes, pictures, skipped."""
    shards = ShardSet(data)
    classes = config.labels or label_set(dict.fromkeys(_names(shards, data), ()))
    job = _job(encoder.bundle, config, classes)
    judged, skipped = _judge_all(encoder, shards, classes, job, config.shift_pictures)
    if not judged:
        raise PipelineError(f"{data}: not one sample can be used")
    if not any(item.marked.truth for item in judged):
        raise PipelineError(f"{data}: no box carries one of the labels {', '.join(classes.names[:5])} ...")
    groups = _groups(classes.names, _base(config, job), config.frequencies)
    if "ap" in job.measures:
        most = job.scoring.top_k
        yield from summary(precisions([item.marked for item in judged], len(classes.names), most), groups)
        if job.scoring.ensemble:
            alone = [replace(item.marked, found=item.alone) for item in judged]
            for name, value in summary(precisions(alone, len(classes.names), most), groups):
                yield f"alone/{name}", value
    yield from _region_metrics(judged, groups)
    shifts = [item.shift for item in judged if item.shift is not None]
    if shifts:
        yield "shift_sensitivity", sum(shifts) / len(shifts)
    yield "classes", float(len({kind for item in judged for kind, _ in item.marked.truth}))
    yield "boxes", float(sum(len(item.marked.truth) for item in judged))
    yield "pictures", float(len(judged))
    yield "skipped", float(skipped)


def _job(bundle: Bundle, config: Config, classes: LabelSet) -> Job:
    able = NAME in bundle.parts or (bundle.folder is not None and has_parts(bundle.folder))
    asked = config.measures or ()
    if config.frozen is not None and not able:
        raise ConfigError(f"frozen={config.frozen} has no effect: {bundle.name} holds no parts of a detector")
    frozen = load_bundle(config.frozen, bundle.device) if config.frozen else None
    detector = Detector.of(bundle, frozen) if able or "ap" in asked else None
    image = detector.frozen if detector else bundle
    fitted = detector is not None and detector.parts.info.stage == "finetune"
    can: dict[Measure, bool] = {"ap": fitted, "regions": True, "shift": _half_window(bundle, detector) is not None}
    if "shift" in asked and not can["shift"]:
        raise ConfigError(
            f"measures: {bundle.name} has a map of one place, so nothing of it can shift: leave shift out"
        )
    labels = merge_labels(classes.names)
    if len(labels) < len(classes.names):
        raise ConfigError("labels: two of them differ in capitals or spaces alone: leave one out")
    scoring = config.scoring
    if "threshold" not in scoring.model_fields_set:
        scoring = scoring.model_copy(update={"threshold": EVERYTHING})
    if config.templates is not None:
        if scoring.templates is not None:
            raise ConfigError("templates and scoring.templates are both given: leave one out")
        scoring = scoring.model_copy(update={"templates": tuple(config.templates)})
    measures = asked or tuple(name for name, able in can.items() if able)
    if "ap" in measures:
        require_library()
    return Job(detector, image, labels, measures, scoring)


def _judge_all(
    encoder: Encoder, shards: ShardSet, classes: LabelSet, job: Job, shifted: int
) -> tuple[list[Judged], int]:
    """(every usable picture in order, how many are not), by all ranks; each takes a run of blocks."""
    ledger, image = Ledger(), encoder.bundle.image

    def read(sample: Sample) -> Decoded:
        picture_CHW, full_size = decode(sample.image, image)
        columns = {"boxes": read_boxes(sample.columns.get("boxes")), "size": full_size}
        return Decoded(sample.key, fit(picture_CHW, full_size, image), (), (), sample.source, columns)

    def work() -> list[Judged]:
        found: list[Judged] = []
        blocks = cut(len(shards), BATCH)
        share = distributed.share(len(blocks))
        mine = blocks[share.start : share.stop]
        threads = max(2, torch.get_num_threads())
        for block, samples in zip(mine, decoded_blocks(shards, mine, read, ledger, threads), strict=True):
            for first in range(0, len(samples), AT_ONCE):
                found += _judge(encoder.bundle, samples[first : first + AT_ONCE], classes, job, block.start < shifted)
            encoder.advance(len(samples))
        return found

    mine = together(work)
    whole = Ledger()
    for report in distributed.from_all_ranks(ledger.report()):
        whole.add(report)
    whole.check()
    return [item for part in distributed.from_all_ranks(mine) for item in part], whole.quarantined.total()


@torch.inference_mode()
def _judge(bundle: Bundle, samples: Sequence[Decoded], classes: LabelSet, job: Job, shifted: bool) -> list[Judged]:
    pixels_BCSS = torch.stack([sample.pixels for sample in samples])
    judged = [Judged(_truth(sample, classes)) for sample in samples]
    if "ap" in job.measures or "regions" in job.measures:
        _look(bundle, samples, pixels_BCSS, judged, job)
    if shifted and "shift" in job.measures:
        half, window = _half_window(bundle, job.detector), _window(job.detector)
        assert half is not None  # or it would not be among the measures
        changes_B = shift_change(maps_of(bundle.model), pixels_BCSS.to(bundle.device), bundle, window, half)
        for item, change in zip(judged, changes_B.tolist(), strict=True):
            item.shift = change
    return judged


def _truth(sample: Decoded, classes: LabelSet) -> Marked:
    """The boxes whose labels are known, in pixels of the stored picture."""
    height, width = sample.columns["size"]
    known = [(classes.numbers[label], box) for *box, label in sample.columns["boxes"] if label in classes.numbers]
    truth = [(kind, (x0 * width, y0 * height, x1 * width, y1 * height)) for kind, (x0, y0, x1, y1) in known]
    return Marked(width, height, truth, ())


def _look(bundle: Bundle, samples: Sequence[Decoded], pixels_BCSS: Tensor, judged: list[Judged], job: Job) -> None:
    """One pass of the towers, for detections and regions both."""
    views = [
        View(sample.pixels, placement(sample.columns["size"], bundle.image), item.marked.width, item.marked.height)
        for sample, item in zip(samples, judged, strict=True)
    ]
    detector, scoring = job.detector, job.scoring
    if detector is None:
        assert "ap" not in job.measures
        frozen_BDHW = maps_of(job.image.model)(_input(job.image, pixels_BCSS), dense=True).dense_BDHW
        _classify(judged, views, {"region_top1_image": _by_tower(frozen_BDHW, job)})
        return
    seen = detector.look(pixels_BCSS, frozen=True)
    alone = replace(seen, frozen_BDHW=None)
    if "ap" in job.measures:
        by_itself = detector.find(alone, job.labels, scoring)
        both = detector.find(seen, job.labels, scoring) if scoring.ensemble else by_itself
        for row, (item, view) in enumerate(zip(judged, views, strict=True)):
            item.marked = replace(item.marked, found=_found(in_pixels(view, both, row), job))
            item.alone = _found(in_pixels(view, by_itself, row), job)
    if "regions" in job.measures:

        def by_head(boxes_BM4: Tensor) -> Tensor:
            return detector.classify(alone, boxes_BM4, job.labels, scoring)

        def by_both(boxes_BM4: Tensor) -> Tensor:
            return detector.classify(seen, boxes_BM4, job.labels, scoring)

        found = {"region_top1": by_head, "region_top1_image": _by_tower(seen.frozen_BDHW, job)}
        _classify(judged, views, found | ({"region_top1_ensemble": by_both} if scoring.ensemble else {}))


def _input(bundle: Bundle, pixels_BCSS: Tensor) -> Tensor:
    return normalise(pixels_BCSS.to(bundle.device), bundle.image)


def _found(items: Iterable[Detection], job: Job) -> list[tuple[int, float, tuple[float, float, float, float]]]:
    return [(job.labels.index(item.label), item.score, item.box) for item in items]


def _by_tower(dense_BDHW: Tensor | None, job: Job) -> Any:
    """Boxes BM4 -> BMK by the image-level tower alone: cosines of its averaged features with the texts."""
    assert dense_BDHW is not None
    if job.detector:
        head_KD = job.detector.head(True, job.labels, job.scoring)
    else:
        head_KD = label_head(job.image, job.labels, job.scoring.templates or ("{}",)).to(job.image.device)

    def scores(boxes_BM4: Tensor) -> Tensor:
        regions_BMD = F.normalize(roi_mean(dense_BDHW.float(), boxes_BM4.to(dense_BDHW.device), ROI_BASE), dim=-1)
        return regions_BMD @ head_KD.T

    return scores


def _classify(judged: Sequence[Judged], views: Sequence[View], measures: Mapping[str, Any]) -> None:
    """Ask every measure for the classes of the boxes of the truth; those outside the model's square do not count."""
    given: list[Tensor] = []
    for item, view in zip(judged, views, strict=True):
        boxes_M4 = torch.from_numpy(view.place.to_input([box for _, box in item.marked.truth])).clamp(0, 1)
        inside_M = is_valid(boxes_M4)
        item.region_truth = [
            kind for (kind, _), inside in zip(item.marked.truth, inside_M.tolist(), strict=True) if inside
        ]
        given.append(boxes_M4[inside_M].float())
    most = max(map(len, given))
    if not most:
        return
    boxes_BM4 = torch.stack([F.pad(boxes_M4, (0, 0, 0, most - len(boxes_M4))) for boxes_M4 in given])
    for name, scores in measures.items():
        taken_BM = scores(boxes_BM4).argmax(dim=-1)
        for item, taken_M in zip(judged, taken_BM.tolist(), strict=True):
            item.regions[name] = taken_M[: len(item.region_truth)]


def _window(detector: Detector | None) -> WindowConfig | None:
    return detector.parts.config.window if detector else None


def _half_window(bundle: Bundle, detector: Detector | None) -> int | None:
    """Places of the coarsest map in half a window; None for a map that has no two places."""
    window = _window(detector)
    windows = window.windows if window and window.windows > 1 else WINDOWS
    grid = bundle.image.size // maps_of(bundle.model).strides[-1]
    return max(1, grid // (2 * windows)) if grid > 1 else None


def shift_change(
    tower: MapTower, pixels_BCSS: Tensor, bundle: Bundle, window: WindowConfig | None, half: int
) -> Tensor:
    """B: mean of 1 - cosine between features of one piece of the picture, seen at two places `half` places apart.

    The picture is enlarged by that much and cropped twice, at opposite corners, so that nothing wraps round and both
    crops are real. Features are those of the coarsest map.
    """
    side, step = pixels_BCSS.shape[-1], half * tower.strides[-1]
    larger = F.interpolate(pixels_BCSS.float(), (side + step, side + step), mode="bilinear", antialias=True)
    first, second = larger[..., :side, :side], larger[..., step:, step:]
    one_BCHW, other_BCHW = (tower(normalise(crop, bundle.image), window).levels[-1].float() for crop in (first, second))
    same_BHW = F.cosine_similarity(one_BCHW[..., half:, half:], other_BCHW[..., :-half, :-half], dim=1)
    return (1 - same_BHW).flatten(1).mean(dim=1)


def _base(config: Config, job: Job) -> tuple[str, ...]:
    if config.base is not None:
        return config.base
    return job.detector.parts.info.base_labels if job.detector else ()


def _groups(names: Sequence[str], base: Sequence[str], frequencies: Mapping[str, str] | None) -> dict[str, list[int]]:
    """Group -> its classes; no group without a class."""
    found: dict[str, list[int]] = {}
    known = {normal_form(name) for name in base}
    kinds = {normal_form(name): group for name, group in (frequencies or {}).items()}
    for number, name in enumerate(names):
        if known:
            found.setdefault("base" if normal_form(name) in known else "novel", []).append(number)
        if (group := kinds.get(normal_form(name))) is not None:
            found.setdefault(group, []).append(number)
    return found


def _region_metrics(judged: Sequence[Judged], groups: Mapping[str, Sequence[int]]) -> Metrics:
    """Shares of boxes that are taken for what they are, of all and of every group."""
    measures = dict.fromkeys(name for item in judged for name in item.regions)
    for name in measures:
        pairs = [
            pair
            for item in judged
            if name in item.regions
            for pair in zip(item.region_truth, item.regions[name], strict=True)
        ]
        yield name, _share(pairs)
        for group, numbers in groups.items():
            if own := [pair for pair in pairs if pair[0] in numbers]:
                yield f"{name}_{group}", _share(own)


def _share(pairs: Sequence[tuple[int, int]]) -> float:
    return sum(true == taken for true, taken in pairs) / len(pairs)


def _names(shards: ShardSet, data: Train | Path) -> list[str]:
    """All labels of the boxes, sorted. Raises MissingField where no sample has a box."""
    names: set[str] = set()
    for number in range(len(shards)):
        try:
            names |= {box[4] for box in read_boxes(shards.read(number).columns.get("boxes"))}
        except BadSample:
            continue  # counted when the pictures are read
    if not names - {""}:
        raise MissingField(f"{data}: no sample carries a box with a label, which this task needs")
    return sorted(names - {""})
