"""Segmentation scores: by hand, truth in the model's geometry against a slow look-up, masks, boxes, what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_pipelines.errors import BadSample, ConfigError, MissingField
from data_pipelines.preprocess import ImageConfig, fit
from data_pipelines.reader import Sample
from data_pipelines.records import Record
from data_pipelines.write import WriteOptions, write_shards
from vlp import evals
from vlp.evals import segmentation as task
from vlp.evals._encode import Encoder
from vlp.evals._labels import label_set
from vlp.testing import micro_bundle

BEHIND: dict[str, Any] = {"background": ["background"]}
COLOURS = {"background": (20, 20, 20), "red thing": (220, 30, 30), "blue thing": (30, 30, 220)}


def test_scores_by_hand() -> None:
    """Rows are the truth: 6 places of nothing, 4 of a, 2 of b, which nothing is taken for; c is never there.

    background 5 right, 1 taken for a: IoU 5 / (6 + 6 - 5) = 5/7. a: 3 right, 1 missed, 1 + 2 wrong: 3 / 7. b: 0. c does
    not count, though nothing is wrong with it. miou (3/7 + 0) / 2, with the background (5/7 + 3/7) / 3; 8 of 12 right.
    """
    counts = torch.tensor([[5, 1, 0, 0], [1, 3, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]])
    found = dict(task.scores(counts, ("background", "a", "b", "c"), with_background=True))
    assert found["iou/background"] == pytest.approx(5 / 7)
    assert found["iou/a"] == pytest.approx(3 / 7)
    assert found["iou/b"] == 0.0
    assert "iou/c" not in found
    assert found["miou"] == pytest.approx(3 / 14)
    assert found["miou_with_background"] == pytest.approx(8 / 21)
    assert found["accuracy"] == pytest.approx(8 / 12)
    assert (found["dead_classes"], found["classes"]) == (1, 2)
    found = dict(task.scores(counts[1:, 1:], ("a", "b", "c"), with_background=False))
    assert found["miou"] == pytest.approx(3 / 5 / 2), "a: 3 of 3, and 2 wrong"
    assert "miou_with_background" not in found
    assert all(np.isfinite(value) for _, value in task.scores(torch.zeros(2, 2), ("a", "b"), False))


def test_confusion_leaves_out_what_has_no_truth() -> None:
    truth = torch.tensor([[0, 1, -1], [1, 2, -1]])
    taken = torch.tensor([[0, 2, 1], [1, 2, 0]])
    assert task.confusion(truth, taken, 3).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


def test_segments_by_hand() -> None:
    """Two rows of two: nothing, a; b, b."""
    column = {"grid": 2, "names": ["a", "b"], "runs": [0, 1, 1, 1, 2, 2]}
    for value in (column, json.dumps(column)):
        names, cells = task.read_segments(value, "key")
        assert names == ("a", "b")
        assert cells.tolist() == [[0, 1], [2, 2]]


@pytest.mark.parametrize(
    "wrong",
    [
        None, "no json", "[1, 2]", {}, {"grid": 2, "names": ["a"], "runs": [0, 3]},
        {"grid": 2, "names": ["a"], "runs": [2, 4]}, {"grid": 2, "names": ["a"], "runs": [-1, 4]},
        {"grid": 2, "names": ["a"], "runs": [0, 5, 0, -1]}, {"grid": 2, "names": ["a"], "runs": [0, 4, 1]},
        {"grid": 0, "names": [], "runs": []}, {"grid": 2, "names": None, "runs": [0, 4]},
        {"grid": 2, "names": ["a"], "runs": [0.5, 4]}, {"grid": "two", "names": ["a"], "runs": [0, 4]},
    ],
)  # fmt: skip
def test_damaged_segments_are_bad_samples(wrong: Any) -> None:
    with pytest.raises(BadSample, match="bad_segments: key"):
        task.read_segments(wrong, "key")


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(64, 64), (40, 90), (90, 40), (33, 71)])
def test_truth_lies_where_the_model_sees_it(resize: str, size: tuple[int, int]) -> None:
    """A grid of 8 x 8 numbers, painted as grey values and prepared as any picture, says the same in the middle."""
    image = ImageConfig(size=32, resize=resize, ground=200, interpolation="bilinear")
    owner = torch.randint(0, 3, (8, 8), generator=torch.Generator().manual_seed(1))
    height, width = size
    rows = ((torch.arange(height) + 0.5) / height * 8).long()
    columns = ((torch.arange(width) + 0.5) / width * 8).long()
    painted = (owner[rows][:, columns] * 50).to(torch.uint8)[None].expand(3, -1, -1)
    seen = fit(painted, size, image)[0].float()
    truth = task.truth_of(owner, size, image, (32, 32))
    assert truth.shape == (32, 32)
    sharp = [
        (y, x)
        for y in range(1, 31)
        for x in range(1, 31)
        if (seen[y - 1 : y + 2, x - 1 : x + 2] == seen[y, x]).all() and seen[y, x] in (0, 50, 100, 200)
    ]
    assert len(sharp) > 30
    for y, x in sharp:
        assert truth[y, x] == (-1 if seen[y, x] == 200 else seen[y, x] / 50), (y, x)


def test_the_truth_of_a_coarse_place_is_what_covers_most_of_it() -> None:
    """One place over 4 x 4 cells, of which 7 are a: nothing covers most; with 9 it is a; ties go to nothing."""
    image = ImageConfig(size=32)
    for count, expected in ((7, 0), (8, 0), (9, 1)):
        owner = (torch.arange(16) < count).long().view(4, 4)
        assert task.truth_of(owner, (50, 50), image, (1, 1)).tolist() == [[expected]]


def sample(columns: dict[str, Any]) -> Sample:
    return Sample("key", b"", (), (), "test", columns)


def test_boxes_stand_for_objects_the_smaller_on_top() -> None:
    """Half a picture of a, a quarter of it covered by b; an object that is no label has no truth, nor has nothing,
    where there is no background.
    """
    boxes = [
        {"x0": 0.0, "y0": 0.0, "x1": 0.25, "y1": 0.5, "label": "b"},
        {"x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 1.0, "label": "a"},
        {"x0": 0.75, "y0": 0.75, "x1": 1.0, "y1": 1.0, "label": "x"},
    ]
    labels = label_set({"a": (), "b": ()})
    owner = task._owners(sample({"boxes": boxes}), "boxes", labels, first=1)
    assert owner[::16, ::16].tolist() == [[2, 1, 0, 0], [2, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, -1]]
    owner = task._owners(sample({"boxes": boxes}), "boxes", labels, first=0)
    assert owner[::16, ::16].tolist() == [[1, 0, -1, -1], [1, 0, -1, -1], [0, 0, -1, -1], [0, 0, -1, -1]]
    assert (task._owners(sample({}), "boxes", labels, first=1) == 0).all()
    with pytest.raises(BadSample, match="bad_boxes"):
        task._owners(sample({"boxes": [{"x0": 0}]}), "boxes", labels, first=1)


def pictures(folder: Path, count: int = 5, broken: bool = False, **more: Any) -> Path:
    """Grey pictures with a red upper left quarter and a blue lower half, both masked and boxed."""
    records = []
    for number in range(count):
        pixels = np.full((64, 64, 3), COLOURS["background"], dtype=np.uint8)
        pixels[:32, :32], pixels[32:] = COLOURS["red thing"], COLOURS["blue thing"]
        pixels[0, 0] = number
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="PNG")
        cells = np.zeros((4, 4), dtype=int)
        cells[:2, :2], cells[2:] = 1, 2
        runs = [value for cell in cells.ravel().tolist() for value in (cell, 1)]
        segments = {
            "grid": 4,
            "names": ["red thing", "blue thing"],
            "runs": runs[: 6 if broken and number == 1 else None],
        }
        records.append(
            Record(
                stream.getvalue(), ("a",), "test", f"{number}",
                boxes=((0.0, 0.0, 0.5, 0.5, "red thing"), (0.0, 0.5, 1.0, 1.0, "blue thing")),
                extra={"segments": json.dumps(segments)} if more.get("segments", True) else {},
            )
        )  # fmt: skip
    write_shards(records, folder, WriteOptions(), kind="test", licences={}, progress=False)
    return folder


@pytest.fixture
def seeing(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """An encoder whose places are their mean colours, and whose texts are the colours of COLOURS."""

    def colours(bundle: Any, pixels_NCSS: Tensor, image: ImageConfig, modality: str = "rgb") -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(pixels_NCSS.float(), 8) - 64, dim=1)

    class Seeing(Encoder):
        def prompts(self, prompts: Any) -> Tensor:
            rows = torch.tensor([COLOURS.get(texts[0], (20, 220, 20)) for texts in prompts]).float()
            return F.normalize(rows - 64, dim=1)

    monkeypatch.setattr(task, "dense_embeddings", colours)
    return Seeing(micro_bundle())


@pytest.mark.parametrize("truth", ["segments", "boxes", None])
def test_a_model_that_sees_all_has_a_miou_of_one(truth: Any, seeing: Encoder, tmp_path: Path) -> None:
    found = evals.evaluate(seeing, "segmentation", pictures(tmp_path / "d"), {"truth": truth} | BEHIND)
    assert (found["miou"], found["miou_with_background"], found["accuracy"]) == (1.0, 1.0, 1.0)
    assert (found["pictures"], found["skipped"], found["places"]) == (5, 0, 5 * 64)
    assert {"iou/background", "iou/red thing", "iou/blue thing"} <= found.keys()


def test_labels_that_are_asked_for_alone(seeing: Encoder, tmp_path: Path) -> None:
    """Red and green: blue places do not count, green is nowhere; without a background the red quarter is all."""
    data, labels = pictures(tmp_path / "d"), ["red thing", "green thing"]
    found = evals.evaluate(seeing, "segmentation", data, {"labels": labels} | BEHIND)
    assert (found["miou"], found["classes"], found["places"]) == (1.0, 1, 5 * 32)
    found = evals.evaluate(seeing, "segmentation", data, {"labels": labels})
    assert (found["miou"], found["places"]) == (1.0, 5 * 16)
    assert "iou/background" not in found


def test_synonyms_are_one_class(seeing: Encoder, tmp_path: Path) -> None:
    labels = {"thing": ["red thing", "blue thing"]}
    found = evals.evaluate(seeing, "segmentation", pictures(tmp_path / "d"), {"labels": labels} | BEHIND)
    assert found["classes"] == 1
    assert 16 / 48 <= found["iou/thing"] < 0.5, "the first synonym's colour is the prototype here"
    assert found["places"] == 5 * 64


def test_a_damaged_mask_is_counted(seeing: Encoder, tmp_path: Path) -> None:
    found = evals.evaluate(seeing, "segmentation", pictures(tmp_path / "d", count=150, broken=True), BEHIND)
    assert (found["pictures"], found["skipped"], found["miou"]) == (149, 1, 1.0)


def test_shards_without_truth_and_labels_called_background_are_refused(tmp_path: Path, seeing: Encoder) -> None:
    records = [Record(picture_bytes(), ("a",), "test", "0")]
    write_shards(records, tmp_path / "d", WriteOptions(), kind="test", licences={}, progress=False)
    with pytest.raises(MissingField, match="no sample carries segments or boxes"):
        evals.evaluate(seeing, "segmentation", tmp_path / "d")
    records = [Record(picture_bytes(), ("a",), "test", "0", boxes=((0.0, 0.0, 1.0, 1.0, "background"),))]
    write_shards(records, tmp_path / "e", WriteOptions(), kind="test", licences={}, progress=False)
    with pytest.raises(ConfigError, match="'background' is a label and a background text"):
        evals.evaluate(seeing, "segmentation", tmp_path / "e", BEHIND)
    assert evals.evaluate(seeing, "segmentation", tmp_path / "e")["classes"] == 1


def picture_bytes() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, format="PNG")
    return stream.getvalue()
