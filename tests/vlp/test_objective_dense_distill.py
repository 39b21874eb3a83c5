"""Dense distillation: by hand, against the definition with gradients, regions, the switch, teachers of all kinds."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import ConfigError
from data_pipelines.preprocess import ImageConfig, normalise
from data_pipelines.tokens import learn_tokenizer
from vlp.bundle import Bundle, save_bundle
from vlp.detection.dense import dense_features
from vlp.detection.modality import render
from vlp.detection.segment import classes_of, prototypes
from vlp.models import instantiate
from vlp.objectives import base, dense_distill
from vlp.objectives.base import Dims, Features
from vlp.testing import MICRO, WORDS, attached, full_batch, micro_bundle, network_input

SETTINGS: dict[str, Any] = {"labels": ["red circle", "tall tree", "pepper"], "templates": "plain"}


def make(model: Any = None, dims: Dims | None = None, **options: Any) -> dense_distill.DenseDistill:
    """An objective that has met its model."""
    bundle = micro_bundle()
    dims = dims or Dims(16, 2.0, tokenizer=bundle.tokenizer)
    config = dense_distill.Config(**SETTINGS | options)
    objective: dense_distill.DenseDistill = attached(dense_distill.build(config, dims), model or bundle.model)
    return objective


def test_the_semantic_term_by_hand() -> None:
    """Prototypes on the axes, features (ln 3, 0) twice: softmax (3/4, 1/4); at label 0 ln(4/3), at label 1 ln 4."""
    dense = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    found = dense_distill.semantic_loss(dense, torch.eye(2), torch.tensor([[[0, 1]]]))
    assert found.tolist() == [[[pytest.approx(0.287682, abs=1e-6), pytest.approx(1.386294, abs=1e-6)]]]


def test_the_region_term_by_hand() -> None:
    """Two places p' = 0 and ln 3 side by side, one prototype 1: attention (1/4, 3/4), fused 0.823959.

    1 - sigmoid(0) = 0.5; 1 - sigmoid(0.823959 ln 3 = 0.905211) = 0.287980. With labels of their own each is alone:
    0.5 and 1 - sigmoid(ln 3 squared = 1.206949) = 0.230242.
    """
    local = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2)
    same = dense_distill.region_loss(local, torch.ones(2, 1), torch.tensor([[[0, 0]]]), 2)
    assert same.tolist() == [[[pytest.approx(0.5), pytest.approx(0.287980, abs=1e-5)]]]
    apart = dense_distill.region_loss(local, torch.ones(2, 1), torch.tensor([[[0, 1]]]), 2)
    assert apart.tolist() == [[[pytest.approx(0.5), pytest.approx(0.230242, abs=1e-5)]]]


def slow_region(local: Tensor, prototype: Tensor, label: Tensor, side: int) -> Tensor:
    """Straight from the definition, place by place."""
    values = []
    for b in range(local.shape[0]):
        for y in range(local.shape[2]):
            for x in range(local.shape[3]):
                fellows = [
                    (r, c)
                    for r in range(local.shape[2])
                    for c in range(local.shape[3])
                    if (r // side, c // side) == (y // side, x // side) and label[b, r, c] == label[b, y, x]
                ]
                scores = torch.stack([local[b, :, r, c] @ prototype[label[b, y, x]] for r, c in fellows])
                weights = scores.softmax(dim=0)
                fused = sum(
                    (w * local[b, :, r, c] for w, (r, c) in zip(weights, fellows, strict=True)), torch.zeros(())
                )
                values.append(1 - torch.sigmoid(fused @ local[b, :, y, x]))
    return torch.stack(values).view(label.shape)


@pytest.mark.parametrize("side", [2, 3, 8])
@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 1), (1, 7)])
def test_the_region_term_equals_the_definition_with_gradients(side: int, grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(side)
    raw = torch.randn(2, 3, *grid, generator=generator)
    prototype = F.normalize(torch.randn(4, 3, generator=generator), dim=1)
    label = torch.randint(0, 4, (2, *grid), generator=generator)
    weights = torch.randn(2, *grid, generator=generator)
    found = []
    for way in (dense_distill.region_loss, slow_region):
        local = raw.clone().requires_grad_()
        values = way(local, prototype, label, side)
        (values * weights).sum().backward()
        assert local.grad is not None
        found.append((values.detach(), local.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_the_whole_loss_is_the_sum_of_its_terms() -> None:
    """Mean over places of both terms, the second by its weight; and of the second form, the teacher's features."""
    model = micro_bundle().model
    for region in ("fused", "image"):
        objective = make(model, region=region, region_weight=0.5, weight=2.0)
        with torch.no_grad():
            objective.local.weight.add_(0.1 * torch.randn(16, 16))
        features = objective.encode(model, *network_input(full_batch()))  # type: ignore[arg-type]
        output = objective(features, torch.tensor(10.0))
        dense, label = features.extra["dense"], features.extra["labels"]
        local = torch.einsum("bdhw,ed->behw", dense, objective.local.weight)
        semantic = dense_distill.semantic_loss(dense, objective.prototype_PD, label).mean()
        if region == "fused":
            second = dense_distill.region_loss(local, objective.prototype_PD, label, 2).mean()
        else:
            second = (1 - F.cosine_similarity(local, features.extra["teacher"], dim=1)).mean()
        torch.testing.assert_close(output.loss, 2.0 * (semantic + 0.5 * second))
        assert set(output.parts) == {"semantic", "region", "agreement"}
    plain = make(model, region="none")
    assert list(plain.parameters()) == []
    assert set(plain(features, torch.tensor(10.0)).parts) == {"semantic", "agreement"}


