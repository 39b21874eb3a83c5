"""Average precision as COCO defines it, by faster-coco-eval, which is the reference's arithmetic in C++.

Ten thresholds of IoU from 0.5 to 0.95; precision at 101 points of recall, detections matched greedily by score within a
picture and a class. Suffixes: T thresholds, R points of recall, K classes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import ConfigError

AT_50, AT_75 = 0, 5
"""Places of these thresholds."""
GROUPS = {"rare": (0, 10), "common": (11, 100), "frequent": (101, 2**63)}
"""LVIS: classes by the number of training pictures that show them (Gupta et al. 2019, arXiv 1908.03195)."""
LETTERS = {"r": "rare", "c": "common", "f": "frequent"}

Side4 = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Marked:
    """One picture: what is there, and what was found. Boxes are x0, y0, x1, y1 in its pixels, classes are numbers."""

    width: int
    height: int
    truth: Sequence[tuple[int, Side4]]
    found: Sequence[tuple[int, float, Side4]]
    """Class, score, box."""


def require_library() -> Any:
    """faster_coco_eval. Raises ConfigError where it is not installed."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ConfigError(
            "average precision needs faster-coco-eval: pip install 'vlp[detect]', or leave `ap` out of the option "
            "measures"
        ) from error
    return faster_coco_eval


def precisions(pictures: Sequence[Marked], classes: int, most: int = 100) -> NDArray[np.float64]:
    """TK: average precision of every class at every threshold; NaN for a class that is nowhere.

    `most`: detections of a picture that count, the best of each class.
    """
    library = require_library()
    images = [{"id": n, "width": item.width, "height": item.height} for n, item in enumerate(pictures, 1)]
    categories = [{"id": number, "name": str(number)} for number in range(1, classes + 1)]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, item in enumerate(pictures, 1):
        for kind, box in item.truth:
            there = {"id": len(annotations) + 1, "area": _area(box), "iscrowd": 0}
            annotations.append({"image_id": number, "category_id": kind + 1, "bbox": _corner(box)} | there)
        results += (
            {"image_id": number, "category_id": kind + 1, "bbox": _corner(box), "score": score}
            for kind, score, box in item.found
        )
    truth = library.COCO({"images": images, "categories": categories, "annotations": annotations})
    judge = library.COCOeval_faster(truth, truth.loadRes(results), "bbox")
    judge.params.maxDets = [most]
    judge.params.areaRng, judge.params.areaRngLbl = [[0.0, 1e10]], ["all"]
    judge.evaluate()
    judge.accumulate()
    precision_TRK: NDArray[np.float64] = np.asarray(judge.eval["precision"])[:, :, :, 0, -1]
    return np.where((precision_TRK < 0).all(axis=1), nan, precision_TRK.mean(axis=1))


def _corner(box: Side4) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _area(box: Side4) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def summary(precision_TK: NDArray[np.float64], groups: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, float]]:
    """AP, AP50, AP75 over all classes that occur; AP and AP50 over those of each group (`AP50_novel`)."""
    yield "AP", _mean(precision_TK)
    yield "AP50", _mean(precision_TK[AT_50])
    yield "AP75", _mean(precision_TK[AT_75])
    for name, numbers in groups.items():
        if not np.isnan(precision_TK[0, list(numbers)]).all():
            yield f"AP_{name}", _mean(precision_TK[:, list(numbers)])
            yield f"AP50_{name}", _mean(precision_TK[AT_50, list(numbers)])


def _mean(values: NDArray[np.float64]) -> float:
    return 0.0 if np.isnan(values).all() else float(np.nanmean(values))


def read_frequencies(value: Any) -> Any:
    """Class -> rare, common or frequent; from {name: training pictures}, a json file of it, or LVIS annotations."""
    if isinstance(value, str | Path):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{value} cannot be read ({error}); give {{name: training pictures}} as json") from error
    if isinstance(value, Mapping) and isinstance(value.get("categories"), list):
        value = {item.get("name"): item.get("frequency", item.get("image_count")) for item in value["categories"]}
    if not isinstance(value, Mapping) or not value:
        raise ValueError("expected {name: training pictures}, or LVIS annotations with categories")
    return {str(name): _group(name, count) for name, count in value.items()}


def _group(name: Any, count: Any) -> str:
    if count in LETTERS or count in GROUPS:
        return LETTERS.get(count, str(count))
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"{name!r}: {count!r} is no number of pictures, nor one of {', '.join((*LETTERS, *GROUPS))}")
    return next(group for group, (low, high) in GROUPS.items() if low <= count <= high)
