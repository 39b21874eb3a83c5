"""What the lean towers leave out changes neither features nor gradients, and nothing is left out where it would."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vlp.models import instantiate
from vlp.models.image import can_pool_early
from vlp.models.lean import LeanModel
from vlp.models.text import can_trim
from vlp.testing import MICRO, WORDS, micro_bundle

DEEP = {
    **MICRO,
    "vision_cfg": {**MICRO["vision_cfg"], "layers": 2},
    "text_cfg": {**MICRO["text_cfg"], "layers": 2},
}


def build(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, plain: bool = False) -> Any:
    """Two layers each, so that a middle and a last block are there."""
    torch.manual_seed(0)
    towers = {"vision_cfg": DEEP["vision_cfg"] | (vision or {}), "text_cfg": DEEP["text_cfg"] | (text or {})}
    return instantiate({**DEEP, **towers, **({} if plain else {"custom_text": True})})


def outcome(model: Any, encoder: Any, side: str, data: Tensor) -> list[Tensor]:
    """Features and the gradients of all weights that have one."""
    model.zero_grad()
    features = getattr(encoder, f"encode_{side}")(data, normalize=True)
    (features @ torch.arange(16.0)).square().sum().backward()
    return [features.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(model: Any, side: str, data: Tensor) -> None:
    whole, lean = outcome(model, model, side, data), outcome(model, LeanModel(model), side, data)
    assert len(whole) == len(lean) > 10
    for expected, found in zip(whole, lean, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-7
    assert any(not torch.equal(expected, found) for expected, found in zip(whole, lean, strict=True)), "the same way"


@pytest.mark.parametrize("count", [1, 2, 7, 50])
@pytest.mark.parametrize("plain", [True, False])
def test_texts_of_all_lengths(count: int, plain: bool) -> None:
    """One group and many; sorted and brought back into order."""
    tokens = micro_bundle().tokenizer((WORDS * 8)[:count])
    assert int(tokens.argmax(dim=1).max()) + 1 < tokens.shape[1], "nothing would be trimmed"
    assert_same(build(plain=plain), "text", tokens)


VISION: list[dict[str, Any]] = [
    {}, {"pool_type": "avg"}, {"final_ln_after_pool": True}, {"no_ln_pre": True}, {"ls_init_value": 0.1},
    {"pos_embed_type": "sin_cos_2d"},
]  # fmt: skip


@pytest.mark.parametrize("vision", VISION)
def test_pictures(vision: dict[str, Any]) -> None:
    assert_same(build(vision), "image", torch.rand(5, 3, 16, 16))


def test_activations_computed_again_are_the_same() -> None:
    model = build()
    before = [outcome(model, LeanModel(model), "text", micro_bundle().tokenizer(WORDS))]
    before.append(outcome(model, LeanModel(model), "image", torch.ones(2, 3, 16, 16)))
    model.set_grad_checkpointing(True)
    after = [outcome(model, LeanModel(model), "text", micro_bundle().tokenizer(WORDS))]
    after.append(outcome(model, LeanModel(model), "image", torch.ones(2, 3, 16, 16)))
    for first, second in zip(before, after, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_dropped_patches_are_drawn_as_the_model_draws_them() -> None:
    model = build({"patch_dropout": 0.5}).train()
    found = []
    for encoder in (model, LeanModel(model)):
        torch.manual_seed(3)
        found.append(encoder.encode_image(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_float32() -> None:
    model = build()
    lean, tokens = LeanModel(model), micro_bundle().tokenizer(WORDS)
    exact = [model.encode_image(torch.ones(2, 3, 16, 16)), model.encode_text(tokens)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [lean.encode_image(torch.ones(2, 3, 16, 16)), lean.encode_text(tokens)]
    for expected, low in zip(exact, found, strict=True):
        assert torch.nn.functional.cosine_similarity(expected, low.float()).min() > 0.999


@pytest.mark.parametrize("change", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_text_towers_that_look_at_the_padding_keep_it(change: dict[str, Any]) -> None:
    assert can_trim(build().text)
    assert not can_trim(build(text=change).text)


@pytest.mark.parametrize("change", [{"attentional_pool": True}, {"output_tokens": True}, {"qk_norm": True}])
def test_image_towers_that_need_all_tokens_keep_them(change: dict[str, Any]) -> None:
    assert can_pool_early(build().visual)
    assert not can_pool_early(build(change).visual)