def test_the_teacher_sees_the_picture_and_the_student_its_edges() -> None:
    """Labels are those of zero-shot segmentation by the start model; moving the student moves them not."""
    bundle = micro_bundle()
    start = Bundle("start", copy.deepcopy(bundle.model), {}, bundle.image, bundle.tokenizer)
    objective = make(bundle.model, background=["a wall"])
    pixels, batch = network_input(full_batch())
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    features = objective.encode(bundle.model, pixels, batch)  # type: ignore[arg-type]
    head = prototypes(start, classes_of(SETTINGS["labels"], ["a wall"]), ["{}"])
    cosines = torch.einsum("bdhw,pd->bphw", F.normalize(dense_features(start.model, pixels), dim=1), head)
    assert torch.equal(features.extra["labels"], cosines.argmax(dim=1))
    assert len(head) == 4
    seen = dense_features(bundle.model, render(pixels, "edges", None))
    torch.testing.assert_close(features.extra["dense"], seen)
    output = objective(features, torch.tensor(10.0))
    output.loss.backward()
    assert all(parameter.grad is None for parameter in objective._teacher[0].parameters())
    assert all(parameter.grad is None for parameter in bundle.model.transformer.parameters())  # type: ignore[union-attr]
    assert bundle.model.visual.conv1.weight.grad.abs().max() > 0  # type: ignore[union-attr, operator]


