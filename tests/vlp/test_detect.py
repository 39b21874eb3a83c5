"""Open-vocabulary detection: the ensemble by hand, geometry there and back, labels of any number."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from data_pipelines.errors import BundleError, ConfigError
from data_pipelines.geometry import placement
from data_pipelines.preprocess import ImageConfig, fit
from vlp.bundle import Bundle, Provenance, save_bundle
from vlp.detection.boxes import paired_iou
from vlp.detection.infer import Detector, View, in_pixels, load_detector
from vlp.detection.scores import Found, Options, choose, ensemble, frozen_weights, merge_labels
from vlp.testing import WORDS, micro_bundle, micro_detector, picture

EVERYTHING = Options(threshold=0.0)


def test_ensemble_by_hand() -> None:
    """p = (0.4, 0.1), background 0.5; q = (0.2, 0.8); weights 0.5 and 1: sqrt(0.08), 0.8, and the background's 0.5."""
    p, q = torch.tensor([[[0.4, 0.1, 0.5]]]), torch.tensor([[[0.2, 0.8]]])
    found = ensemble(p.log() + 3.0, q.log() - 1.0, torch.tensor([0.5, 1.0]))
    total = math.sqrt(0.08) + 0.8 + 0.5
    torch.testing.assert_close(found, torch.tensor([[[math.sqrt(0.08), 0.8]]]) / total)


def test_with_weight_0_the_detector_stands_alone() -> None:
    logits, frozen = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    torch.testing.assert_close(ensemble(logits, frozen, torch.zeros(4)), logits.softmax(dim=-1)[..., :-1])


def test_ten_thousand_unlikely_labels_stay_finite() -> None:
    logits = torch.cat([torch.full((1, 1, 10_000), -90.0), torch.zeros(1, 1, 1)], dim=-1)
    found = ensemble(logits, torch.zeros(1, 1, 10_000), torch.full((10_000,), 0.65))
    assert found.isfinite().all()
    assert found.sum() < 1


def test_labels_are_merged_and_weighed_by_what_was_seen() -> None:
    merged = merge_labels(["Red  Circle", "bear", " red circle", "BEAR", "tall tree"])
    assert merged == ("Red Circle", "bear", "tall tree")
    weights = frozen_weights(merged, ["red circle", "tall  Tree"], Options())
    torch.testing.assert_close(weights, torch.tensor([0.35, 0.65, 0.35]))
    for bad, message in (([], "none are given"), (["bear", "  "], "is empty")):
        with pytest.raises(ConfigError, match=message):
            merge_labels(bad)


