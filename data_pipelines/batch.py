"""Batch: what one training step sees. Ground truth about poison never enters it.

Shapes: B samples, C channels, H height, W width, L tokens, K classes, M boxes, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from data_pipelines.errors import MissingField

PROVIDED_BY = {
    "label_ids": "data.labels", "multi_labels": "data.labels.multi=true", "cluster_ids": "data.clusters",
    "boxes": "data.boxes", "box_mask": "data.boxes", "box_labels": "data.boxes.labels", "weight": "data.weights",
}  # fmt: skip
"""Field -> the option of a recipe that provides it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that take one step together; optional fields are None when the data does not provide them."""

    keys: tuple[str, ...]
    """B sample keys."""
    pixels: Tensor
    """BCHW uint8, or float32 where `image.values` says so; not yet normalised."""
    tokens: Tensor
    """BL int64 token ids, padded."""
    views: tuple[Tensor, ...] | None = None
    """Further augmented views, each as `pixels`."""
    extra_tokens: tuple[Tensor, ...] | None = None
    """Further captions of the same samples, each BL int64."""
    phrase_ids: Tensor | None = None
    """BP int64: numbers of all captions and labels of a sample, its own caption first, padded with -1."""
    text_phrase_ids: Tensor | None = None
    """BQ int64: numbers of the phrases that make up its text, padded with -1."""
    label_ids: Tensor | None = None
    """B int64 class index, -1 = unknown."""
    multi_labels: Tensor | None = None
    """BK uint8 multi-hot."""
    cluster_ids: Tensor | None = None
    """BS int64: clusters or entities of a sample by a curation step, the closest first, padded with -1."""
    boxes: Tensor | None = None
    """BM4 float32, xyxy as fractions 0..1."""
    box_mask: Tensor | None = None
    """BM bool, True where a box is real."""
    box_labels: Tensor | None = None
    """BM int64 number of a box's label, -1 = none of those that are numbered."""
    weight: Tensor | None = None
    """B float32 sample weights."""
    source_ids: Tensor | None = None
    """B int64 index of the source in the data recipe."""
    image_features: Tensor | None = None
    """BF float32: output of a frozen image trunk, computed once, in place of `pixels`."""
    text_features: Tensor | None = None
    """BF float32: output of a frozen text trunk, in place of `tokens`."""

    @property
    def text_input(self) -> Tensor:
        """What the text tower takes: tokens, or the features of a frozen trunk."""
        return self.tokens if self.text_features is None else self.text_features

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device` (asynchronously from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; needs a GPU runtime."""
        return self._map(lambda tensor: tensor.pin_memory())

    def split(self, parts: int) -> list["Batch"]:
        """The same samples in up to `parts` batches of equal size, the last one perhaps smaller."""
        size = -(-len(self.keys) // parts)
        rows = [slice(first, first + size) for first in range(0, len(self.keys), size)]
        return [replace(self._map(lambda tensor, at=at: tensor[at]), keys=self.keys[at]) for at in rows]  # type: ignore[misc]

    def require(self, field: str, by: str) -> Tensor:
        """The named tensor, or MissingField saying who needs it."""
        value = getattr(self, field)
        if not isinstance(value, Tensor):
            option = PROVIDED_BY.get(field)
            advice = f": set {option}" if option else ""
            raise MissingField(f"{by} needs the batch field {field!r}, which this data does not provide{advice}")
        return value

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Tensor | tuple[Tensor, ...]] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = move(value)
            elif item.name in ("views", "extra_tokens") and value is not None:
                changed[item.name] = tuple(move(tensor) for tensor in value)
        return replace(self, **changed)  # type: ignore[arg-type]  # field types checked by name above
