"""Detection scores: by hand, against a slow reference, a detector that is right by construction, what is refused."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from data_pipelines import job, sources
from data_pipelines.errors import BundleError, ConfigError, MissingField
from data_pipelines.preprocess import ImageConfig
from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp import evals
from vlp.bundle import Bundle
from vlp.detection import maps
from vlp.detection.infer import Detector, Seen
from vlp.detection.model import Levels, PartsConfig, make_parts
from vlp.detection.scores import Found
from vlp.evals import _coco
from vlp.evals import detection as task
from vlp.evals._coco import Marked, precisions, summary
from vlp.testing import MICRO_PARTS, micro_bundle, picture

THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]


def test_average_precision_by_hand() -> None:
    """One class, two pictures with one object each; detections by falling score: right, wrong, right (IoU 0.6).

    At IoU 0.5 precision is 1 up to recall 0.5, and 2/3 from there to 1: 51 of the 101 points of recall (0 to 0.50)
    have 1, the other 50 have 2/3, which is (51 + 50 * 2/3) / 101. Above 0.6 the third is wrong as well: 51 / 101.
    """
    pictures = [
        Marked(100, 100, [(0, (10, 10, 30, 30))], [(0, 0.9, (10, 10, 30, 30)), (0, 0.8, (60, 60, 80, 80))]),
        # 20 x 12 of the 20 x 20 are covered: IoU 240 / 400 = 0.6
        Marked(100, 100, [(0, (10, 10, 30, 30))], [(0, 0.7, (10, 10, 30, 22))]),
    ]
    found = precisions(pictures, 2)
    assert found[0, 0] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found[1, 0] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found[5, 0] == found[9, 0] == pytest.approx(51 / 101)
    assert np.isnan(found[:, 1]).all()  # a class that is nowhere
    values = dict(summary(found, {"novel": [0], "base": [1]}))
    assert values["AP50"] == values["AP50_novel"] == found[0, 0]
    assert values["AP75"] == found[5, 0]
    assert "AP50_base" not in values


def overlap(one: Any, other: Any) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return float(shared / sum(((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)), -shared))


def slow_precision(pictures: list[Marked], kind: int, threshold: float) -> float:
    """COCO's definition, one detection after the other."""
    total = sum(k == kind for item in pictures for k, _ in item.truth)
    if not total:
        return float("nan")
    listed = [(s, n, box) for n, item in enumerate(pictures) for k, s, box in item.found if k == kind]
    taken: set[tuple[int, int]] = set()
    hits = []
    for _, number, box in sorted(listed, key=lambda entry: -entry[0]):
        own = [(m, b) for m, (k, b) in enumerate(pictures[number].truth) if k == kind and (number, m) not in taken]
        best = max(((overlap(box, b), m) for m, b in own), default=(0.0, -1))
        hits.append(best[0] >= threshold)
        if hits[-1]:
            taken.add((number, best[1]))
    found = np.cumsum(hits)
    recall, precision = found / total, found / np.arange(1, len(hits) + 1) if hits else found
    points = [
        max((p for r, p in zip(recall, precision, strict=True) if r >= at), default=0.0)
        for at in np.linspace(0, 1, 101)
    ]
    return float(np.mean(points))


def random_pictures(seed: int) -> list[Marked]:
    generator = np.random.default_rng(seed)

    def boxes(count: int) -> NDArray[np.float64]:
        corner, size = generator.uniform(0, 60, (count, 2)), generator.uniform(10, 40, (count, 2))
        return np.concatenate([corner, corner + size], axis=1)

    pictures = []
    for _ in range(12):
        truth = [(int(generator.integers(3)), tuple(box)) for box in boxes(int(generator.integers(0, 4)))]
        near = [(k, float(generator.random()), tuple(np.array(b) + generator.normal(0, 3, 4))) for k, b in truth]
        other = [(int(generator.integers(4)), float(generator.random()), tuple(box)) for box in boxes(3)]
        pictures.append(Marked(100, 100, truth, near + other))
    return pictures


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_a_slow_reference(seed: int) -> None:
    pictures = random_pictures(seed)
    found = precisions(pictures, 4)
    slow = [[slow_precision(pictures, kind, threshold) for kind in range(4)] for threshold in THRESHOLDS]
    np.testing.assert_allclose(found, np.array(slow), atol=1e-9, equal_nan=True)
    assert 0.02 < np.nanmean(found) < 0.98


