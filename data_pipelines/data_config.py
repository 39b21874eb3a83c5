"""DataConfig: the training data of a recipe, every option of it."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from data_pipelines.augment import AugmentConfig
from data_pipelines.boxes import BoxConfig
from data_pipelines.captions import CaptionConfig
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError
from data_pipelines.fetch import FetchOptions
from data_pipelines.images import MAX_PIXELS
from data_pipelines.labels import LabelConfig
from data_pipelines.preprocess import ImageConfig
from data_pipelines.remote import SHARD_FETCH
from data_pipelines.sampler import SamplerConfig
from data_pipelines.shard_set import Train


class DataConfig(StrictModel):
    """Training data of a recipe."""

    train: Train
    """Folder of shards, tars or URLs, several joined by `::` and with {a..b}; or {such a text: weight}, a mixture."""
    sources: dict[str, int] | None = None
    """Source -> how often each of its samples appears in an epoch; others are left out. Default: all once."""
    keep: Path | None = None
    """Keep-list: only samples whose keys it names are used (text, one key per line; or parquet, column `key`)."""
    weights: Path | None = None
    """Parquet with columns `key` and `weight`, for the batch field `weight`; a key it lacks counts 1."""
    labels: LabelConfig | None = None
    """Fills the batch fields `label_ids` and `multi_labels`."""
    clusters: Path | None = None
    """Parquet of `vlp curate` with columns `key` and `cluster_ids`, for the batch field `cluster_ids`."""
    boxes: BoxConfig | None = None
    """Fills the batch fields `boxes`, `box_mask` and `box_labels`."""
    sampler: SamplerConfig | None = None
    """Which samples share a batch; default: whichever the order brings together."""
    batch_size: int = 256
    """Global batch, over all ranks."""
    image: ImageConfig = ImageConfig()
    augment: AugmentConfig = AugmentConfig()
    strong: AugmentConfig | None = None
    """Augmentation of the further views; default: as the first."""
    captions: CaptionConfig = CaptionConfig()
    views: int = Field(1, ge=1)
    """Augmented views of each picture; those after the first are the batch field `views`."""
    texts: int = Field(1, ge=1)
    """Texts drawn for each picture; those after the first are the batch field `extra_tokens`."""
    window: int = Field(16, ge=1)
    """Shards whose samples are mixed with each other."""
    partitions: int = Field(1, ge=1)
    """Equal runs of the data that every batch draws from; ranks that divide them read only their own shards."""
    group_by_length: int = Field(0, ge=0)
    """So many batches are sorted by the bytes of their captions and cut anew, so that texts pad little; 0 = off."""
    threads: int = Field(2, ge=1)
    """Decoding threads per rank."""
    prefetch: int = Field(2, ge=1)
    """Batches made ahead."""
    cache_mb: int = 1024
    """Memory for decoded pictures, per rank; a data set that fits is decoded once."""
    cached_views: int = 4
    """With both trunks frozen: views of every picture whose features are computed once, the plain one included."""
    disk_cache_gb: float = Field(100.0, gt=0)
    """Disk for remote shards, shared by all processes of the machine."""
    fetch: FetchOptions = SHARD_FETCH
    """How shards at web addresses are fetched."""
    read_ahead: int = Field(64, ge=0)
    """Steps ahead whose remote shards are fetched."""
    pipe: tuple[str, ...] = ()
    """Programs that `pipe:` locations may run, by name."""
    max_pixels: int = MAX_PIXELS
    max_bad_share: float = 0.01
    """The run stops when a larger share of the samples cannot be used."""

    @field_validator("train", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "DataConfig":
        self.augment.check(self.image, "data.augment")
        if self.boxes and self.augment.warp:
            raise ConfigError(
                f"data.augment.warp={self.augment.warp} bends pictures, and data.boxes cannot follow: set it to 0"
            )
        if self.strong is not None:
            self.strong.check(self.image, "data.strong")
            if self.views == 1:
                raise ConfigError("data.strong has no effect with data.views=1: set data.views to 2 or more")
        if self.sampler is not None and getattr(self, self.sampler.by) is None:
            raise ConfigError(f"data.sampler.by={self.sampler.by} needs data.{self.sampler.by}")
        return self


FREE = {
    "train", "batch_size", "partitions", "threads", "prefetch", "cache_mb", "disk_cache_gb", "fetch", "read_ahead",
    "pipe", "max_bad_share",
}  # fmt: skip
"""Settings that a resumed run may change, or whose content the state holds in another form."""
