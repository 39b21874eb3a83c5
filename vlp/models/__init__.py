"""build_model: any open_clip config name, our own JSON sizes, any timm image tower and any Hugging Face text tower.

The model classes are open_clip's, so that every trained model can be handed to open_clip users as it is.
"""

import json
import tempfile
from copy import deepcopy
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from data_pipelines.errors import ConfigError
from data_pipelines.towers import PACKAGES as TOWERS
from data_pipelines.towers import tower_folder
from vlp.models.config import ModelConfig as ModelConfig
from vlp.models.config import ModelDict as ModelDict
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()

import timm  # noqa: E402  (imports torchvision, as the next ones)
from open_clip import get_model_config, list_models  # noqa: E402
from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402

from vlp.models import locking  # noqa: E402
from vlp.models.folders import place_of  # noqa: E402
from vlp.models.towers import load_image_tower, load_text_tower  # noqa: E402
from vlp.models.weights import config_of_folder, load_model  # noqa: E402

LOCAL = "local-dir:"


def own_configs() -> list[str]:
    """Names of our JSON sizes."""
    folder = resources.files("vlp.models").joinpath("configs")
    return sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))


def resolve_config(config: ModelConfig) -> ModelDict:
    """The complete open_clip `model_cfg` that `config` names."""
    if config.config is not None:
        found = deepcopy(config.config)
    elif config.name.startswith(LOCAL):
        found = config_of_folder(place_of(config.name.removeprefix(LOCAL)))
    elif config.name in own_configs():
        text = (
            resources.files("vlp.models")
            .joinpath("configs")
            .joinpath(f"{config.name}.json")
            .read_text(encoding="utf-8")
        )
        found = json.loads(text)
    else:
        found = get_model_config(config.name) or {}
    if not found:
        close = [name for name in list_models() if name.lower().startswith(config.name.lower()[:4])]
        raise ConfigError(
            f"model.name: {config.name!r} is unknown; ours: {', '.join(own_configs())}; "
            f"open_clip's, starting alike: {', '.join(close) or 'none'} (all: open_clip.list_models())"
        )
    if config.text_tower is not None:
        if "hf_model_name" not in found["text_cfg"]:
            raise ConfigError(
                f"model.text_tower={config.text_tower!r} has no effect: the config has no Hugging Face text tower "
                "(text_cfg.hf_model_name)"
            )
        found["text_cfg"]["hf_model_name"] = config.text_tower
    if config.init_logit_scale is not None:
        found["init_logit_scale"] = config.init_logit_scale
    if config.patch_dropout is not None:
        if isinstance(found["vision_cfg"].get("layers"), list):
            raise ConfigError(
                f"model.patch_dropout={config.patch_dropout}: the image tower is a ResNet, without patches"
            )
        found["vision_cfg"]["patch_dropout"] = config.patch_dropout
    return found


def instantiate(model_cfg: ModelDict) -> nn.Module:
    """The open_clip model of a `model_cfg`, with fresh weights and no download.

    `vision_cfg.timm_model_args` (ours) changes arguments of a timm model, `vision_cfg.channels` (ours) the bands that
    open_clip's own towers take; `text_cfg.hf_model_name` is a pinned tower or a local folder with a config.json.
    """
    kwargs = deepcopy(model_cfg)
    text, vision = kwargs["text_cfg"], kwargs["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
        text["hf_model_name"] = str(hf_folder(text["hf_model_name"]))
    custom_text = kwargs.pop("custom_text", False) or "hf_model_name" in text
    model_class = CoCa if "multimodal_cfg" in kwargs else CustomTextCLIP if custom_text else CLIP
    arguments, channels = vision.pop("timm_model_args", None), vision.pop("channels", 3)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments is not None:
            write_timm_config(Path(scratch), vision["timm_model_name"], arguments)
            vision["timm_model_name"] = f"local-dir:{scratch}"
        model: nn.Module = model_class(**kwargs)
    if isinstance(
        model, CoCa
    ):  # open_clip leaves this weight as it finds the memory; its own init_parameters never runs
        nn.init.normal_(model.text_decoder.text_projection, std=model.text_decoder.width**-0.5)
    if channels != 3:
        _replace_stem(model.get_submodule("visual"), channels)
    return model


def _replace_stem(tower: nn.Module, channels: int) -> None:
    """A fresh first layer for other channels, for open_clip's own image towers."""
    rgb = tower.get_submodule("conv1")
    assert isinstance(rgb, nn.Conv2d)
    assert rgb.bias is None
    fresh = nn.Conv2d(channels, rgb.out_channels, (rgb.kernel_size[0], rgb.kernel_size[1]), bias=False)
    fresh.stride, fresh.padding = rgb.stride, rgb.padding
    tower.register_module("conv1", fresh)


def write_timm_config(folder: Path, architecture: str, arguments: ModelDict) -> None:
    """The config.json from which timm builds `local-dir:folder`."""
    default = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    known = {"pool_size": default.pool_size} if default is not None and default.pool_size else {}
    content = {"architecture": architecture, "model_args": arguments, "pretrained_cfg": known}
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def hf_folder(name: str) -> Path:
    """Local folder of a Hugging Face text model: a pinned tower's name or a path. Nothing is fetched from a hub."""
    if name in TOWERS:
        return tower_folder(name)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"text tower {name!r}: give a pinned tower ({', '.join(TOWERS)}) or a local folder with config.json; "
            "model.text_tower=PATH takes the place of a name on the hub"
        )
    return folder