def test_nothing_found_is_zero_and_detections_of_a_class_that_is_nowhere_do_not_count() -> None:
    empty = [Marked(10, 10, [(0, (1, 1, 5, 5))], [])]
    assert dict(summary(precisions(empty, 1), {}))["AP"] == 0.0
    other = [Marked(10, 10, [(0, (1, 1, 5, 5))], [(1, 0.9, (1, 1, 5, 5)), (0, 0.1, (1, 1, 5, 5))])]
    assert dict(summary(precisions(other, 2), {}))["AP"] == pytest.approx(1.0)


def test_only_so_many_detections_count() -> None:
    wrong = [(0, 0.9 - 0.01 * n, (50.0, 50.0, 60.0, 60.0)) for n in range(3)]
    pictures = [Marked(100, 100, [(0, (1, 1, 20, 20))], [*wrong, (0, 0.2, (1, 1, 20, 20))])]
    assert precisions(pictures, 1, 3)[0, 0] == 0.0
    assert precisions(pictures, 1, 4)[0, 0] == pytest.approx(0.25)


def test_frequencies_are_those_of_lvis(tmp_path: Path) -> None:
    wanted = {"a": "rare", "b": "common", "c": "common", "d": "frequent"}
    assert _coco.read_frequencies({"a": 10, "b": 11, "c": 100, "d": 101}) == wanted
    lvis = tmp_path / "lvis.json"
    lvis.write_text('{"categories": [{"name": "a", "frequency": "r"}, {"name": "b", "image_count": 200}]}')
    assert _coco.read_frequencies(str(lvis)) == {"a": "rare", "b": "frequent"}
    for bad in ({"a": -1}, {"a": "x"}, {}, [1], str(tmp_path / "none.json"), {"a": True}):
        with pytest.raises(ValueError, match="number of pictures|expected|cannot be read"):
            _coco.read_frequencies(bad)


def test_groups_of_classes() -> None:
    names = ("Cat", "dog", "cow")
    assert task._groups(names, ("cat",), None) == {"base": [0], "novel": [1, 2]}
    assert task._groups(names, (), {"dog": "rare", "Cow": "frequent"}) == {"rare": [1], "frequent": [2]}
    assert task._groups(names, (), None) == {}


LABELS = ("red thing", "blue thing")
BOX = (0.25, 0.25, 0.75, 0.75)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve pictures of 40 x 32 with one box each, one with two, two without."""
    records = [
        Record(
            picture(n),
            ("text",),
            "test",
            str(n),
            boxes=() if n > 12 else ((*BOX, LABELS[n % 2]), (0.0, 0.0, 0.2, 0.2, LABELS[1]))[: 1 + (n == 3)],
        )
        for n in range(15)
    ]
    write_shards(records, tmp_path / "s", WriteOptions(samples_per_shard=10), kind="test", licences={}, progress=False)
    return tmp_path / "s"


def detector_bundle(stage: str, base: tuple[str, ...] = (LABELS[0],)) -> Bundle:
    bundle = micro_bundle()
    bundle.image = ImageConfig(size=16, resize="squash")
    torch.manual_seed(0)
    parts = make_parts(PartsConfig.model_validate(MICRO_PARTS), bundle.model, bundle.dim)
    parts.info = parts.info.model_copy(update={"stage": stage, "base_labels": base})
    bundle.parts["detection"] = parts
    return bundle


def test_what_each_kind_of_model_is_asked_for(shards: Path) -> None:
    image = evals.evaluate(micro_bundle(), "detection", shards)
    assert set(image) == {"region_top1_image", "shift_sensitivity", "classes", "boxes", "pictures", "skipped"}
    assert (image["classes"], image["boxes"], image["pictures"], image["skipped"]) == (2, 14, 15, 0)
    pretrained = evals.evaluate(detector_bundle("pretrain", ()), "detection", shards)
    assert {"region_top1", "region_top1_ensemble", "region_top1_image"} <= set(pretrained)
    assert not any(name.startswith("AP") for name in pretrained)
    fitted = evals.evaluate(detector_bundle("finetune"), "detection", shards)
    assert {"AP", "AP50", "AP75", "AP50_base", "AP50_novel", "alone/AP50_novel", "region_top1_novel"} <= set(fitted)
    own = evals.evaluate(
        detector_bundle("finetune"),
        "detection",
        shards,
        {"scoring": {"ensemble": False}, "measures": ["ap", "regions"]},
    )
    assert own["AP50"] == fitted["alone/AP50"]
    assert own["region_top1"] == fitted["region_top1"]
    assert not any("alone" in name or "ensemble" in name or "shift" in name for name in own)


def test_a_detector_that_is_right_scores_one(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture gets the box of the truth; only the first label is found, so half of the classes are right.

    The truth of class 1 are 6 boxes like that one and a small one: nothing of it is found. Class 0: 7 right of 13 that
    are found, all at one score, in the order of the pictures, which alternate: precision falls from 1 to 7/13.
    """

    def find(self: Any, seen: Any, labels: tuple[str, ...], options: Any) -> Found:
        count = len(seen.levels.embedding_BD)
        boxes = torch.tensor(BOX).repeat(count, 1, 1)
        number = labels.index(LABELS[0])
        ones = torch.ones(count, 1)
        return Found(boxes, ones * 0.5, torch.full((count, 1), number), ones.bool(), labels)

    monkeypatch.setattr(Detector, "find", find)
    found = evals.evaluate(detector_bundle("finetune"), "detection", shards, {"measures": ["ap"]})
    assert found["AP_novel"] == 0.0
    assert found["AP_base"] == found["AP50_base"] == pytest.approx(2 * found["AP"])
    # among the first 13 pictures every other one is right, and the two without an object come last
    steps = [(n + 1) / (2 * n + 1) for n in range(7)]
    points = [max(steps[max(0, int(np.ceil(at * 7 - 1e-9)) - 1) :]) for at in np.linspace(0, 1, 101)]
    assert found["AP_base"] == pytest.approx(np.mean(points), abs=1e-6)


