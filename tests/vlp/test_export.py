"""Exports: other libraries load what was written and compute the same features; what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data_pipelines.errors import BundleError
from data_pipelines.preprocess import ImageConfig, load_image, normalise
from data_pipelines.testing import draw
from data_pipelines.tokens import clip_tokenizer
from vlp.bundle import Bundle
from vlp.export import export
from vlp.infer import encode_images, encode_texts
from vlp.models import ModelConfig, build_model, instantiate
from vlp.testing import MICRO, MICRO_BERT, WORDS, micro_bundle

PICTURES = [draw((50, 40), format="JPEG", seed=seed) for seed in range(3)]


def made(image: dict[str, Any] | None = None, clip_words: bool = False, **changes: Any) -> Bundle:
    """A micro bundle with other model options (`vision_cfg` and `text_cfg` are merged) and fixed random weights."""
    tokenizer = clip_tokenizer(20) if clip_words else micro_bundle().tokenizer
    merged = {key: {**MICRO[key], **changes.pop(key, {})} for key in ("vision_cfg", "text_cfg")}
    merged["text_cfg"] |= {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.config.context_length}
    config = {**MICRO, **merged, **changes}
    torch.manual_seed(0)
    model = instantiate(config).eval()
    return Bundle("micro", model, config, ImageConfig(size=16, **(image or {})), tokenizer)


def hf_features(folder: Path, bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised features of our pixels and our texts, tokenized by theirs, as a user of transformers computes them."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)  # in eval mode
    pixels = torch.stack([load_image(data, bundle.image) for data in PICTURES])
    tokens = processor(text=list(WORDS), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        image = model.get_image_features(pixel_values=normalise(pixels, bundle.image)).pooler_output
        text = model.get_text_features(**tokens).pooler_output
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quick_gelu": True},
        {"custom_text": True},
        {"clip_words": True},
        {"image": {"resize": "squash", "interpolation": "bilinear", "mean": (0.5,) * 3}},
        {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}, "patch_dropout": 0.5}},
    ],
    ids=["plain", "quick-gelu", "custom-text", "clip-vocabulary", "squash", "tanh"],
)
def test_transformers_loads_the_export_with_equal_features(options: dict[str, Any], tmp_path: Path) -> None:
    bundle = made(**options)
    result = export(bundle, "hf", tmp_path / "hf")
    assert max(result["max_abs_difference"].values()) <= 1e-5
    image, text = hf_features(tmp_path / "hf", bundle)
    torch.testing.assert_close(image, encode_images(bundle, PICTURES), rtol=0, atol=1e-5)
    torch.testing.assert_close(text, encode_texts(bundle, WORDS), rtol=0, atol=1e-5)


def test_the_pooled_token_is_the_end_even_where_a_text_is_cut(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bundle = made()
    export(bundle, "hf", tmp_path / "hf")
    texts = ["tall tree " * 30, "Tall  TREE", ""]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    )
    assert torch.equal(theirs["input_ids"], bundle.tokenizer(texts))
    assert (
        theirs["input_ids"][0, -1]
        == json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]["eos_token_id"]
    )


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_the_processor_prepares_pictures_as_we_do(resize: str, tmp_path: Path) -> None:
    """Up to two grey levels: theirs resizes with a filter of its own and rounds; a level is 0.015 here."""
    from transformers import CLIPProcessor

    bundle = made(image={"resize": resize})
    export(bundle, "hf", tmp_path / "hf")
    processor = CLIPProcessor.from_pretrained(tmp_path / "hf")
    picture = Image.new("RGB", (48, 32))
    picture.putdata([(x * 5, y * 7, (x + y) * 3) for y in range(32) for x in range(48)])
    picture.save(tmp_path / "p.png")
    theirs = processor(images=Image.open(tmp_path / "p.png"), return_tensors="pt")["pixel_values"]
    ours = normalise(load_image((tmp_path / "p.png").read_bytes(), bundle.image)[None], bundle.image)
    assert float((theirs - ours).abs().max()) <= 2.1 * 0.015


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"init_logit_bias": -10.0}, "logit bias"),
        ({"image": {"resize": "longest"}}, "resize='longest'"),
        ({"vision_cfg": {"timm_model_name": "test_resnet"}}, "TimmModel"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type"),
        ({"vision_cfg": {"no_ln_pre": True}}, "no_ln_pre"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "ls_init_value"),
        ({"vision_cfg": {"attentional_pool": True}}, "attentional_pool"),
        ({"custom_text": True, "text_cfg": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"custom_text": True, "text_cfg": {"embed_cls": True}}, "embed_cls"),
        ({"custom_text": True, "text_cfg": {"proj_bias": True}}, "proj_bias"),
        ({"custom_text": True, "text_cfg": {"pool_type": "last"}}, "pool_type"),
        ({"custom_text": True, "text_cfg": {"block_type": "custom", "scale_attn": True}}, "block_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(
    options: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError) as refused:
        export(made(**options), "hf", tmp_path / "hf")
    assert word in str(refused.value)
    assert "--format onnx" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def onnx_bundle(kind: str, tmp_path: Path) -> Bundle:
    if kind == "vit":
        return made(quick_gelu=True)
    if kind == "hf-text":
        (tmp_path / "tower").mkdir()
        (tmp_path / "tower" / "config.json").write_text(json.dumps(MICRO_BERT))
        return made(text_cfg={"hf_model_name": str(tmp_path / "tower"), "hf_proj_type": "linear"})
    tokenizer = micro_bundle().tokenizer
    torch.manual_seed(0)
    model, config = build_model(ModelConfig(name="starter-small"), 64, 12, tokenizer.vocab_size)
    return Bundle("small", model.eval(), config, ImageConfig(size=64, resize="longest"), tokenizer)


@pytest.mark.parametrize("kind", ["vit", "timm", "hf-text"])
def test_onnxruntime_computes_the_embeddings_for_any_batch(kind: str, tmp_path: Path) -> None:
    import onnxruntime
    from tokenizers import Tokenizer

    bundle = onnx_bundle(kind, tmp_path)
    result = export(bundle, "onnx", tmp_path / "onnx")
    assert max(result["max_abs_difference"].values()) <= 1e-5
    image, text = (onnxruntime.InferenceSession(tmp_path / "onnx" / name) for name in ("image.onnx", "text.onnx"))
    pixels = normalise(torch.stack([load_image(data, bundle.image) for data in PICTURES]), bundle.image)
    (image_ND,) = image.run(None, {"pixel_values": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(image_ND), encode_images(bundle, PICTURES), rtol=0, atol=1e-5)
    words = Tokenizer.from_file(str(tmp_path / "onnx" / "tokenizer.json"))
    words.enable_padding(pad_id=bundle.tokenizer.config.pad_id, length=bundle.tokenizer.config.context_length)
    tokens = torch.tensor([item.ids for item in words.encode_batch(list(WORDS))])
    (text_ND,) = text.run(None, {"input_ids": tokens.numpy()})
    torch.testing.assert_close(torch.from_numpy(text_ND), encode_texts(bundle, WORDS), rtol=0, atol=1e-5)
    own = json.loads((tmp_path / "onnx" / "preprocess.json").read_text())
    assert own["image"] == bundle.image.model_dump(mode="json")
