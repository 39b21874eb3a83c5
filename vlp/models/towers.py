"""Pretrained weights of single towers, from pinned packages or local files. Never from a hub, never pickled modules."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipelines.errors import ConfigError
from data_pipelines.towers import PACKAGES as TOWERS
from data_pipelines.towers import tower_folder


def load_image_tower(model: nn.Module, source: str) -> None:
    """Load the trunk of a timm image tower; every tensor must find its place with an equal shape."""
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if not isinstance(trunk, nn.Module):
        raise ConfigError(f"model.image_weights={source!r} needs a timm image tower (vision_cfg.timm_model_name)")
    weights = _image_weights(source)
    own = trunk.state_dict()
    classifier = [key for key in weights if weights[key].shape[:1] == (1000,)]
    weights = {key: value for key, value in weights.items() if key not in classifier}
    if set(weights) != set(own):
        weights = _in_order(weights, own, source)
    trunk.load_state_dict(weights, strict=True)


def _image_weights(source: str) -> dict[str, Tensor]:
    if source in TOWERS:
        (path,) = tower_folder(source).glob("*.pth")
        weights = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(weights, dict)  # pinned by digest
        return weights
    path = Path(source)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ConfigError(
            f"model.image_weights={source!r}: give a pinned tower ({', '.join(TOWERS)}) or a .safetensors file"
        )
    return load_file(path)


def _in_order(weights: dict[str, Tensor], own: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Names differ between libraries: assign in key order, which is safe only if count and every shape agree."""
    pairs = list(zip(own.items(), weights.values(), strict=False))
    if len(own) != len(weights) or any(target.shape != value.shape for (_, target), value in pairs):
        raise ConfigError(f"model.image_weights={source!r}: {len(weights)} tensors do not fit the tower's {len(own)}")
    return {key: value for (key, _), value in pairs}


def load_text_tower(model: nn.Module, source: str) -> None:
    """Load the transformer of a Hugging Face text tower from a folder with model.safetensors."""
    transformer = getattr(getattr(model, "text", None), "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise ConfigError(f"model.text_weights={source!r} needs a Hugging Face text tower (text_cfg.hf_model_name)")
    folder = tower_folder(source) if source in TOWERS else Path(source)
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(f"model.text_weights={source!r}: no model.safetensors in {folder}")
    weights = load_file(folder / "model.safetensors")
    own = transformer.state_dict()
    missing = sorted(set(own) - set(weights))
    if missing:
        raise ConfigError(f"model.text_weights={source!r} lacks {len(missing)} tensors of the tower, e.g. {missing[0]}")
    transformer.load_state_dict({key: weights[key] for key in own}, strict=True)
