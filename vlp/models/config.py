"""ModelConfig: which towers, which weights they start from, and which of them are locked for how long."""

from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError

ModelDict = dict[str, Any]
"""An open_clip `model_cfg`: embed_dim, vision_cfg, text_cfg and a few switches."""
Stem = Literal["mean", "repeat", "random"]


class ModelConfig(StrictModel):
    """Which towers, and which weights they start from."""

    name: str = "starter-small"
    """A config of ours (`vlp/models/configs`), any open_clip config name, or `local-dir:PATH`: that of a bundle, a run,
    an open_clip folder or a Hugging Face CLIPModel folder."""
    config: ModelDict | None = None
    """An open_clip `model_cfg` written out in the recipe; replaces `name`. timm and Hugging Face towers go here."""
    text_tower: str | None = None
    """Local folder with the config.json of the Hugging Face text tower that a config names by its place on the hub."""
    init_logit_scale: float | None = None
    """Logarithm of the first logit scale; default as in the config, else ln(1/0.07)."""
    patch_dropout: float | None = Field(None, ge=0, lt=1)
    """Share of the patches of every picture that a ViT leaves out in training (FLIP, arXiv 2212.00794); default as in
    the config."""
    weights: str | None = None
    """Weights of the whole model: an open_clip checkpoint (.pt, .pth, .bin), a .safetensors file, an open_clip folder,
    a Hugging Face CLIPModel folder, a bundle or a run; bundles, runs and files may lie on an object store
    (`s3://bucket/runs/mine`). Positions are fitted to another picture size or text length."""
    stem: Stem | None = None
    """First layer where RGB weights meet other channels. mean: every channel gets the mean RGB kernel; repeat: R, G, B
    in turn; both times 3/channels, so that activations keep their size. random: fresh weights, as in SoftCon."""
    image_weights: str | None = None
    """Weights of the image tower: a pinned tower (`efficientnet-lite0`), a timm file or folder, or the image tower of
    any of the forms of `weights`."""
    text_weights: str | None = None
    """Weights of the text tower: a pinned tower (`minilm-l6-v2`), a Hugging Face file or folder, or the text tower of
    any of the forms of `weights`."""
    lock_image: bool = False
    """Freeze the image tower: the trunk of a timm tower, all of an open_clip tower."""
    lock_image_unlocked_groups: int = Field(0, ge=0)
    """Last layer groups that a locked image tower still trains; open_clip towers count the projection as one."""
    lock_text: bool = False
    """Freeze the text tower: the transformer of a Hugging Face tower, all of an open_clip tower."""
    lock_text_unlocked_layers: int = Field(0, ge=0)
    """Last layers that a locked text tower still trains; open_clip towers count the projection as one."""
    thaw_image_at: float | None = Field(None, gt=0, lt=1)
    """Share of the run after which a locked image tower trains whole; default never."""
    thaw_text_at: float | None = Field(None, gt=0, lt=1)
    """The same for the text tower."""

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> "ModelConfig":
        needs = {
            "lock_image_unlocked_groups": (self.lock_image, "model.lock_image"),
            "lock_text_unlocked_layers": (self.lock_text, "model.lock_text"),
            "thaw_image_at": (self.lock_image, "model.lock_image"),
            "thaw_text_at": (self.lock_text, "model.lock_text"),
            "stem": (self.weights or self.image_weights, "model.weights or model.image_weights"),
        }
        for name, (there, needed) in needs.items():
            if getattr(self, name) and not there:
                raise ConfigError(f"model.{name}={getattr(self, name)!r} has no effect without {needed}")
        return self
