"""Hugging Face's CLIPModel in open_clip's words: the same arithmetic under other names."""

import re
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import ConfigError
from vlp.models.config import ModelDict

NAMES = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.": ".attn.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
"""Part of a name there -> part of the name here."""
TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
ACTIVATIONS = {"gelu": False, "quick_gelu": True}
"""hidden_act -> quick_gelu."""


def model_cfg_from_hf(config: dict[str, Any], source: str) -> ModelDict:
    """The `model_cfg` of a CLIPModel's config.json. Raises ConfigError for what open_clip cannot build."""
    vision: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, **config.get("vision_config", {})}  # fmt: skip
    text: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, **config.get("text_config", {})}  # fmt: skip
    activations = {vision["hidden_act"], text["hidden_act"]}
    if len(activations) != 1 or not activations <= ACTIVATIONS.keys():
        raise ConfigError(f"{source}: hidden_act {sorted(activations)}; open_clip has one of {', '.join(ACTIVATIONS)}")
    found: ModelDict = {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": ACTIVATIONS[activations.pop()],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "patch_size": vision["patch_size"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }
    for side, tower in (("vision_cfg", vision), ("text_cfg", text)):
        if tower["layer_norm_eps"] != 1e-5:
            found[side]["norm_kwargs"] = {"eps": tower["layer_norm_eps"]}
    return found


def state_from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIPModel's tensors under open_clip's names; q, k and v become one, projections are transposed."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.endswith("position_ids"):
            continue
        name = TRANSPOSED.get(key)
        if name:
            found[name] = value.T
            continue
        name = key
        for there, here in NAMES.items():
            name = name.replace(there, here)
        if part := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", name):
            parts.setdefault(f"{part[1]}.in_proj_{part[3]}", {})[part[2]] = value
        else:
            found[name] = value
    return found | {name: torch.cat([three[letter] for letter in "qkv"]) for name, three in parts.items()}
