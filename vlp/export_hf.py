"""A folder that transformers loads: CLIPModel, CLIPProcessor and the tokenizer, with the features of the bundle.

CLIPModel is one fixed architecture: a plain ViT with class token, a causal text transformer pooled at the end token,
both projected without bias. `obstacles` says what of a model does not fit; the rest is renaming of weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.errors import BundleError
from data_pipelines.preprocess import normalise
from data_pipelines.tokens import END, START
from vlp.bundle import Bundle, write_tokenizer
from vlp.infer import encode_pixels, encode_tokens
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()

from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer  # noqa: E402

LIBRARY = "transformers"
TOLERANCE = 1e-5
"""Highest difference of a normalised feature."""
USE = """from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained("{folder}")
processor = CLIPProcessor.from_pretrained("{folder}")"""
PROBES = ("a photo of a cat", "Red CIRCLE, two  blue squares!", "größer than 3.14", "")
RESAMPLE = {"bilinear": 2, "bicubic": 3}
RENAMED = (
    (r"^text\.", ""),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # so it is spelt there
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
"""open_clip's names to CLIPModel's, applied one after the other."""


def write(bundle: Bundle, folder: Path, final: Path) -> dict[str, Any]:
    """Model, tokenizer and processor files; loaded again and compared. Raises BundleError."""
    from transformers import CLIPConfig, CLIPModel

    found = obstacles(bundle)
    if found:
        raise BundleError(
            f"--format hf: transformers' CLIPModel cannot express this model: {'; '.join(found)}. "
            "--format open_clip and --format onnx take every model"
        )
    model = CLIPModel(CLIPConfig(**config(bundle)))
    model.load_state_dict(converted(bundle.model.state_dict()), strict=True)
    model.save_pretrained(folder)
    write_inputs(bundle, folder)
    differences = _check(bundle, folder)
    if max(differences.values()) > TOLERANCE:
        raise BundleError(f"--format hf: features of the export differ by {differences}, at most {TOLERANCE} is right")
    return {"use": USE.format(folder=final), "max_abs_difference": differences}


def obstacles(bundle: Bundle) -> list[str]:
    """What keeps a model from being a CLIPModel, in the words of its config; empty if nothing does."""
    model: Any = bundle.model
    if type(model) not in (CLIP, CustomTextCLIP):
        return [f"it is a {type(model).__name__}"]
    visual, text = model.visual, getattr(model, "text", model)
    found = []
    if model.logit_bias is not None:
        found.append("it has a logit bias (SigLIP)")
    if bundle.image.resize == "longest":
        found.append("its pictures are padded around the centre (image.resize='longest'), which no CLIPProcessor does")
    if type(visual) is not VisionTransformer:
        found.append(f"its image tower is a {type(visual).__name__}, not a plain ViT")
    elif visual.attn_pool is not None or visual.pool_type != "tok":
        found.append("its image tower does not pool at the class token (vision_cfg.pool_type, attentional_pool)")
    elif isinstance(visual.ln_pre, nn.Identity):
        found.append("its image tower has no norm before the blocks (vision_cfg.no_ln_pre)")
    if text is not model and type(text) is not TextTransformer:
        found.append(f"its text tower is a {type(text).__name__}, not open_clip's text transformer")
    else:
        found += _text_obstacles(bundle, text)
    for name, tower in (("image", visual), ("text", text)):
        found += _block_obstacles(name, tower) if isinstance(tower, VisionTransformer | TextTransformer | CLIP) else []
    return found


def _text_obstacles(bundle: Bundle, text: Any) -> list[str]:
    found = []
    if text.attn_mask is None or getattr(text, "cls_emb", None) is not None:
        found.append("its text tower is not causal, or has a class token (text_cfg.no_causal_mask, embed_cls)")
    if getattr(text, "pool_type", getattr(text, "text_pool_type", "")) != "argmax":
        found.append("its text is not pooled at the highest token id (text_cfg.pool_type)")
    if not isinstance(text.text_projection, nn.Parameter):
        found.append("its text projection is missing or has a bias (text_cfg.proj_type, proj_bias)")
    if token_ids(bundle).get(END) != bundle.tokenizer.vocab_size - 1:
        found.append(f"the end token {END} is not the highest id of its vocabulary")
    return found


def _block_obstacles(name: str, tower: Any) -> list[str]:
    blocks = tower.transformer.resblocks
    if any(type(block) is not ResidualAttentionBlock for block in blocks):
        return [f"the blocks of its {name} tower are not plain ones ({name}_cfg.block_type, qk_norm, scale_*)"]
    if any(not isinstance(block.ls_1, nn.Identity) for block in blocks):
        return [f"its {name} tower scales its layers (ls_init_value)"]
    return [] if _activation(tower) else [f"its {name} tower has the activation {blocks[0].mlp.gelu}"]


def _activation(tower: Any) -> str:
    """transformers' name of it, empty if there is none. The wrong one loads as well, and gives wrong vectors."""
    layer = tower.transformer.resblocks[0].mlp.gelu
    if isinstance(layer, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[layer.approximate]
    return "quick_gelu" if isinstance(layer, QuickGELU) else ""


def token_ids(bundle: Bundle) -> dict[str, int]:
    """Entry -> id of the added tokens and the vocabulary."""
    parts = json.loads(bundle.tokenizer.vocabulary)
    return {**parts["model"]["vocab"], **{item["content"]: item["id"] for item in parts["added_tokens"]}}


def config(bundle: Bundle) -> dict[str, Any]:
    """Arguments of a CLIPConfig."""
    model: Any = bundle.model
    visual, text, ids = model.visual, getattr(model, "text", model), token_ids(bundle)
    return {
        "projection_dim": bundle.dim,
        "logit_scale_init_value": float(model.logit_scale.detach()),
        "text_config": {
            **_tower_config(text, bundle.dim, text.ln_final),
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": text.positional_embedding.shape[0],
            "bos_token_id": ids[START],
            "eos_token_id": ids[END],
            "pad_token_id": bundle.tokenizer.config.pad_id,
        },
        "vision_config": {
            **_tower_config(visual, bundle.dim, visual.ln_post),
            "image_size": bundle.image.size,
            "patch_size": visual.patch_size[0],
            "num_channels": visual.conv1.in_channels,
        },
    }


def _tower_config(tower: Any, dim: int, norm: nn.LayerNorm) -> dict[str, Any]:
    blocks = tower.transformer.resblocks
    return {
        "hidden_size": tower.transformer.width,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "hidden_act": _activation(tower),
        "layer_norm_eps": norm.eps,
        "projection_dim": dim,
    }


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under CLIPModel's names: projections transposed, query, key and value apart."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            found[name] = value.T if name.endswith("_projection.weight") else value
    return {name: value.detach().cpu().float().contiguous() for name, value in found.items()}


def write_inputs(bundle: Bundle, folder: Path) -> None:
    """Tokenizer files, `preprocessor_config.json` where one can say it, and our own account in `preprocess.json`.

    Not said there: transparent pictures stand on `image.ground` with us; transformers drops the alpha channel.
    """
    write_tokenizer(bundle.tokenizer, folder)
    own = {"image": bundle.image.model_dump(mode="json"), "tokenizer": bundle.tokenizer.config.model_dump(mode="json")}
    (folder / "preprocess.json").write_text(json.dumps(own, indent=2), encoding="utf-8")
    if bundle.image.resize == "longest":
        return
    side = bundle.image.size
    square = {"height": side, "width": side}
    picture = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side} if bundle.image.resize == "shortest" else square,
        "resample": RESAMPLE[bundle.image.interpolation],
        "do_center_crop": bundle.image.resize == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(bundle.image.mean),
        "image_std": list(bundle.image.std),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(picture, indent=2), encoding="utf-8")


@torch.inference_mode()
def _check(bundle: Bundle, folder: Path) -> dict[str, float]:
    """Highest difference of normalised features over random pictures and the probes, tokenized by transformers."""
    from transformers import AutoTokenizer, CLIPModel

    model: Any = CLIPModel.from_pretrained(folder)  # in eval mode
    length = bundle.tokenizer.config.context_length
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(PROBES), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ours_NL = bundle.tokenizer(PROBES)
    upto = ours_NL.argmax(dim=1, keepdim=True) >= torch.arange(ours_NL.shape[1])  # behind the end anything may stand
    if not torch.equal(tokens["input_ids"][upto], ours_NL[upto]):
        raise BundleError("--format hf: transformers reads the written tokenizer.json in another way")
    side = bundle.image.size
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = model.get_image_features(pixel_values=normalise(pixels, bundle.image)).pooler_output
    text = model.get_text_features(**tokens).pooler_output
    pairs = {
        "image": (image, encode_pixels(bundle, pixels)),
        "text": (text, encode_tokens(bundle, ours_NL)),
    }
    return {
        name: float((nn.functional.normalize(theirs, dim=-1) - ours).abs().max())
        for name, (theirs, ours) in pairs.items()
    }