def test_a_student_learns_to_agree() -> None:
    """On one batch, from edges alone, within 60 steps; with the switch from a step on the loss stays finite.

    Two prototypes across the direction in which the teacher's places differ most, for an untrained one takes all places
    for the same of any texts.
    """
    torch.manual_seed(0)
    model = micro_bundle().model
    objective = make(model, switch_after=50)
    with torch.no_grad():
        places = (
            F.normalize(dense_features(model, network_input(full_batch())[0]), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        )
        middle = F.normalize(places.mean(dim=0), dim=0)
        rest = places - (places @ middle)[:, None] * middle
        widest = torch.linalg.svd(rest).Vh[0]
        objective.prototype_PD = torch.stack([widest, -widest])
    optimizer = torch.optim.Adam([*model.parameters(), *objective.parameters()], 3e-3)
    pixels, batch = network_input(full_batch())
    agreement = []
    for _ in range(60):
        output = objective(objective.encode(model, pixels, batch), torch.tensor(10.0))  # type: ignore[arg-type]
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.after_step(model)
        agreement.append(float(output.parts["agreement"]))
        assert math.isfinite(output.loss.item())
    assert agreement[0] < 0.8
    assert agreement[-1] > 0.95


def test_the_switch_takes_the_students_answers_after_a_step_alone() -> None:
    """Never before; then in about half of the steps, the same in every run; the count is saved and resumed."""
    objective = make(switch_after=10)
    answers = []
    for _ in range(210):
        answers.append(objective.own_targets())
        objective.after_step(torch.nn.Identity())
    assert not any(answers[:10])
    assert 70 < sum(answers[10:]) < 130
    assert "updates" in objective.state_dict()
    other = make(switch_after=10)
    other.load_state_dict(objective.state_dict())
    assert int(other.updates) == 210
    assert not any(make().own_targets() for _ in range(3))
    always = make(switch_after=1, switch_probability=1.0)
    always.after_step(torch.nn.Identity())
    assert always.own_targets()
    dense = torch.randn(3, 16, 2, 2)
    own = torch.einsum("bdhw,pd->bphw", dense, always.prototype_PD).argmax(dim=1)
    features = Features(torch.zeros(3, 16), torch.zeros(3, 16), extra={"dense": dense, "labels": (own + 1) % 3})
    expected = dense_distill.semantic_loss(dense, always.prototype_PD, own).mean()
    output = always(features, torch.tensor(10.0))
    torch.testing.assert_close(output.parts["semantic"], expected)
    assert output.parts["agreement"] == 0.0, "agreement is with the teacher, whatever the targets"


def teacher_bundle(folder: Path, size: int = 32, embed: int = 16, seed: int = 0, patch: int = 8) -> Bundle:
    """A teacher with the text tower of `micro_bundle` where size and width are its own."""
    own = micro_bundle(seed)
    vision = {**MICRO["vision_cfg"], "image_size": size, "patch_size": patch}
    text = {**MICRO["text_cfg"], "vocab_size": own.tokenizer.vocab_size}
    config = {**MICRO, "embed_dim": embed, "vision_cfg": vision, "text_cfg": text}
    model = instantiate(config).eval()
    if embed == 16:
        texts = {name: value for name, value in own.model.state_dict().items() if not name.startswith("visual.")}
        model.load_state_dict(texts, strict=False)
    bundle = Bundle("teacher", model, config, ImageConfig(size=size), own.tokenizer)
    save_bundle(bundle, folder)
    return bundle


def test_a_bundle_teaches_with_its_own_size_and_grid(tmp_path: Path) -> None:
    """Its 4 x 4 places are read at the student's 2 x 2: similarities are interpolated, not labels."""
    teacher = teacher_bundle(tmp_path / "teacher")
    student = micro_bundle()
    own = ImageConfig(size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    dims = Dims(16, 2.0, image=own, tokenizer=student.tokenizer)
    objective = make(student.model, dims, teacher=str(tmp_path / "teacher"))
    pixels = full_batch().pixels
    features = objective.encode(student.model, normalise(pixels, own), full_batch())  # type: ignore[arg-type]
    larger = F.interpolate(pixels.float(), (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        taught = F.normalize(dense_features(teacher.model, normalise(larger, teacher.image)), dim=1)
    cosines = torch.einsum("bdhw,pd->bphw", taught, objective.prototype_PD)
    assert cosines.shape[2:] == (4, 4)
    expected = F.interpolate(cosines, (2, 2), mode="bilinear").argmax(dim=1)
    assert (features.extra["labels"] == expected).float().mean() > 0.95
    objective(features, torch.tensor(10.0)).loss.backward()


def test_teachers_that_cannot_teach_are_refused(tmp_path: Path) -> None:
    teacher_bundle(tmp_path / "wide", embed=24)
    teacher_bundle(tmp_path / "other", seed=5)
    teacher_bundle(tmp_path / "good")
    known = micro_bundle().tokenizer
    grey = ImageConfig(size=16, channels=1, mean=(0.5,), std=(0.5,))
    other = learn_tokenizer(["other words entirely"], vocab_size=300, context_length=12)
    for folder, dims, named in (
        ("wide", Dims(16, 2.0, tokenizer=known), "embeds in 24 numbers, the student in 16"),
        ("other", Dims(16, 2.0, tokenizer=known), r"reads the labels otherwise.*model\.text_weights"),
        ("good", Dims(16, 2.0, tokenizer=other), "reads the labels otherwise"),
        ("good", Dims(16, 2.0, tokenizer=known, image=grey), r"3 channels, data\.image\.channels=1"),
        ("good", Dims(16, 2.0), "needs the run's tokenizer"),
    ):
        with pytest.raises(ConfigError, match=named):
            make(micro_bundle().model, dims, teacher=str(tmp_path / folder))
    make(micro_bundle().model, Dims(16, 2.0, tokenizer=known), teacher=str(tmp_path / "good"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, r"objective\.labels: none is given"),
        ({"labels": []}, "holds no labels"),
        ({"labels": ["a", "a"]}, "a label occurs twice"),
        ({"labels": ["a"], "weight": 0}, "objective.weight=0 and objective.clip_weight=0"),
        (
            {"labels": ["a"], "weight": 0, "clip_weight": 1},
            r"objective\.labels=.* has no effect with objective\.weight=0",
        ),
        ({"labels": ["a"], "region": "none", "region_weight": 2}, "region_weight=2.0 has no effect"),
        ({"labels": ["a"], "region": "image", "region_side": 4}, "region_side=4 has no effect"),
        ({"labels": ["a"], "switch_probability": 0.2}, "switch_probability=0.2 has no effect"),
        ({"labels": ["a"], "switch_after": 0}, "switch_after"),
        ({"labels": ["a"], "clip": {"smoothing": 0.1}}, "clip=.* has no effect"),
        ({"labels": ["a"], "modality": "depth"}, "modality"),
        ({"labels": ["a"], "templates": ["no braces"]}, "every template needs"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        base.load({"name": "dense_distill", **options})


def test_labels_come_from_a_file_and_templates_by_name(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("bird\nfruit\n")
    config = dense_distill.Config(labels=str(tmp_path / "labels.txt"))
    assert config.labels == {"bird": ("bird",), "fruit": ("fruit",)}
    assert len(config.templates) == 80
    named = dense_distill.Config(labels={"fruit": ["apple", "pear"]})
    assert dense_distill.Config.model_validate(named.model_dump(mode="json", exclude_unset=True)) == named
    assert WORDS
