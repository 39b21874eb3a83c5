"""Distillation: by hand, against open_clip's DistillClipLoss with gradients, teachers of all kinds."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError, MissingField
from data_pipelines.preprocess import ImageConfig, normalise
from data_pipelines.tokens import learn_tokenizer
from vlp.bundle import Bundle, save_bundle
from vlp.models import instantiate
from vlp.objectives import base, distill
from vlp.objectives.base import Dims, Features, further
from vlp.testing import MICRO, WORDS, attached, full_batch, micro_bundle, network_input
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
from open_clip.loss import DistillClipLoss  # noqa: E402


def make(teacher_scale: float = 10.0, **options: Any) -> distill.Distill:
    """An objective whose teacher, `start`, has this scale."""
    model: Any = instantiate(MICRO)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(teacher_scale))
    objective: distill.Distill = attached(distill.build(distill.Config(**options), Dims(16, 2.0)), model)
    return objective


def random_features(count: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    raw = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(raw[0], dim=1), F.normalize(raw[1], dim=1)


def test_by_hand() -> None:
    """Two pairs. Student on the axes at scale 2: rows' log-softmax is -0.126928 on the diagonal, -2.126928 beside it.

    The teacher finds all pairs alike: targets 1/2, so its term is (0.126928 + 2.126928) / 2 = 1.126928 either way. With
    weight 0.5 beside plain CLIP's 0.126928: 0.690392.
    """
    eye, same = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    features = Features(eye, eye, extra={"teacher_image": same, "teacher_text": same})
    output = make(weight=0.5)(features, torch.tensor(2.0))
    assert output.parts["distill"].item() == pytest.approx(1.126928, abs=1e-6)
    assert output.loss.item() == pytest.approx(0.690392, abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 33])
@pytest.mark.parametrize("teacher_scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("whole", [distill.WHOLE, 0])
def test_equals_open_clips_loss_with_gradients(
    count: int, teacher_scale: float, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of another width; at both ends of its scale; in one piece and in tiles."""
    monkeypatch.setattr(distill, "WHOLE", whole)
    sides, teacher = random_features(count, 5, 0), random_features(count, 9, 1)
    found = []
    for ours in (True, False):
        image, text = (side.clone().requires_grad_() for side in sides)
        scale = torch.tensor(8.0, requires_grad=True)
        if ours:
            extra = {"teacher_image": teacher[0], "teacher_text": teacher[1]}
            loss = make(teacher_scale)(Features(image, text, extra=extra), scale).loss
        else:
            loss = sum(DistillClipLoss()(image, text, scale, *teacher, torch.tensor(teacher_scale)))
        found.append([loss.detach(), *torch.autograd.grad(loss, (image, text, scale))])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-4, atol=2e-6)


def test_a_mask_is_for_the_captions_alone() -> None:
    """Equal captions are no negatives of each other, which the teacher knows by itself: its term stays."""
    sides, teacher = random_features(5, 5, 0), random_features(5, 9, 1)
    extra = {"teacher_image": teacher[0], "teacher_text": teacher[1]}
    ids, scale = torch.zeros(5, 1, dtype=torch.int64), torch.tensor(8.0)
    plain = make()(Features(*sides, extra=extra), scale)
    masked = make(clip={"mask": "captions"})(Features(*sides, ids, extra=extra), scale)
    assert masked.parts["image_to_text"].item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(masked.parts["distill"], plain.parts["distill"])


def test_start_is_the_model_before_the_first_step() -> None:
    """The teacher stays when the student moves, gets no gradient and is no part of the state."""
    torch.manual_seed(0)
    model: Any = instantiate(MICRO)
    objective = attached(distill.build(distill.Config(), Dims(16, 2.0)), model)
    with torch.no_grad():
        expected = F.normalize(model.encode_image(network_input(full_batch())[0]), dim=1)
        for parameter in model.parameters():
            parameter.add_(0.1)
    features = objective.encode(model, *network_input(full_batch()))
    torch.testing.assert_close(features.extra["teacher_image"], expected, rtol=1e-4, atol=1e-5)
    assert not features.extra["teacher_image"].requires_grad
    assert list(objective.parameters()) == []
    assert objective.state_dict() == {}