@pytest.mark.parametrize("mode", ["keep_ratio", "center_crop", "border"])
def test_boxes_of_a_coco_file_end_up_where_they_are_looked_for(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red rectangles on black; a detector that boxes what is red, in the model's own input, is right for all of them.

    With center_crop a third of the width goes, and the box of the second picture with it.
    """
    boxes = [(30, 12, 22, 20), (0, 0, 9, 40), (24, 4, 20, 36), (20, 20, 40, 12)]
    for number, (x, y, width, height) in enumerate(boxes):
        pixels = np.zeros((60, 80, 3), np.uint8)
        pixels[y : y + height, x : x + width, 0] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 80, "height": 60} for n in range(4)],
        "annotations": [{"image_id": n, "category_id": 5, "bbox": box} for n, box in enumerate(boxes)],
        "categories": [{"id": 5, "name": LABELS[0]}, {"id": 6, "name": LABELS[1]}],
    }
    (tmp_path / "instances_test.json").write_text(json.dumps(content))
    source = sources.resolve(str(tmp_path / "instances_test.json"), images=tmp_path)
    options = WriteOptions(image_size=48, resize_mode=mode)
    job.shard(source, tmp_path / "s", options, overwrite=False, progress=False)

    def look(self: Any, pixels_BCSS: Tensor, frozen: bool) -> Seen:
        return Seen(Levels((pixels_BCSS,), pixels_BCSS, None), pixels_BCSS)

    def find(self: Any, seen: Seen, labels: tuple[str, ...], options: Any) -> Found:
        found = torch.zeros(len(seen.levels.embedding_BD), 1, 4)
        for row, pixels_CSS in enumerate(seen.levels.embedding_BD):
            rows, columns = torch.nonzero((pixels_CSS[0] > 127) & (pixels_CSS[1] < 127), as_tuple=True)
            if len(rows):
                found[row, 0] = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        count = len(found)
        return Found(found, torch.ones(count, 1), torch.zeros(count, 1).long(), found[:, :, 2] > 0, labels)

    monkeypatch.setattr(Detector, "look", look)
    monkeypatch.setattr(Detector, "find", find)
    bundle = detector_bundle("finetune")
    bundle.image = ImageConfig(size=64, resize="longest")
    found = evals.evaluate(bundle, "detection", tmp_path / "s", {"measures": ["ap"]})
    assert found["pictures"] == 4
    assert found["boxes"] == (3 if mode == "center_crop" else 4)
    assert found["AP75"] == pytest.approx(1.0)


def test_regions_are_asked_where_the_boxes_are(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower that takes wide boxes for the first label, and the narrow one for the second."""
    seen: list[Tensor] = []

    def by_width(dense_BDHW: Tensor | None, job: task.Job) -> Any:
        def scores(boxes_BM4: Tensor) -> Tensor:
            seen.append(boxes_BM4)
            wide = (boxes_BM4[..., 2] - boxes_BM4[..., 0] > 0.3).float()
            return torch.stack([wide, 1 - wide], dim=-1)[..., [job.labels.index(name) for name in LABELS]]

        return scores

    monkeypatch.setattr(task, "_by_tower", by_width)
    found = evals.evaluate(detector_bundle("pretrain"), "detection", shards, {"measures": ["regions"]})
    widths = torch.cat([boxes[..., 2] - boxes[..., 0] for boxes in (batch.flatten(0, 1) for batch in seen)])
    assert sorted({round(width, 3) for width in widths.tolist()}) == [0.0, 0.2, 0.5]
    # of the 13 wide boxes 7 are of the first label, and the narrow one is of the second
    assert found["region_top1_image"] == pytest.approx(8 / 14)
    assert found["region_top1_image_base"] == 1.0
    assert found["region_top1_image_novel"] == pytest.approx(1 / 7)


class Shifting(nn.Module):
    """A tower whose features are the pixels, averaged in squares of four."""

    def __init__(self, by_place: float) -> None:
        super().__init__()
        self.by_place = by_place

    def map_tower(self) -> maps.MapTower:
        def run(pixels_BCHW: Tensor, window: Any, dense: bool) -> Any:
            grid = torch.nn.functional.avg_pool2d(pixels_BCHW, 4)
            place = torch.linspace(0, self.by_place, grid.shape[-1]).expand(len(grid), 1, *grid.shape[2:])
            return (torch.cat([grid, place], dim=1),), None, pixels_BCHW.mean(dim=(2, 3))

        return maps.MapTower(self, (4,), (4,), run, has_windows=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels


def test_shift_sensitivity_is_zero_for_features_that_move_along() -> None:
    bundle = micro_bundle()
    bundle.image = ImageConfig(size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    still = task.shift_change(Shifting(0.0).map_tower(), pixels, bundle, None, 2)
    assert still.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    moving = task.shift_change(Shifting(1.0).map_tower(), pixels, bundle, None, 2)
    assert (moving > 0.005).all()


def test_half_a_window() -> None:
    bundle = micro_bundle()
    bundle.image = ImageConfig(size=16)
    stride = maps.maps_of(bundle.model).strides[-1]
    grid = 16 // stride
    assert task._half_window(bundle, None) == max(1, grid // 8)
    bundle.image = ImageConfig(size=stride)
    assert task._half_window(bundle, None) is None


def test_missing_library_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlp\[detect\]'"):
        evals.evaluate(detector_bundle("finetune"), "detection", shards)
    assert "region_top1" in evals.evaluate(detector_bundle("finetune"), "detection", shards, {"measures": ["regions"]})


@pytest.mark.parametrize(
    ("options", "says"),
    [({"measures": ["mAP"]}, "measures"), ({"labels": ["green thing"]}, "no box carries one of the labels green thing"),
     ({"labels": ["red thing", "Red  thing"]}, "capitals or spaces"), ({"frozen": "nowhere"}, "has no effect"),
     ({"scoring": {"ensemble": False, "base": 0.5}}, "no effect with ensemble=false"),
     ({"frequencies": {"red thing": "often"}}, "number of pictures"), ({"labels": []}, "no labels")],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], says: str, shards: Path) -> None:
    with pytest.raises((ConfigError, Exception), match=says) as caught:
        evals.evaluate(micro_bundle(), "detection", shards, options)
    assert type(caught.value).__module__.startswith("data_pipelines")


def test_a_model_without_parts_has_no_average_precision(shards: Path) -> None:
    with pytest.raises(BundleError, match="without parts of a detector"):
        evals.evaluate(micro_bundle(), "detection", shards, {"measures": ["ap"]})
    with pytest.raises(BundleError, match="never saw a box"):
        evals.evaluate(detector_bundle("pretrain"), "detection", shards, {"measures": ["ap"]})


def test_shards_without_boxes_lack_what_the_task_needs(tmp_path: Path) -> None:
    records = [Record(picture(n), ("text",), "test", str(n)) for n in range(3)]
    write_shards(records, tmp_path / "s", WriteOptions(), kind="test", licences={}, progress=False)
    with pytest.raises(MissingField, match="no sample carries a box with a label"):
        evals.evaluate(micro_bundle(), "detection", tmp_path / "s")


def test_synonyms_and_other_labels(shards: Path) -> None:
    labels = {"crimson": ["red thing"], "lilac": []}
    found = evals.evaluate(micro_bundle(), "detection", shards, {"labels": _file(shards.parent, labels)})
    assert (found["classes"], found["boxes"], found["pictures"]) == (1, 7, 15)


def _file(folder: Path, labels: dict[str, list[str]]) -> str:
    path = folder / "labels.json"
    path.write_text(json.dumps(labels))
    return str(path)


def test_every_measure_is_reproducible(shards: Path) -> None:
    runs = [evals.evaluate(detector_bundle("finetune"), "detection", shards) for _ in range(2)]
    assert all(one == other for one, other in itertools.pairwise(runs))
