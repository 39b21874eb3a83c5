"""Weights from local files into a model: read, renamed, fitted to size, length and channels, checked one by one.

Never from a hub, never unpickled.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    CLIPTextCfg,
    CLIPVisionCfg,
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch._weights_only_unpickler import UnpicklingError  # type: ignore[attr-defined]

from data_pipelines.errors import BundleError, ConfigError
from data_pipelines.files import sha256_file
from vlp.models.config import ModelDict, Stem
from vlp.models.folders import (
    HF_CONFIG,
    INFO,
    WEIGHTS,
    find_bundle,
    is_hf_clip,
    model_cfg_of,
    place_of,
    read_json,
    weights_file,
)
from vlp.models.hf_clip import model_cfg_from_hf, state_from_hf

log = logging.getLogger(__name__)

State = dict[str, Tensor]
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of DDP and torch.compile."""
VISION = ("head_width", "pool_type", "no_ln_pre", "final_ln_after_pool", "norm_kwargs", "act_kwargs", "timm_pool")
TEXT = ("heads", "pool_type", "no_causal_mask", "norm_kwargs", "act_kwargs", "hf_pooler_type")
"""Settings that change what a tower computes but no tensor's shape."""
SHOWN = 4
"""Tensors that an error names."""


def read_weights(source: str, option: str) -> State:
    """Tensors of a checkpoint file or model folder, whole-model ones under open_clip's names.

    `option` names the setting in errors. Raises ConfigError when nothing is there, BundleError when it is damaged.
    """
    path = place_of(source)
    if path.is_dir():
        hf = is_hf_clip(path)
        folder = path if hf or (path / HF_CONFIG).is_file() else find_bundle(path)
        state = read_file(weights_file(folder))
        return state_from_hf(state) if hf else state
    if not path.is_file():
        raise ConfigError(f"{option}={source!r}: no such file or folder, and nothing is fetched from a hub")
    return read_file(path)


def read_file(path: Path) -> State:
    """Tensors of one file; the model of an open_clip training checkpoint, without the wrappers' prefixes."""
    info = path.parent / INFO
    if path.name == WEIGHTS and info.is_file() and sha256_file(path) != read_json(info).get("weights_sha256"):
        raise BundleError(f"{path}: sha256 differs from the one in {INFO}; it is damaged or was exchanged")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(
            f"{path}: cannot be read as plain tensors ({reason}); a TorchScript archive or a pickled model has to be "
            "saved again as .safetensors"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BundleError(f"{path}: holds no plain dictionary of tensors, nor one under `state_dict`")
    for wrapper in WRAPPERS:
        if state and all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return dict(state)


def load_model(model: nn.Module, model_cfg: ModelDict, source: str, stem: Stem | None) -> None:
    """Load the weights of a whole model. Raises ConfigError naming what does not fit and what to set."""
    where = f"model.weights={source!r}"
    if (place := place_of(source)).is_dir():
        _check_arithmetic(model_cfg, config_of_folder(place), where)
    state = rename(model, read_weights(str(place), "model.weights"))
    load(model, state, model.state_dict().keys(), where, stem)


def config_of_folder(folder: Path) -> ModelDict:
    """The `model_cfg` of a bundle, a run, an open_clip folder or a Hugging Face CLIPModel folder."""
    if is_hf_clip(folder):
        return model_cfg_from_hf(read_json(folder / HF_CONFIG), str(folder))
    return model_cfg_of(find_bundle(folder).absolute())


def _check_arithmetic(model_cfg: ModelDict, theirs: ModelDict, where: str) -> None:
    """Raise ConfigError where equal shapes would hide that the weights belong to another computation."""

    def settings(config: ModelDict) -> dict[str, Any]:
        vision = {key: value for key, value in config["vision_cfg"].items() if key in VISION}
        text = {key: value for key, value in config["text_cfg"].items() if key in TEXT}
        whole = {f"vision_cfg.{key}": getattr(CLIPVisionCfg(**vision), key) for key in VISION}
        whole |= {f"text_cfg.{key}": getattr(CLIPTextCfg(**text), key) for key in TEXT}
        return whole | {"quick_gelu": config.get("quick_gelu", False)}

    ours, known = settings(model_cfg), settings(theirs)
    if different := [f"{key} {known[key]}, the model has {ours[key]}" for key in ours if known[key] != ours[key]]:
        raise ConfigError(
            f"{where} was trained with {'; '.join(different)}: its vectors would be wrong; take its own config with "
            "model.name=local-dir:PATH"
        )


def rename(model: nn.Module, state: State) -> State:
    """Whole-model tensors under the names of this model class: with or without `text.` and a logit bias."""
    state = convert_state_dict(model, dict(state))
    inside = any(key.startswith("text.") for key in model.state_dict())
    if inside and "positional_embedding" in state:
        state = convert_to_custom_text_state_dict(state)
    elif not inside:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    own = model.state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("position_ids") or key in own}
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own:
            state[name] = state[name].reshape(own[name].shape)
    if "logit_bias" in own and "logit_scale" in state:
        state.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))  # as open_clip does
    elif state.pop("logit_bias", None) is not None:
        log.warning("the weights have a logit_bias, which this model has no place for; its features do not need it")
    return state


