"""CleanCLIP's loss: by hand, against a slow reference with gradients, and with one side switched off."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import ConfigError, MissingField
from vlp.models import instantiate
from vlp.objectives import base
from vlp.objectives.base import Dims, Features
from vlp.testing import MICRO, attached, full_batch, network_input


def objective(**options: float) -> base.Objective:
    module, config = base.load({"name": "inmodal", **options})
    found: base.Objective = module.build(config, Dims(16, math.log(10)))
    return found


def reference(image_BD: Tensor, text_BD: Tensor, image_copy_BD: Tensor, text_copy_BD: Tensor, scale: float) -> Tensor:
    """Straight from the paper's code, row by row."""

    def one_way(rows_BD: Tensor, columns_BD: Tensor) -> Tensor:
        losses = []
        for number, row_D in enumerate(rows_BD):
            scores_B = torch.stack([scale * (row_D * column_D).sum() for column_D in columns_BD])
            losses.append(torch.logsumexp(scores_B, 0) - scores_B[number])
        return torch.stack(losses).mean()

    across = 0.5 * (one_way(image_BD, text_BD) + one_way(text_BD, image_BD))
    return across + 0.5 * (one_way(image_BD, image_copy_BD) + one_way(text_BD, text_copy_BD))


def test_by_hand() -> None:
    """Two samples, unit vectors of the axes, scale 2: every cross-entropy is log(1 + e^-2) = 0.126928; their sum with
    weights 1 and 1/2 + 1/2 is twice that."""
    eye = torch.eye(2)
    output = objective()(Features(eye, eye, extra={"image": eye, "text": eye}), torch.tensor(2.0))
    assert output.loss.item() == pytest.approx(2 * 0.126928, abs=1e-5)
    assert output.parts["intra_text"].item() == pytest.approx(0.126928, abs=1e-5)


@pytest.mark.parametrize("count", [3, 7])
def test_the_reference_agrees_with_gradients(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    leaves = [torch.randn(count, 5, generator=generator, requires_grad=True) for _ in range(4)]
    image, text, image_copy, text_copy = (F.normalize(leaf, dim=1) for leaf in leaves)
    features = Features(image, text, extra={"image": image_copy, "text": text_copy})
    found = torch.autograd.grad(objective()(features, torch.tensor(7.0)).loss, leaves, retain_graph=True)
    expected = torch.autograd.grad(reference(image, text, image_copy, text_copy, 7.0), leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_copies_are_one_further_view_and_text() -> None:
    torch.manual_seed(0)
    model = instantiate(MICRO)
    pixels, batch = network_input(full_batch())
    features = attached(objective(), model).encode(model, pixels, batch)
    assert batch.views is not None
    assert torch.allclose(features.extra["image"], model.encode_image(batch.views[0], normalize=True))  # type: ignore[operator]
    assert torch.allclose(features.extra["text"].norm(dim=1), torch.ones(6))
    alone = replace(batch, extra_tokens=None)
    with pytest.raises(MissingField, match=r"data\.texts=2"):
        attached(objective(), model).encode(model, pixels, alone)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        objective(contrast=0, intra=0)
