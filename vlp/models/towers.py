"""Pretrained weights of single towers, from pinned packages or local files. Never from a hub, never pickled modules."""

from torch import Tensor, nn

from data_pipelines.errors import ConfigError
from data_pipelines.towers import PACKAGES as TOWERS
from data_pipelines.towers import tower_folder
from vlp.models.config import Stem
from vlp.models.folders import weights_file
from vlp.models.weights import State, load, read_file, read_weights, rename

TRUNK, TRANSFORMER = "visual.trunk.", "text.transformer."
CLASSIFIERS = ("fc.", "head.", "head_dist.", "classifier.")
"""Where image towers keep the layer that our projection replaces."""


def load_image_tower(model: nn.Module, source: str, stem: Stem | None = None) -> None:
    """Load the image tower from a whole model's weights, or a timm tower's trunk from its own.

    Every tensor must find its place with an equal shape, once positions and stem are fitted. Raises ConfigError.
    """
    where = f"model.image_weights={source!r}"
    weights = image_weights(source)
    own = model.state_dict()
    if any(key.startswith("visual.") for key in weights):
        weights = {key: value for key, value in rename(model, weights).items() if key.startswith("visual.")}
        return load(model, weights, [key for key in own if key.startswith("visual.")], where, stem)
    trunk = {key.removeprefix(TRUNK): value for key, value in own.items() if key.startswith(TRUNK)}
    if not trunk:
        raise ConfigError(
            f"{where} holds no tensors visual.*, so it is a bare tower: it needs a timm image tower "
            "(vision_cfg.timm_model_name)"
        )
    extra = [key for key in weights if key not in trunk and key.startswith(CLASSIFIERS)]
    extra = extra or [key for key in weights if weights[key].shape[:1] == (1000,)]
    weights = {key: value for key, value in weights.items() if key not in extra}
    if set(weights) != set(trunk) and len(weights) == len(trunk):
        weights = in_order(weights, trunk, where)
    placed = {TRUNK + key: value for key, value in weights.items()}
    return load(model, placed, [TRUNK + key for key in trunk], where, stem)


def image_weights(source: str) -> State:
    """Tensors of a pinned image tower, or of a local file or folder."""
    if source in TOWERS:
        (path,) = tower_folder(source).glob("*.pth")
        return read_file(path)
    return read_weights(source, "model.image_weights")


def in_order(weights: State, own: State, where: str) -> State:
    """Names differ between libraries: assign in key order, which is safe only if count and every shape agree."""
    pairs = list(zip(own.items(), weights.values(), strict=False))
    if len(own) != len(weights) or any(_kernel(target) != _kernel(value) for (_, target), value in pairs):
        raise ConfigError(f"{where}: {len(weights)} tensors do not fit the tower's {len(own)}")
    return {key: value for (key, _), value in pairs}


def _kernel(value: Tensor) -> tuple[int, ...]:
    """Shape, the 1 to many channels of a stem left out: load() fits them."""
    return (value.shape[0], *value.shape[2:]) if value.ndim == 4 else tuple(value.shape)


def load_text_tower(model: nn.Module, source: str) -> None:
    """Load the text tower from a whole model's weights, or a Hugging Face tower's transformer from its own.

    Raises ConfigError.
    """
    where = f"model.text_weights={source!r}"
    pinned = source in TOWERS
    weights = read_file(weights_file(tower_folder(source))) if pinned else read_weights(source, "model.text_weights")
    own = model.state_dict()
    if any(key.startswith("visual.") for key in weights):
        text = [key for key in own if not key.startswith(("visual.", "logit_", "text_decoder."))]
        weights = {key: value for key, value in rename(model, weights).items() if key in text or _textual(key)}
        return load(model, weights, text, where, None)
    transformer = getattr(getattr(model, "text", None), "transformer", None)
    if not hasattr(transformer, "config"):
        raise ConfigError(
            f"{where} holds no whole model, so it needs a Hugging Face text tower (text_cfg.hf_model_name)"
        )
    names = [key.removeprefix(TRANSFORMER) for key in own if key.startswith(TRANSFORMER)]
    placed = {TRANSFORMER + key: value for key, value in _of_transformer(weights, names).items()}
    return load(model, placed, [TRANSFORMER + key for key in names], where, None)


def _textual(key: str) -> bool:
    return key.startswith(("text.", "transformer.", "token_embedding.", "ln_final."))


def _of_transformer(weights: State, names: list[str]) -> State:
    """Those tensors that belong to the transformer, out of a model for another task: a head, a decoder around it."""
    first = {key.partition(".")[0] + "." for key in weights}
    prefix = max(["", *sorted(first)], key=lambda start: sum(start + name in weights for name in names))
    found = {name: weights[prefix + name] for name in names if prefix + name in weights}
    if "embed_tokens.weight" in names and "shared.weight" in weights:
        found.setdefault("embed_tokens.weight", weights["shared.weight"])
    return found