def build_model(
    config: ModelConfig, image_size: int, context_length: int, vocab_size: int, channels: int = 3
) -> tuple[nn.Module, ModelDict]:
    """(model, its complete model_cfg): built for these inputs, weights loaded, locked as at the start of a run."""
    model_cfg = resolve_config(config)
    _fit_inputs(model_cfg["vision_cfg"], image_size, channels)
    text_cfg = model_cfg["text_cfg"]
    text_cfg["context_length"] = context_length
    if "multimodal_cfg" in model_cfg:
        model_cfg["multimodal_cfg"]["context_length"] = context_length
    if "hf_model_name" not in text_cfg:
        text_cfg["vocab_size"] = vocab_size
    model = instantiate(model_cfg)
    if "hf_model_name" in text_cfg:
        _check_words(model, text_cfg["hf_model_name"], vocab_size)
    if config.weights:
        load_model(model, model_cfg, config.weights, config.stem)
    if config.image_weights:
        load_image_tower(model, config.image_weights, config.stem)
    if config.text_weights:
        load_text_tower(model, config.text_weights)
    locking.apply(model, config, 0.0)
    return model, model_cfg


def _check_words(model: nn.Module, name: str, vocab_size: int) -> None:
    words = int(model.get_submodule("text.transformer").get_input_embeddings().num_embeddings)  # type: ignore[operator]
    if vocab_size > words:
        raise ConfigError(
            f"the tokenizer has {vocab_size} words, the text tower {name!r} knows {words}: set tokenizer.kind=hf for "
            f"the tower's own, or tokenizer.vocab_size to at most {words}"
        )


def _fit_inputs(vision_cfg: ModelDict, image_size: int, channels: int) -> None:
    """Write size and channels into the config, for a timm tower as arguments that open_clip passes on to timm."""
    vision_cfg["image_size"] = image_size
    vision_cfg.pop("channels", None)
    if "timm_model_name" not in vision_cfg:
        if channels != 3:
            vision_cfg["channels"] = channels
        return
    arguments: ModelDict = vision_cfg.pop("timm_model_args", {})
    wanted: ModelDict = {"in_chans": channels} if channels != 3 or "in_chans" in arguments else {}
    if "img_size" in arguments or _fixed_size(vision_cfg["timm_model_name"]) not in (None, image_size):
        wanted["img_size"] = image_size
    if arguments or wanted:
        vision_cfg["timm_model_args"] = arguments | wanted


def _fixed_size(architecture: str) -> int | None:
    """Picture side that a timm model is built for, None when it takes any."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        trunk = timm.create_model(architecture, pretrained=False)
        size: tuple[int, ...] = trunk.default_cfg["input_size"]  # type: ignore[index, assignment]
    return size[-1] if hasattr(trunk, "set_input_size") else None


def trunk_of(tower: nn.Module) -> nn.Module | None:
    """The part below the projection of a timm or Hugging Face tower; None for open_clip's own towers."""
    trunk = getattr(tower, "trunk", None)
    if trunk is None and hasattr(tower, "pooler"):
        trunk = getattr(tower, "transformer", None)
    return trunk