def test_each_label_has_its_own_suppression() -> None:
    """Two regions that overlap by 0.8: of label 0 the better one stays, of label 1 both pairs that pass the threshold;
    a third region apart stays as well."""
    boxes = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 0.8, 1], [0, 0, 0.1, 0.1]]])
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.6], [0.3, 0.05]]])
    found = choose(boxes, scores, ("a", "b"), Options(threshold=0.2))
    pairs = list(zip(found.label_BT[0].tolist(), found.scores_BT[0].tolist(), strict=True))
    assert pairs == [(0, pytest.approx(0.9)), (1, pytest.approx(0.6)), (0, pytest.approx(0.3))]
    assert choose(boxes, scores, ("a", "b"), Options(top_k=1)).scores_BT.tolist() == [[pytest.approx(0.9)]]
    assert not choose(boxes, scores, ("a", "b"), Options(threshold=0.95)).valid_BT.any()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 700), st.integers(1, 700), st.sampled_from([16, 33, 224]),
    st.sampled_from(["shortest", "longest", "squash"]), st.integers(0, 2**31),
)  # fmt: skip
def test_boxes_come_back_within_a_pixel(width: int, height: int, size: int, resize: str, seed: int) -> None:
    """Boxes on the part of a picture that the model sees: to the model's fractions in float32, and back to pixels."""
    image = ImageConfig(size=size, resize=resize)
    place = placement((height, width), image)
    seen = place.to_original([[0, 0, 1, 1]])[0].clip(0, [width, height, width, height])
    drawn = np.sort(np.random.default_rng(seed).random((20, 2, 2)), axis=1)
    boxes = (seen[:2] + drawn * (seen[2:] - seen[:2])).reshape(20, 4)
    fractions = torch.from_numpy(place.to_input(boxes)).float()
    assert (fractions > -1e-5).all()
    assert (fractions < 1 + 1e-5).all()
    ones = torch.ones(1, 20)
    found = Found(fractions[None], ones, ones.long() * 0, ones.bool(), ("thing",))
    view = View(torch.zeros(3, size, size), place, width, height)
    for item in in_pixels(view, found, 0):
        assert np.abs(np.array(item.box) - boxes).max(axis=1).min() < 1


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (200, 64)])
def test_a_box_lies_where_the_pixels_lie(resize: str, size: tuple[int, int]) -> None:
    """A white square in the middle of a black picture, found in what `fit` makes of it: the box of its pixels is where
    the geometry says, within a pixel of either picture."""
    width, height = size
    image_CHW = torch.zeros(3, height, width, dtype=torch.uint8)
    x0, y0, x1, y1 = box = width // 2 - 14, height // 2 - 11, width // 2 + 17, height // 2 + 13
    image_CHW[:, y0:y1, x0:x1] = 255
    image = ImageConfig(size=48, resize=resize, ground=0)
    rows, columns = (fit(image_CHW, (height, width), image)[0] > 127).nonzero(as_tuple=True)
    seen = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]) / 48
    found = placement((height, width), image).to_original(seen)[0]
    scale = max(width, height) / 48
    assert np.abs(found - np.array(box)).max() <= max(1.0, scale)


def encoded(mode: str, size: tuple[int, int] = (50, 30), turned: int = 1) -> bytes:
    image = Image.new("RGB", size, (200, 30, 30)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turned
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "RGB"])
def test_grey_transparent_and_rotated_pictures(mode: str) -> None:
    """A picture lying on its side is detected upright: its boxes are in the turned one's pixels."""
    detector = Detector.of(micro_detector())
    view = detector.view(encoded(mode, turned=6))
    assert (view.width, view.height) == (30, 50)
    (found,) = detector.detect([view], ["bear"], EVERYTHING)
    assert found
    for item in found:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= 30
        assert 0 <= y0 < y1 <= 50


def test_detections_are_sorted_and_within_bounds() -> None:
    detector = Detector.of(micro_detector())
    pictures = [picture(seed, size) for seed, size in enumerate([(40, 32), (32, 40), (17, 90)])]
    found = detector.detect(pictures, WORDS, Options(threshold=0.0, top_k=7))
    assert [len(one) for one in found] == [7, 7, 7]
    for one in found:
        scores = [item.score for item in one]
        assert scores == sorted(scores, reverse=True)
        assert 0 < scores[-1] <= scores[0] < 1
        assert {item.label for item in one} <= set(WORDS)
    alone = [detector.detect([data], WORDS, Options(threshold=0.0, top_k=7))[0] for data in pictures]
    for one, other in zip(found, alone, strict=True):  # as good as equal: sums of many pictures are added otherwise
        assert [item.label for item in one] == [item.label for item in other]
        assert [item.score for item in one] == pytest.approx([item.score for item in other], rel=1e-3)


def test_many_pictures_go_in_pieces() -> None:
    detector = Detector.of(micro_detector())
    views = [replace(detector.view(picture(0)), width=number + 5, height=5) for number in range(19)]
    assert len(detector.detect(views, ["bear"])) == 19
    assert detector.detect([], ["bear"]) == []


def test_no_labels_and_duplicate_labels() -> None:
    detector = Detector.of(micro_detector())
    with pytest.raises(ConfigError, match="labels: none are given"):
        detector.detect([picture()], [])
    twice = detector.detect([picture()], ["bear", "Bear", "cat", "bear "], EVERYTHING)
    assert twice == detector.detect([picture()], ["bear", "cat"], EVERYTHING)