def load(model: nn.Module, state: State, wanted: Iterable[str], where: str, stem: Stem | None) -> None:
    """Load `state` into the tensors `wanted` of a model; every one must be there, with an equal shape once fitted."""
    complete = model.state_dict()
    own = {key: complete[key] for key in wanted}
    state = dict(state)
    _fit_positions(model, own, state)
    _fit_stem(own, state, where, stem)
    _check_vocabulary(own, state, where)
    shapes = [
        f"{key} {tuple(state[key].shape)}, the model has {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    missing, unexpected = (sorted(set(left) - set(right)) for left, right in ((own, state), (state, own)))
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ConfigError(
            f"{where} does not fit the model: of {len(own)} tensors {'; '.join(problems)}. Set model.name or "
            "model.config to the model these weights belong to (for a folder model.name=local-dir:PATH), or load "
            "single towers with model.image_weights and model.text_weights"
        )
    model.load_state_dict(state, strict=False)


def _fit_positions(model: nn.Module, own: State, state: State) -> None:
    """Positions of another picture size are interpolated; those of shorter texts cut, of longer ones interpolated."""
    if "visual.positional_embedding" in own:
        resize_pos_embed(state, model)
    for key, prefix in (("visual.attnpool.positional_embedding", 1), ("visual.trunk.pos_embed", 0)):
        if key in own and key in state and state[key].shape != own[key].shape and own[key].ndim < 4:
            value, target = (tensor if tensor.ndim == 3 else tensor[None] for tensor in (state[key], own[key]))
            if key.startswith("visual.trunk"):
                trunk = model.get_submodule("visual.trunk")
                prefix = 0 if getattr(trunk, "no_embed_class", False) else getattr(trunk, "num_prefix_tokens", 0)
            side = round((target.shape[1] - prefix) ** 0.5)
            fitted: Tensor = resample_abs_pos_embed(value, [side, side], num_prefix_tokens=prefix)
            state[key] = fitted.reshape(own[key].shape) if fitted.shape == target.shape else state[key]
    for key in ("positional_embedding", "text.positional_embedding"):
        if key not in own or key not in state or state[key].shape[1:] != own[key].shape[1:]:
            continue
        length, last = len(own[key]), "text.cls_emb" in own  # the class token has the last place
        if length < len(state[key]):
            kept = state[key][: length - last]
            state[key] = torch.cat([kept, state[key][-1:]]) if last else kept
        else:
            resize_text_pos_embed(state, model)


def _fit_stem(own: State, state: State, where: str, stem: Stem | None) -> None:
    """Kernels of RGB weights made to take the model's channels; see ModelConfig.stem."""

    def rgb(theirs: Tensor, ours: Tensor) -> bool:
        return (
            ours.ndim == 4
            and theirs.ndim == 4
            and theirs.shape[1] == 3 != ours.shape[1]
            and theirs.shape[:1] + theirs.shape[2:] == ours.shape[:1] + ours.shape[2:]
        )

    found = [key for key in own if key in state and rgb(state[key], own[key])]
    if found and stem is None:
        raise ConfigError(
            f"{where}: {found[0]} takes RGB, data.image.channels is {own[found[0]].shape[1]}: set model.stem to mean, "
            "repeat or random"
        )
    if stem is not None and not found:
        raise ConfigError(f"model.stem={stem!r} has no effect: {where} takes as many channels as data.image.channels")
    for key in found:
        channels = own[key].shape[1]
        if stem == "random":
            state[key] = own[key].clone()
        else:
            bands = [band % 3 for band in range(channels)]
            kernel = state[key].mean(1, keepdim=True).expand_as(own[key]) if stem == "mean" else state[key][:, bands]
            state[key] = kernel * (3 / channels)


def _check_vocabulary(own: State, state: State, where: str) -> None:
    for key in ("token_embedding.weight", "text.token_embedding.weight"):
        if key in own and key in state and len(state[key]) != len(own[key]):
            raise ConfigError(
                f"{where} knows {len(state[key]):,} tokens, the recipe's tokenizer {len(own[key]):,}: set "
                "tokenizer.kind=clip for weights with CLIP's vocabulary (49,408), tokenizer.kind=weights for a bundle"
            )
