"""Captions beside contrast: by hand, against open_clip's CoCaLoss with gradients, and served like any CoCa."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError
from vlp.bundle import Bundle, load_bundle, save_bundle
from vlp.infer import encode_pixels, encode_texts
from vlp.models import instantiate
from vlp.models.lean import LeanModel
from vlp.objectives import base, coca
from vlp.objectives.base import Dims
from vlp.testing import MICRO, MICRO_COCA, WORDS, attached, micro_bundle, network_input
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()
from open_clip.loss import CoCaLoss  # noqa: E402

DIMS = Dims(16, math.log(10))


def make(seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """An objective that has met a model with a decoder, and the model."""
    torch.manual_seed(seed)
    model = instantiate(MICRO_COCA)
    return attached(coca.build(coca.Config(**options), DIMS), model), model


def texts(count: int) -> Batch:
    """Pictures, and texts of different lengths with padding behind them."""
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Batch(tuple(map(str, range(count))), pixels, micro_bundle().tokenizer((WORDS * 3)[:count]))


def test_caption_loss_by_hand() -> None:
    """Two captions over a vocabulary of 4: words 1 and 2, then word 3 and padding. Logits are log 3 at the right word,
    0 elsewhere: each word costs -log(3 / 6) = log 2. The first caption costs 2 log 2 for two words, the other log 2.
    """
    words = torch.tensor([[1, 2], [3, 0]])
    logits = torch.zeros(2, 2, 4).scatter_(2, words[:, :, None], math.log(3))
    nll, count = coca.caption_nll(logits, words, pad=0)
    torch.testing.assert_close(nll, torch.tensor([2.0, 1.0]) * math.log(2))
    assert count.tolist() == [2, 1]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("lean", [False, True])
def test_equals_open_clips_loss_with_gradients(count: int, lean: bool) -> None:
    """open_clip runs the decoder over all positions; ours stops behind the longest text."""
    objective, model = make()
    pixels, batch = network_input(texts(count))
    output = objective(objective.encode(LeanModel(model) if lean else model, pixels, batch), model.logit_scale.exp())
    found = [output.loss, *torch.autograd.grad(output.loss, list(model.parameters()))]
    theirs = model(pixels, batch.tokens)
    loss = sum(CoCaLoss(2.0, 1.0, pad_id=0)(**theirs))
    expected = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_parts_and_weights() -> None:
    objective, model = make(caption_weight=0.5, contrast_weight=3.0)
    output = objective(objective.encode(model, *network_input(texts(5))), torch.tensor(10.0))
    contrast = 0.5 * (output.parts["image_to_text"] + output.parts["text_to_image"])
    torch.testing.assert_close(output.loss, 3.0 * contrast + 0.5 * output.parts["caption"])


def test_a_captioner_alone() -> None:
    objective, model = make(contrast_weight=0)
    output = objective(objective.encode(model, *network_input(texts(5))), torch.tensor(10.0))
    assert set(output.parts) == {"caption"}
    torch.testing.assert_close(output.loss, 2.0 * output.parts["caption"])


def test_texts_without_a_word_cost_nothing() -> None:
    """Not NaN, as the mean over no words would be."""
    objective, model = make()
    pixels, batch = network_input(texts(3))
    empty = Batch(batch.keys, batch.pixels, torch.zeros_like(batch.tokens).index_fill_(1, torch.tensor([0]), 1))
    output = objective(objective.encode(model, pixels, empty), torch.tensor(10.0))
    assert output.parts["caption"].item() == 0.0
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_decoders_start_from_drawn_weights() -> None:
    """open_clip leaves the decoder's output weight as the memory was; ours depends on the seed alone."""
    first, second, other = (make(seed)[1].text_decoder.text_projection for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 0.2 < float(first.detach().std()) < 0.3, "width 16: 1 / sqrt(16)"


def test_models_that_cannot_caption_are_refused() -> None:
    objective = coca.build(coca.Config(), DIMS)
    with pytest.raises(ConfigError, match=r"objective\.name='coca' needs a model with a caption decoder.*starter-coca"):
        objective.attach(instantiate(MICRO))
    sees_all = {**MICRO_COCA, "text_cfg": {**MICRO_COCA["text_cfg"], "no_causal_mask": True}}
    with pytest.raises(ConfigError, match="causal text tower"):
        objective.attach(instantiate(sees_all))
    with pytest.raises(ConfigError, match="both 0"):
        base.load({"name": "coca", "caption_weight": 0, "contrast_weight": 0})


def test_a_few_steps_learn_to_caption_and_the_bundle_serves(tmp_path: Path) -> None:
    """Seven pictures and their texts; greedy captions from the reloaded bundle are those texts."""
    tokenizer = micro_bundle().tokenizer
    config = {**MICRO_COCA}
    for part in ("text_cfg", "multimodal_cfg"):
        config[part] = {**config[part], "vocab_size": tokenizer.vocab_size}
    torch.manual_seed(0)
    model: Any = instantiate(config)
    objective = attached(coca.build(coca.Config(), DIMS), model)
    pixels, batch = network_input(texts(7))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        objective(objective.encode(LeanModel(model), pixels, batch), model.logit_scale.exp()).loss.backward()
        optimizer.step()
    bundle = Bundle("coca", model.eval(), config, micro_bundle().image, tokenizer)
    loaded: Any = load_bundle(save_bundle(bundle, tmp_path / "bundle"))
    images, words = encode_pixels(loaded, texts(7).pixels), encode_texts(loaded, WORDS)
    assert images.shape == words.shape == (7, 16)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(7))
    assert greedy(bundle.model, pixels, tokenizer).tolist() == batch.tokens.tolist()


def greedy(model: Any, pixels: Tensor, tokenizer: Any) -> Tensor:
    """The likeliest word again and again, by open_clip's own forward."""
    start, pad = int(tokenizer(["red circle"])[0, 0]), tokenizer.config.pad_id
    end = int(tokenizer(["red circle"]).amax())
    tokens = torch.full((len(pixels), 1), start)
    for _ in range(tokenizer.config.context_length - 1):
        with torch.no_grad():
            logits = model(pixels, tokens, output_labels=False)["logits"][:, -1]
        finished = (tokens[:, -1] == end) | (tokens[:, -1] == pad)
        tokens = torch.cat([tokens, logits.argmax(dim=1).masked_fill(finished, pad)[:, None]], dim=1)
    return tokens
