"""Trimming text is exact where it is done, and not done where it would not be."""

from typing import Any

import pytest
import torch

from vlp.models import instantiate
from vlp.models.text import TrimmedText, can_trim
from vlp.testing import MICRO, WORDS, micro_bundle


def custom(**change: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return instantiate({**MICRO, "custom_text": True, "text_cfg": {**MICRO["text_cfg"], **change}})


def test_trimmed_text_gives_the_same_features_and_gradients() -> None:
    tokens = micro_bundle().tokenizer(WORDS)
    model = custom()
    results = []
    for encoder in (model, TrimmedText(model)):
        model.zero_grad()
        features = encoder.encode_text(tokens, normalize=True)  # type: ignore[operator]
        (features @ torch.arange(16.0)).square().sum().backward()
        grads = [p.grad.clone() for p in model.get_submodule("text").parameters() if p.grad is not None]
        results.append([features.detach(), *grads])
    assert len(results[0]) > 10
    assert int(tokens.argmax(dim=1).max()) + 1 < tokens.shape[1], "nothing would be trimmed"
    for whole, trimmed in zip(*results, strict=True):
        assert (trimmed - whole).abs().max() <= 1e-4 * whole.abs().max()


@pytest.mark.parametrize("change", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_towers_that_look_at_the_padding_keep_it(change: dict[str, Any]) -> None:
    assert can_trim(custom().get_submodule("text"))
    assert not can_trim(custom(**change).get_submodule("text"))


def test_texts_of_many_lengths_go_through_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both classes, grouped although they are short, against the model's own whole pass."""
    monkeypatch.setattr("vlp.models.text.SHORT", 1)
    tokens = micro_bundle().tokenizer(WORDS * 3)
    for model in (custom(), instantiate(MICRO)):
        whole = model.encode_text(tokens)  # type: ignore[operator]
        found = TrimmedText(model).encode_text(tokens)
        assert not torch.equal(found, whole), "computed another way"
        assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()