def test_a_student_of_the_second_view_is_taught_what_the_teacher_makes_of_the_first() -> None:
    model: Any = instantiate(MICRO)
    objective = attached(distill.build(distill.Config(student_sees="second"), Dims(16, 2.0)), model)
    batch = full_batch()
    first_BCHW, ready = network_input(batch)
    (second_BCHW,) = further(ready, "views", 1, "test")
    features = objective.encode(model, first_BCHW, ready)
    for found, pixels_BCHW in ((features.image_BD, second_BCHW), (features.extra["teacher_image"], first_BCHW)):
        torch.testing.assert_close(found, F.normalize(model.encode_image(pixels_BCHW), dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(MissingField, match=r"data\.views"):
        objective.encode(model, first_BCHW, replace(ready, views=None))


def teacher_bundle(folder: Path, image: ImageConfig) -> Bundle:
    """A wider teacher for pictures of its own, with the vocabulary of `micro_bundle`."""
    tokenizer = micro_bundle().tokenizer
    vision = {**MICRO["vision_cfg"], "image_size": image.size}
    text = {**MICRO["text_cfg"], "vocab_size": tokenizer.vocab_size}
    config = {**MICRO, "embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    bundle = Bundle("teacher", instantiate(config).eval(), config, image, tokenizer)
    save_bundle(bundle, folder)
    return bundle


def test_a_bundle_teaches_with_its_own_width_size_and_normalisation(tmp_path: Path) -> None:
    """It sees what it would see at inference, but for the size."""
    theirs = ImageConfig(size=32)
    own = ImageConfig(size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    bundle = teacher_bundle(tmp_path / "teacher", theirs)
    student = micro_bundle()
    dims = Dims(16, 2.0, image=own, tokenizer=student.tokenizer)
    config = distill.Config(teacher=str(tmp_path / "teacher"))
    objective = attached(distill.build(config, dims), student.model)
    pixels = full_batch().pixels
    batch = Batch(tuple("abcdef"), pixels, student.tokenizer(WORDS[:6]))
    features = objective.encode(student.model, normalise(pixels, own), batch)
    larger = F.interpolate(pixels.float(), (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = bundle.model.encode_image(normalise(larger, theirs), normalize=True)  # type: ignore[operator]
    assert features.extra["teacher_image"].shape == (6, 24)
    torch.testing.assert_close(features.extra["teacher_image"], expected, rtol=1e-3, atol=1e-4)
    objective(features, torch.tensor(10.0)).loss.backward()


def test_teachers_that_cannot_teach_are_refused(tmp_path: Path) -> None:
    teacher_bundle(tmp_path / "teacher", ImageConfig(size=16))
    config = distill.Config(teacher=str(tmp_path / "teacher"))
    known = micro_bundle().tokenizer
    others = learn_tokenizer(["other words entirely"], vocab_size=300, context_length=12)
    longer = learn_tokenizer(WORDS, vocab_size=320, context_length=20)
    grey = ImageConfig(size=16, channels=1, mean=(0.5,), std=(0.5,))
    for dims, named in (
        (Dims(16, 2.0, tokenizer=others), "another tokenizer"),
        (Dims(16, 2.0, tokenizer=longer), r"reads 12 tokens, tokenizer\.context_length=20"),
        (Dims(16, 2.0, tokenizer=known, image=grey), r"3 channels, data\.image\.channels=1"),
    ):
        with pytest.raises(ConfigError, match=named):
            distill.build(config, dims).attach(instantiate(MICRO))


def test_frozen_trunks_are_refused() -> None:
    """Their features are computed once, and the teacher has no picture to see."""
    objective = make()
    batch = Batch(("a",), torch.empty(1, 0), torch.empty(1, 0), image_features=torch.rand(1, 8), text_features=None)

    class Heads(torch.nn.Module):
        def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
            return image

        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            return text

    with pytest.raises(ConfigError, match=r"both trunks frozen.*model\.lock_image=false"):
        objective.encode(Heads(), torch.rand(1, 8), batch)  # type: ignore[arg-type]


def test_without_weight_no_teacher_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"objective\.teacher=nowhere has no effect with objective\.weight=0"):
        base.load({"name": "distill", "teacher": "nowhere", "weight": 0})
    objective = distill.build(distill.Config(weight=0), Dims(16, 2.0))
    objective.attach(instantiate(MICRO))
    assert not objective._teacher
    output = objective(Features(torch.eye(2), torch.eye(2)), torch.tensor(2.0))
    assert output.loss.item() == pytest.approx(0.126928, abs=1e-6)
