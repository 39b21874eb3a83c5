"""Folders that hold a model: where the parts of a bundle, an open_clip folder or a Hugging Face CLIPModel lie."""

import json
from pathlib import Path
from typing import Any

from data_pipelines.errors import BundleError
from data_pipelines.mirror import as_url, local_copy, local_file
from data_pipelines.urls import WEB
from vlp.models.config import ModelDict

INFO, CONFIG, WEIGHTS, VOCABULARY = (
    "bundle.json",
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "tokenizer.json",
)
IMAGE_TOWER, TEXT_TOWER = "image_tower", "text_tower"
"""Sub-folders with the config.json of towers that open_clip builds through timm or transformers."""
HF_CONFIG = "config.json"
WEIGHT_FILES = (
    WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
"""In open_clip's order."""
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
"""Of files with weights."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BundleError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path}: expected a JSON object")
    return content


def find_bundle(path: Path) -> Path:
    """The bundle folder meant by `path`: the folder itself, or `bundle/` below a run; of a URL, a copy of it here."""
    if url := _on_store(path):
        found = local_copy(url) or local_copy(f"{url}/bundle")
        if found is None:
            raise BundleError(f"{url}: no bundle that was sent whole, nor a run with one; did training finish?")
        path = found
    for folder in (path, path / "bundle"):
        if (folder / INFO).is_file() or (folder / CONFIG).is_file():
            return folder
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; a bundle is a folder, for example runs/demo/bundle")
    raise BundleError(f"{path}: neither a bundle ({INFO}) nor an open_clip folder ({CONFIG}); did training finish?")


def _on_store(source: Path | str) -> str | None:
    """The URL of an object store; None for a place on this machine. Web addresses are left to the safe fetcher."""
    url = as_url(source)
    if url is not None and url.startswith(tuple(f"{scheme}://" for scheme in WEB)):
        raise BundleError(f"{url}: models are not fetched from the web: download it, and name the file or folder")
    return url


def place_of(source: Path | str) -> Path:
    """Where weights that a recipe names lie on this machine; of a URL of an object store, a copy of them here.

    There it may be a bundle or a run that was sent whole, or one file. Raises BundleError, PipelineError.
    """
    url = _on_store(source)
    if url is None:
        return Path(source)
    return local_file(url) if url.endswith(SUFFIXES) else find_bundle(Path(url))


def is_hf_clip(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face CLIPModel."""
    config = folder / HF_CONFIG
    return config.is_file() and not (folder / CONFIG).is_file() and read_json(config).get("model_type") == "clip"


def model_cfg_of(folder: Path) -> ModelDict:
    """The `model_cfg` of a bundle or an open_clip folder, its towers looked for where the folder is now."""
    config = read_json(folder / CONFIG)
    if "model_cfg" not in config:
        raise BundleError(f"{folder / CONFIG}: key 'model_cfg' is missing")
    model_cfg: ModelDict = config["model_cfg"]
    if (folder / TEXT_TOWER).is_dir():
        model_cfg["text_cfg"]["hf_model_name"] = str(folder / TEXT_TOWER)
    if (folder / IMAGE_TOWER).is_dir():
        tower = read_json(folder / IMAGE_TOWER / HF_CONFIG)
        model_cfg["vision_cfg"]["timm_model_name"] = tower["architecture"]
        model_cfg["vision_cfg"]["timm_model_args"] = tower["model_args"]
    return model_cfg


def weights_file(folder: Path) -> Path:
    """The file with the weights, as open_clip chooses it. Raises BundleError when there is none."""
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    found += sorted(path for path in folder.glob("*.safetensors") if path not in found)
    if not found:
        raise BundleError(f"{folder}: holds no weights; looked for {', '.join(WEIGHT_FILES)}")
    return found[0]
