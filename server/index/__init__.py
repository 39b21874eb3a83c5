"""What the server asks of a vector index. `edge` is the embedded default; a cluster fits behind the same protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.config import StrictModel

FieldKind = Literal["keyword", "integer", "bool"]
Value = str | int | bool | Sequence[str] | Sequence[int]
"""What a filter compares with; a sequence means any of its members."""

ALWAYS: Mapping[str, FieldKind] = {"key": "keyword", "source": "keyword", "labels": "keyword"}
"""Payload fields every index can be filtered by."""


class IndexInfo(StrictModel):
    """What an index holds; saved beside it as index.json."""

    format: int = 1
    dim: int
    modality: Literal["image", "text"] = "image"
    """Which embeddings were indexed."""
    model: str = ""
    """Name of the model that made the vectors; empty when the embedding folder did not say."""
    weights_sha256: str = ""
    fields: dict[str, FieldKind]
    """Payload fields that filters may name. Their indexes exist since before the first point."""
    points: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """One result; `score` is the cosine."""

    id: int
    score: float
    payload: dict[str, Any]


class Index(Protocol):
    """A searchable collection. Methods may be called from several threads."""

    @property
    def info(self) -> IndexInfo:
        """What it holds."""

    def search(self, query: NDArray[np.float32], limit: int, where: Mapping[str, Value], exact: bool) -> list[Hit]:
        """Best `limit` hits, best first, among the points whose payload fulfils all of `where`.

        Raises FilterError for a field or value it cannot filter by.
        """

    def close(self) -> None:
        """Make everything durable and let go of the files."""


class FilterError(ValueError):
    """A filter names an undeclared field or a value of the wrong type; the message says what is possible."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def check_filter(where: Mapping[str, Value], fields: Mapping[str, FieldKind]) -> None:
    """Refuse what would be wrong or slow: an undeclared field has no index, and the graph has no links for it."""
    kinds: dict[FieldKind, type] = {"keyword": str, "integer": int, "bool": bool}
    for field, value in where.items():
        if field not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise FilterError(field, f"field {field!r} cannot be filtered by; this index has: {known}")
        kind = fields[field]
        values: list[str | int] = [value] if isinstance(value, str | int) else [*value]
        several = not isinstance(value, str | int)
        right = all(type(item) is kinds[kind] and _storable(item) for item in values)
        if not values or not right or (several and kind == "bool"):
            wanted = "true or false" if kind == "bool" else f"{kinds[kind].__name__} or a list of them"
            raise FilterError(field, f"field {field!r} is compared with {wanted}")


def _storable(value: str | int) -> bool:
    """Whether the engine can hold the value: integers have 64 bits."""
    return isinstance(value, str) or -(2**63) <= value < 2**63
