"""Detector fine-tuning: what regions are called, what stays frozen, and that a micro detector learns to find."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError, MissingField
from vlp.bundle import save_bundle
from vlp.detection.losses import BACKGROUND, IGNORED
from vlp.detection.maps import maps_of
from vlp.detection.model import PartsConfig, load_parts, make_parts
from vlp.detection.propose import join_levels, propose
from vlp.detection.targets import NONE, points_of
from vlp.objectives import base, detection_finetune
from vlp.objectives.base import Dims
from vlp.objectives.detection_finetune import DetectionFinetune, classes_of
from vlp.testing import FULL_BOX_LABELS, MICRO_OPTIONS, MICRO_PARTS, attached, full_batch, micro_bundle, network_input

OPTIONS = MICRO_OPTIONS["detection_finetune"]


def dims_of(labels: tuple[str, ...] = FULL_BOX_LABELS, weights: str | None = None) -> Dims:
    return Dims(16, 2.6592, tokenizer=micro_bundle().tokenizer, box_labels=labels, weights=weights)


def made(model: nn.Module, dims: Dims | None = None, **options: Any) -> DetectionFinetune:
    torch.manual_seed(0)
    module, config = base.load({"name": "detection_finetune", **OPTIONS, **options})
    objective: DetectionFinetune = attached(module.build(config, dims or dims_of()), model)
    return objective


def test_classes_of_proposals_by_hand() -> None:
    """Matched with box 0 (class 7), box 1 (unknown), none; then a place without a proposal."""
    match, classes = torch.tensor([[0, 1, NONE, 0]]), torch.tensor([[7, IGNORED]])
    filled = torch.tensor([[True, True, True, False]])
    assert classes_of(match, classes, filled).tolist() == [[7, IGNORED, BACKGROUND, IGNORED]]
    none = classes_of(torch.full((1, 2), NONE), torch.zeros(1, 0).long(), filled[:, 2:])
    assert none.tolist() == [[BACKGROUND, IGNORED]]


def test_proposals_are_the_best_points_that_do_not_overlap() -> None:
    """Two levels of 2 x 2 and 1 x 1 points: the coarse one says the left half, a fine one the same, another the lower
    right quarter, and the rest nothing."""
    points = points_of([(2, 2), (1, 1)])
    sides = torch.zeros(1, 5, 4)
    sides[0, 0] = torch.tensor([0.5, 0.5, 0.5, 1.5])  # from (1/4, 1/4) in halves: the left half
    sides[0, 3] = torch.tensor([0.5, 0.5, 0.5, 0.5])  # from (3/4, 3/4): the lower right quarter
    sides[0, 4] = torch.tensor([0.5, 0.5, 0.0, 0.5])  # from (1/2, 1/2) in wholes: the left half again
    centre = torch.tensor([[1.0, 9.0, 9.0, 3.0, 2.0]])
    boxes, score, filled = propose(points, centre, sides, keep=4)
    assert filled.tolist() == [[True, True, False, False]]
    assert boxes.tolist() == [[[0.5, 0.5, 1, 1], [0, 0, 0.5, 1], [0, 0, 1, 1], [0, 0, 1, 1]]]
    torch.testing.assert_close(score, torch.tensor([[3.0, 2.0]]).sigmoid() @ torch.eye(2, 4))
    assert propose(points, centre, sides, keep=0)[0].shape == (1, 0, 4)


def test_what_regions_are_told() -> None:
    """Sample 0: box 0 of class 0, box 1 unknown; sample 1: box 0 of class 1, box 1 masked; sample 3 has no box."""
    model = micro_bundle().model
    features = made(model).encode(model, *network_input(full_batch()))  # type: ignore[arg-type]
    told = features.extra["class"]
    assert told[0, :3].tolist() == [0, IGNORED, IGNORED]
    assert told[1, :3].tolist() == [1, IGNORED, IGNORED]
    assert told[3, :3].tolist() == [IGNORED] * 3
    assert set(told[3, 3:].tolist()) <= {BACKGROUND, IGNORED}
    assert features.extra["regions"].shape == (6, 7, 16)
    assert features.extra["box"].shape == (6, 4 * 4 + 2 * 2), "levels 2 and 3 of a picture of 16 pixels"
    assert features.extra["box"][3].eq(NONE).all()


def test_the_text_tower_is_frozen_and_the_rest_learns() -> None:
    model = micro_bundle().model
    objective = made(model)
    output = objective(objective.encode(model, *network_input(full_batch())), torch.tensor(10.0))  # type: ignore[arg-type]
    output.loss.backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched
    assert all(name.startswith("visual.") for name in touched)
    assert objective.parts is not None
    assert all(parameter.grad is not None for parameter in objective.parts.parameters())
    assert objective.rate_scale("visual.conv1.weight") == 0.6
    assert set(output.parts) == {"class", "box", "centre"}


def test_boxes_that_are_none_change_nothing() -> None:
    """A line, a box turned inside out and one that is not a number, marked as real with a class: as if masked."""
    model = micro_bundle().model
    objective = made(model)
    batch = full_batch(4)
    assert batch.boxes is not None
    assert batch.box_mask is not None
    odd = torch.tensor([[0.5, 0.1, 0.5, 0.9], [0.9, 0.9, 0.1, 0.1], [0.1, 0.1, float("nan"), 0.9]])
    found = []
    for boxes, mask in ((odd, True), (torch.zeros(3, 4), False)):
        more = replace(
            batch,
            boxes=torch.cat([batch.boxes, boxes.expand(4, 3, 4)], dim=1),
            box_mask=torch.cat([batch.box_mask, torch.full((4, 3), mask)], dim=1),
            box_labels=torch.cat([torch.as_tensor(batch.box_labels), torch.zeros(4, 3).long()], dim=1),
        )
        features = objective.encode(model, *network_input(more))  # type: ignore[arg-type]
        found.append(objective(features, torch.tensor(10.0)).loss)
    assert found[0].isfinite()
    assert torch.equal(*found)


def test_a_batch_without_any_box_trains_the_background_alone() -> None:
    model = micro_bundle().model
    objective = made(model)
    batch = full_batch(2)
    bare = replace(
        batch, boxes=torch.zeros(2, 0, 4), box_mask=torch.zeros(2, 0).bool(), box_labels=torch.zeros(2, 0).long()
    )
    output = objective(objective.encode(model, *network_input(bare)), torch.tensor(10.0))  # type: ignore[arg-type]
    assert output.parts["box"] == 0
    assert output.loss.isfinite()
    output.loss.backward()


def scenes(count: int) -> Batch:
    """Dark pictures of 16 x 16 with a bright red or green square of 7 to 9 pixels."""
    generator = torch.Generator().manual_seed(0)
    base_batch = full_batch(count)
    pixels = torch.randint(0, 40, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    boxes, labels = torch.zeros(count, 1, 4), torch.arange(count)[:, None] % 2
    for row in range(count):
        size = int(torch.randint(7, 10, (), generator=generator))
        x, y = torch.randint(0, 17 - size, (2,), generator=generator).tolist()
        pixels[row, row % 2, y : y + size, x : x + size] = 230
        boxes[row, 0] = torch.tensor([x, y, x + size, y + size]) / 16
    mask = torch.ones(count, 1, dtype=torch.bool)
    return replace(base_batch, pixels=pixels, boxes=boxes, box_mask=mask, box_labels=labels)


def test_a_micro_detector_learns_to_find(tmp_path: Path) -> None:
    """Sixty steps on bright squares of two colours: the best proposal overlaps the square, the class is right."""
    torch.manual_seed(0)
    bundle = micro_bundle()
    model = bundle.model.train()
    objective = made(model, parts={**MICRO_PARTS, "width": 16, "roi_size": 4, "hidden": 32})
    batch = scenes(24)
    pixels, batch = network_input(batch)
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective(objective.encode(model, pixels, batch), torch.tensor(10.0)).loss  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert objective.parts is not None
    with torch.no_grad():
        levels = objective.parts.levels(maps_of(model), pixels)
        boxes = propose(*join_levels(objective.parts.dense(levels.maps)), keep=1)[0]
        regions = objective.parts.embed_assigned(levels, boxes)
        classes = (regions @ objective.texts_KD.T).argmax(dim=-1)
    assert torch.equal(classes, torch.as_tensor(batch.box_labels))
    assert iou_of(boxes[:, 0], torch.as_tensor(batch.boxes)[:, 0]).mean() > 0.5
    bundle.parts |= objective.extra_parts()
    again = load_parts(save_bundle(bundle, tmp_path / "bundle"), model)
    assert (again.info.stage, again.info.base_labels) == ("finetune", FULL_BOX_LABELS)


def iou_of(first: Tensor, second: Tensor) -> Tensor:
    from vlp.detection.boxes import paired_iou

    return paired_iou(first, second)


def test_it_goes_on_from_the_parts_of_the_bundle_it_starts_from(tmp_path: Path) -> None:
    bundle = micro_bundle()
    parts = make_parts(PartsConfig(**MICRO_PARTS), bundle.model, 16)
    bundle.parts["detection"] = parts
    folder = save_bundle(bundle, tmp_path / "start")
    module, config = base.load({"name": "detection_finetune"})
    objective = attached(module.build(config, dims_of(weights=str(folder))), bundle.model)
    for own, theirs in zip(objective.parts.parameters(), parts.parameters(), strict=True):
        assert torch.equal(own, theirs)
        assert own.requires_grad
    with pytest.raises(ConfigError, match=r"objective\.parts\.width=9"):
        made(bundle.model, dims_of(weights=str(folder)), parts={**MICRO_PARTS, "width": 9})


def test_cost_grows_with_the_proposals() -> None:
    """Two regions more, one on each level, cost their head three times: 2 x 2 bins of 8 channels, a 3 x 3 convolution
    among them, 32 x 16 and 16 x 16 weights, two FLOPs each; cutting them out adds at most the 16 places of a map for
    each bin and channel."""
    meta = micro_bundle().model.to("meta")
    four, six = (made(micro_bundle().model, proposals=count).more_flops(meta, 16, 3, 3) for count in (4, 6))
    heads = 2 * 3 * 2 * (4 * 8 * 8 * 9 + 32 * 16 + 16 * 16)
    assert heads <= six - four < heads + 2 * 3 * 2 * (4 * 8 * 16)


def test_what_is_missing_is_named() -> None:
    model = micro_bundle().model
    with pytest.raises(ConfigError, match=r"data\.boxes\.labels"):
        made(model, dims_of(labels=()))
    with pytest.raises(ConfigError, match="nothing is learned"):
        detection_finetune.Config(class_weight=0, box_weight=0, centre_weight=0)
    with pytest.raises(MissingField, match="box_mask"):
        made(model).encode(model, *network_input(replace(full_batch(), box_mask=None)))  # type: ignore[arg-type]
