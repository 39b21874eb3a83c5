"""Bundle: the one form in which a model is saved, loaded, evaluated, served and handed over.

A bundle is a folder that open_clip can load as `local-dir:` (open_clip_config.json, open_clip_model.safetensors,
tokenizer files), plus bundle.json: format number, exact preprocessing, tokenizer numbers and provenance. A folder
without bundle.json, exported by open_clip, is accepted as well. Nothing in it is ever unpickled.
"""

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import BundleError, ConfigError
from data_pipelines.files import fsync_dir, sha256_file
from data_pipelines.preprocess import ImageConfig
from data_pipelines.tokens import END, START, Tokenizer, TokenizerConfig, clip_tokenizer
from vlp.models import ModelDict, hf_folder, instantiate, write_timm_config
from vlp.models.folders import CONFIG as CONFIG
from vlp.models.folders import IMAGE_TOWER, TEXT_TOWER, is_hf_clip, model_cfg_of, place_of, read_json
from vlp.models.folders import INFO as INFO
from vlp.models.folders import VOCABULARY as VOCABULARY
from vlp.models.folders import WEIGHTS as WEIGHTS
from vlp.models.folders import find_bundle as find_bundle

log = logging.getLogger(__name__)

FORMAT = 1


class Provenance(StrictModel):
    """Where a model comes from; empty where it is not known."""

    created: str = ""
    """UTC, ISO 8601."""
    vlp_version: str = ""
    revision: str = ""
    """Source revision of the training code."""
    recipe: dict[str, Any] = {}
    """The resolved recipe."""
    data: dict[str, str] = {}
    """Shard folder -> sha256 of its manifest."""
    steps: int = 0
    samples: int = 0


class BundleInfo(StrictModel):
    """Content of bundle.json."""

    format: int = FORMAT
    name: str
    image: ImageConfig
    tokenizer: TokenizerConfig
    weights_sha256: str
    provenance: Provenance = Provenance()


class Part(Protocol):
    """What an objective learned beside the towers: a module that writes itself into the folder of a bundle."""

    def save(self, folder: Path) -> None:
        """Write files of its own, under names that no other part of a bundle has."""


@dataclass(slots=True)
class Bundle:
    """A model ready for use: `model` is open_clip's, in eval mode, on one device."""

    name: str
    model: nn.Module
    model_cfg: ModelDict
    image: ImageConfig
    tokenizer: Tokenizer
    provenance: Provenance = field(default_factory=Provenance)
    folder: Path | None = None
    """Where it was loaded from; None for one made in memory."""
    parts: dict[str, Any] = field(default_factory=dict)
    """Parts in memory, by name; those that lie in the folder are loaded by who needs them."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dim(self) -> int:
        """Width of the shared embedding."""
        return int(self.model_cfg["embed_dim"])


def save_bundle(bundle: Bundle, folder: Path) -> Path:
    """Write a bundle, its parts in memory included, whole or not at all; one that exists at `folder` is replaced."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        temp = Path(scratch) / "bundle"
        temp.mkdir()
        write_open_clip(bundle, temp, folder)
        info = BundleInfo(
            name=bundle.name,
            image=bundle.image,
            tokenizer=bundle.tokenizer.config,
            weights_sha256=sha256_file(temp / WEIGHTS),
            provenance=bundle.provenance,
        )
        (temp / INFO).write_text(info.model_dump_json(indent=2), encoding="utf-8")
        for part in bundle.parts.values():
            part.save(temp)
        if folder.exists():
            if not (folder / INFO).exists() and any(folder.iterdir()):
                raise BundleError(f"{folder} exists and is not a bundle: choose another folder")
            folder.rename(Path(scratch) / "old")
        temp.rename(folder)
    fsync_dir(folder.parent)
    return folder