def test_ten_thousand_labels() -> None:
    detector = Detector.of(micro_detector())
    labels = [f"thing {number}" for number in range(10_000)]
    (found,) = detector.detect([picture()], labels, Options(threshold=0.0, top_k=5))
    assert len(found) == 5


def test_texts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlp.detection import infer
    from vlp.infer import label_head

    asked: list[tuple[str, ...]] = []

    def head(bundle: Bundle, labels: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        asked.append(labels)
        return label_head(bundle, labels, templates)

    monkeypatch.setattr(infer, "label_head", head)
    detector = Detector.of(micro_detector())
    for labels in (["bear", "cat"], ["bear", "cat"], ["cat"], ["bear", "CAT", "bear"]):
        detector.detect([picture()], labels)
    assert asked == [("bear", "cat"), ("cat",), ("bear", "CAT")]
    for number in range(20):
        detector.detect([picture()], [f"label {number}"])
    assert len(detector._heads) == infer.HEADS


def score_by_hand(detector: Detector, pixels: Tensor, boxes: Tensor, labels: tuple[str, ...]) -> Tensor:
    """Scores of regions straight from the definition, with `torch` functions alone."""
    from vlp.detection.dense import dense_features
    from vlp.detection.maps import maps_of
    from vlp.detection.roi import roi_align
    from vlp.infer import encode_texts

    parts, bundle, frozen = detector.parts, detector.bundle, detector.frozen
    scaled = [((pixels / 255) - torch.tensor(b.image.mean)[:, None, None]) / torch.tensor(b.image.std)[:, None, None]
              for b in (bundle, frozen)]  # fmt: skip
    texts, theirs = encode_texts(bundle, labels), encode_texts(frozen, labels)
    regions = parts.embed_assigned(parts.levels(maps_of(bundle.model), scaled[0]), boxes)
    background = parts.background_D / parts.background_D.norm()
    p = (parts.log_scale.exp() * torch.cat([regions @ texts.T, (regions @ background)[..., None]], -1)).softmax(-1)
    dense = dense_features(frozen.model, scaled[1])
    own = torch.nn.functional.normalize(roi_align(dense, boxes, 14, 2).mean((-2, -1)), dim=-1)
    q = (frozen.model.logit_scale.exp() * own @ theirs.T).softmax(-1)  # type: ignore[operator]
    weights = torch.tensor([0.35 if label in parts.info.base_labels else 0.65 for label in labels])
    mixed = p[..., :-1] ** (1 - weights) * q**weights
    return mixed / (mixed.sum(-1, keepdim=True) + p[..., -1:])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_scores_equal_the_definition(residual: bool, other: bool) -> None:
    """With the tower itself as the frozen one, in one pass, and with another model, in two."""
    detector = Detector.of(micro_detector(residual=residual), micro_bundle(seed=5) if other else None)
    assert detector.shared is not other
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9], [0.5, 0.5, 0.7, 0.8]]).expand(2, 3, 4)
    with torch.no_grad():
        expected = score_by_hand(detector, pixels, boxes, WORDS)
    found = detector.score_regions(pixels, boxes, WORDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(detector.score_regions(pixels, boxes, WORDS, Options(ensemble=False)), found)


def test_one_look_serves_both_scores() -> None:
    """As the evaluation does: a look that asked the frozen tower is scored with and without it."""
    detector = Detector.of(micro_detector())
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    alone = Options(threshold=0.0, ensemble=False)
    with torch.inference_mode():
        seen = detector.look(pixels)
        both = [detector.find(seen, WORDS, options).scores_BT for options in (EVERYTHING, alone)]
    for found, options in zip(both, (EVERYTHING, alone), strict=True):
        torch.testing.assert_close(found, detector.detect_pixels(pixels, WORDS, options).scores_BT)
    assert not torch.allclose(both[0][:, :5], both[1][:, :5])


def test_a_threshold_spares_work_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions whose objectness is too low for any label are not classified; what is found above is the same."""
    detector = Detector.of(micro_detector())
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    asked: list[int] = []
    classify = Detector.classify

    def counted(self: Detector, seen: Any, boxes: Tensor, labels: tuple[str, ...], options: Options) -> Tensor:
        asked.append(boxes.shape[1])
        return classify(self, seen, boxes, labels, options)

    monkeypatch.setattr(Detector, "classify", counted)
    found = detector.detect_pixels(pixels, WORDS[:1], Options(threshold=0.0))
    limit = 0.9 * float(found.scores_BT.max())
    low, high = (Options(threshold=threshold, top_k=1000) for threshold in (0.0, limit))
    every, best = detector.detect_pixels(pixels, WORDS, low), detector.detect_pixels(pixels, WORDS, high)
    assert 0 < asked[2] < asked[1]
    assert best.valid_BT.any()
    for row in range(2):
        wanted = every.scores_BT[row][every.valid_BT[row] & (every.scores_BT[row] > limit)]
        torch.testing.assert_close(best.scores_BT[row][best.valid_BT[row]], wanted)


def test_scores_are_the_geometric_mean_of_label_and_objectness() -> None:
    """In the order of label x objectness^3, the paper's, of which they are the fourth root."""
    detector = Detector.of(micro_detector())
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    options = Options(threshold=0.0, nms=1.0, top_k=1000)
    with torch.inference_mode():
        seen = detector.look(pixels)
        boxes, objectness = detector.propose(seen, options.proposals)
        product = detector.classify(seen, boxes, WORDS, options) * objectness[..., None] ** 3
    found = detector.detect_pixels(pixels, WORDS, options)
    best = product.flatten().sort(descending=True).values[: int(found.valid_BT.sum())]
    torch.testing.assert_close(found.scores_BT[found.valid_BT], best**0.25)


def test_crops_that_match_a_text() -> None:
    """The crops found do not overlap by much, the best first; scores are cosines."""
    detector = Detector.of(micro_detector())
    crops = detector.find_crop(picture(), "green square", top_k=4)
    assert 1 <= len(crops) <= 4
    scores = [crop.score for crop in crops]
    assert scores == sorted(scores, reverse=True)
    assert -1 <= scores[-1] <= scores[0] <= 1
    boxes = torch.tensor([crop.box for crop in crops])
    assert all(paired_iou(boxes[i], boxes[j]) <= 0.5 for i in range(len(boxes)) for j in range(i))
    with pytest.raises(ConfigError, match="is empty"):
        detector.find_crop(picture(), "  ")


def test_a_model_that_never_saw_a_box_says_so() -> None:
    with pytest.raises(BundleError, match="without parts of a detector"):
        Detector.of(micro_bundle())
    pretrained = Detector.of(micro_detector(stage="pretrain"))
    with pytest.raises(BundleError, match="never saw a box.*detection/finetune"):
        pretrained.detect([picture()], ["bear"])
    pixels, boxes = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.tensor([[[0.0, 0, 1, 1]]])
    assert pretrained.score_regions(pixels, boxes, ["bear", "cat"]).shape == (1, 1, 2)


def test_the_frozen_tower_is_what_the_run_started_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another start is loaded; the same tower is shared; a start that is gone is a warning."""
    start = save_bundle(micro_bundle(seed=3), tmp_path / "start")
    bundle = micro_detector()
    for recipe, expected in (
        ({"model": {"weights": str(start)}}, "start"),
        ({"model": {"weights": str(start)}, "objective": {"backbone_rate": 0.0}}, "own"),
        ({"model": {"weights": str(tmp_path / "gone")}}, "own"),
        ({}, "own"),
    ):
        bundle.provenance = Provenance(recipe=recipe)
        detector = Detector.of(bundle)
        assert ("own" if detector.frozen is bundle else "start") == expected
    assert "gone" in caplog.text
    same = save_bundle(micro_bundle(), tmp_path / "same")
    bundle.provenance = Provenance(recipe={"model": {"weights": str(same)}})
    assert Detector.of(bundle).shared
    folder = save_bundle(bundle, tmp_path / "detector")
    loaded = load_detector(folder, frozen=start)
    assert not loaded.shared
    assert loaded.frozen.folder == start


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"novel=0\.5 has no effect with ensemble=false"):
        Options(ensemble=False, novel=0.5)
