"""build_model: any open_clip config name, our own JSON sizes, any timm image tower and any Hugging Face text tower.

The model classes are open_clip's, so that every trained model can be handed to open_clip users as it is.
"""

import json
import tempfile
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from data_pipelines.towers import PACKAGES as TOWERS
from data_pipelines.towers import tower_folder
from vlp.models.towers import load_image_tower, load_text_tower
from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()

from open_clip import get_model_config, list_models  # noqa: E402  (imports torchvision)
from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402

ModelDict = dict[str, Any]
"""An open_clip `model_cfg`: embed_dim, vision_cfg, text_cfg and a few switches."""


class ModelConfig(StrictModel):
    """Which towers, and which weights they start from."""

    name: str = "starter-small"
    """A config of ours (`vlp/models/configs`), or any open_clip config name."""
    config: ModelDict | None = None
    """An open_clip `model_cfg` written out in the recipe; replaces `name`. timm and Hugging Face towers go here."""
    init_logit_scale: float | None = None
    """Logarithm of the first logit scale; default as in the config, else ln(1/0.07)."""
    image_weights: str | None = None
    """Weights of the image tower: a pinned tower (`efficientnet-lite0`) or a local safetensors file."""
    text_weights: str | None = None
    """Weights of the text tower: a pinned tower (`minilm-l6-v2`) or a local Hugging Face folder."""
    lock_image: bool = False
    """Freeze the image trunk and train its projection only."""
    lock_text: bool = False
    """Freeze the text trunk and train its projection only."""


def own_configs() -> list[str]:
    """Names of our JSON sizes."""
    folder = resources.files("vlp.models").joinpath("configs")
    return sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))


def resolve_config(config: ModelConfig) -> ModelDict:
    """The complete open_clip `model_cfg` that `config` names."""
    if config.config is not None:
        found = deepcopy(config.config)
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
    if config.init_logit_scale is not None:
        found["init_logit_scale"] = config.init_logit_scale
    return found


def instantiate(model_cfg: ModelDict) -> nn.Module:
    """The open_clip model of a `model_cfg`, with fresh weights and no download.

    `vision_cfg.timm_model_args` (ours) changes arguments of a timm model, its channels say; `text_cfg.hf_model_name` is
    a pinned tower or a local folder with a config.json.
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
    arguments = vision.pop("timm_model_args", None)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments is not None:
            write_timm_config(Path(scratch), vision["timm_model_name"], arguments)
            vision["timm_model_name"] = f"local-dir:{scratch}"
        model: nn.Module = model_class(**kwargs)
    return model


def write_timm_config(folder: Path, architecture: str, arguments: ModelDict) -> None:
    """The config.json from which timm builds `local-dir:folder`."""
    content = {"architecture": architecture, "model_args": arguments, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def hf_folder(name: str) -> Path:
    """Local folder of a Hugging Face text model: a pinned tower's name or a path. Nothing is fetched from a hub."""
    if name in TOWERS:
        return tower_folder(name)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"text tower {name!r}: give a pinned tower ({', '.join(TOWERS)}) or a local folder with config.json"
        )
    return folder


def build_model(
    config: ModelConfig, image_size: int, context_length: int, vocab_size: int
) -> tuple[nn.Module, ModelDict]:
    """(model, its complete model_cfg): built for these inputs, weights loaded, trunks frozen as asked."""
    model_cfg = resolve_config(config)
    model_cfg["vision_cfg"]["image_size"] = image_size
    model_cfg["text_cfg"]["context_length"] = context_length
    if "hf_model_name" not in model_cfg["text_cfg"]:
        model_cfg["text_cfg"]["vocab_size"] = vocab_size
    model = instantiate(model_cfg)
    if config.image_weights:
        load_image_tower(model, config.image_weights)
    if config.text_weights:
        load_text_tower(model, config.text_weights)
    if config.lock_image:
        _lock(model, "visual", "image")
    if config.lock_text:
        _lock(model, "text", "text")
    return model, model_cfg


def _lock(model: nn.Module, attribute: str, option: str) -> None:
    tower = getattr(model, attribute, None)
    trunk = trunk_of(tower) if tower is not None else None
    if trunk is None:
        raise ConfigError(
            f"model.lock_{option}: only timm image towers and Hugging Face text towers have a separate trunk"
        )
    trunk.requires_grad_(False)


def trunk_of(tower: nn.Module) -> nn.Module | None:
    """The part below the projection of a timm or Hugging Face tower; None for open_clip's own towers."""
    trunk = getattr(tower, "trunk", None)
    if trunk is None and hasattr(tower, "pooler"):
        trunk = getattr(tower, "transformer", None)
    return trunk