def write_open_clip(bundle: Bundle, folder: Path, final: Path) -> None:
    """Config, weights and tokenizer files as open_clip reads them; `final` is where the folder will live."""
    model_cfg = json.loads(json.dumps(bundle.model_cfg))
    text_cfg = model_cfg["text_cfg"]
    text_cfg["context_length"] = bundle.tokenizer.config.context_length
    # open_clip looks towers up from anywhere, so their folders have to be named in full
    if "hf_model_name" in text_cfg:
        (folder / TEXT_TOWER).mkdir()
        shutil.copyfile(hf_folder(text_cfg["hf_model_name"]) / "config.json", folder / TEXT_TOWER / "config.json")
        text_cfg["hf_model_name"] = str(final / TEXT_TOWER)
    vision_cfg = model_cfg["vision_cfg"]
    if "timm_model_args" in vision_cfg:
        (folder / IMAGE_TOWER).mkdir()
        write_timm_config(folder / IMAGE_TOWER, vision_cfg["timm_model_name"], vision_cfg.pop("timm_model_args"))
        vision_cfg["timm_model_name"] = f"local-dir:{final / IMAGE_TOWER}"
    text_cfg["hf_tokenizer_name"] = (
        "."  # any name: with local-dir: open_clip reads the tokenizer from the folder itself
    )
    config = {"model_cfg": model_cfg, "preprocess_cfg": open_clip_preprocess(bundle.image)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_tokenizer(bundle.tokenizer, folder)
    weights = {key: value.detach().cpu().contiguous() for key, value in bundle.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it 0600, and another user may be the one who serves it


def open_clip_preprocess(image: ImageConfig) -> dict[str, Any]:
    """ImageConfig in open_clip's words."""
    return {
        "size": image.size,
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.interpolation,
        "resize_mode": image.resize,
        "fill_color": image.ground,
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, from which transformers, tokenizers and open_clip get our ids.

    No file can say that mojibake and HTML entities are repaired first. CLIP's own vocabulary pads with the id of `!`,
    and a pad token is cut out of every text, so there the end token is named instead.
    """
    vocabulary = _written(tokenizer)
    (folder / VOCABULARY).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    special = {item["content"]: item["id"] for item in vocabulary["added_tokens"]}
    entries = {**vocabulary["model"]["vocab"], **special}
    named = {name: entry for name, entry in (("bos_token", START), ("eos_token", END)) if entry in entries}
    pad = next(entry for entry, number in entries.items() if number == tokenizer.config.pad_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad if pad in special else named.get("eos_token", pad),
        **named,
        "model_max_length": tokenizer.config.context_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _written(tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary as it is saved."""
    vocabulary: dict[str, Any] = json.loads(tokenizer.vocabulary)
    if tokenizer.config.lower and vocabulary["normalizer"] is None:
        vocabulary["normalizer"] = {"type": "Lowercase"}  # CLIP's is lower-cased before it reaches the library
    return vocabulary


def load_bundle(path: Path | str, device: torch.device | str = "cpu") -> Bundle:
    """Load a bundle, a run folder or an exported open_clip folder. Raises BundleError naming file and reason."""
    folder = find_bundle(Path(path)).absolute()
    model_cfg, info = model_cfg_of(folder), _read_info(folder)
    tokenizer = _load_tokenizer(folder, model_cfg, info)
    model = instantiate(model_cfg)
    _load_weights(model, folder, info)
    model.to(device).eval()
    return Bundle(
        name=info.name if info else folder.name,
        model=model,
        model_cfg=model_cfg,
        image=info.image if info else _image_from_open_clip(folder, model_cfg),
        tokenizer=tokenizer,
        provenance=info.provenance if info else Provenance(),
        folder=folder,
    )


def _read_info(folder: Path) -> BundleInfo | None:
    if not (folder / INFO).is_file():
        return None
    content = read_json(folder / INFO)
    if int(content.get("format", 0)) > FORMAT:
        raise BundleError(
            f"{folder / INFO}: format {content['format']} is of a newer vlp; this one reads up to {FORMAT}: upgrade"
        )
    try:
        return BundleInfo.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{folder / INFO}: {explain(error)}") from error


def _load_weights(model: nn.Module, folder: Path, info: BundleInfo | None) -> None:
    path = folder / WEIGHTS
    if info is not None and path.is_file() and sha256_file(path) != info.weights_sha256:
        raise BundleError(f"{path}: sha256 differs from the one in {INFO}; the weights are damaged or were exchanged")
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BundleError(f"{path}: weights cannot be loaded ({str(error).splitlines()[0]})") from error


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer alone of a bundle, a run or an open_clip folder. Raises BundleError as `load_bundle`."""
    folder = find_bundle(Path(path)).absolute()
    return _load_tokenizer(folder, model_cfg_of(folder), _read_info(folder))


def check_start(weights: Path | str, tokenizer: Tokenizer, image: ImageConfig) -> None:
    """Compare a run's tokenizer and pictures with those of the bundle or open_clip folder that it starts from.

    Raises ConfigError for another vocabulary, because every token would mean another word; the rest is a warning.
    """
    place = place_of(weights)
    if not place.is_dir() or is_hf_clip(place):
        return
    folder = find_bundle(place).absolute()
    model_cfg, info = model_cfg_of(folder), _read_info(folder)
    known = _load_tokenizer(folder, model_cfg, info)
    if not same_words(known, tokenizer):
        raise ConfigError(
            f"model.weights={str(weights)!r} was trained with another tokenizer than the recipe's, so that token ids "
            "would mean other words: set tokenizer.kind=weights, which takes the one of the weights"
        )
    theirs = info.image if info else _image_from_open_clip(folder, model_cfg)
    for name in ("mean", "std", "scale", "channels"):
        if getattr(theirs, name) != getattr(image, name):
            log.warning(
                "%s was trained with data.image.%s=%s, this run has %s",
                weights, name, getattr(theirs, name), getattr(image, name),
            )  # fmt: skip


def same_words(known: Tokenizer, other: Tokenizer) -> bool:
    """Whether the same token ids mean the same words to both, whatever length they cut texts to."""
    same_length = {"context_length": other.config.context_length}
    return known.config.model_copy(update=same_length) == other.config and _written(known) == _written(other)


def _load_tokenizer(folder: Path, model_cfg: ModelDict, info: BundleInfo | None) -> Tokenizer:
    text_cfg = model_cfg.get("text_cfg", {})
    length = int(text_cfg.get("context_length", 77))
    if (folder / VOCABULARY).is_file():
        numbers = info.tokenizer if info else TokenizerConfig(context_length=length, lower=False)
        return Tokenizer((folder / VOCABULARY).read_text(encoding="utf-8"), numbers)
    if text_cfg.get("hf_tokenizer_name"):
        raise BundleError(f"{folder}: {VOCABULARY} is missing, and the model does not use CLIP's own vocabulary")
    return clip_tokenizer(length)


def _image_from_open_clip(folder: Path, model_cfg: ModelDict) -> ImageConfig:
    known = read_json(folder / CONFIG).get("preprocess_cfg", {})
    size = known.get("size", model_cfg["vision_cfg"].get("image_size", 224))
    return ImageConfig(
        size=size if isinstance(size, int) else size[0],
        resize=known.get("resize_mode", "shortest"),
        interpolation=known.get("interpolation", "bicubic"),
        ground=known.get("fill_color", 0),
        **{key: known[key] for key in ("mean", "std") if key in known},
    )
