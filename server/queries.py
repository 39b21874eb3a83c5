"""From the points and queries of collection routes to vectors.

Suffixes: D vector width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from server.batcher import Row
from server.catalogue import model_of
from server.errors import ApiError, bad_request
from server.index import Index, IndexInfo, PointId
from server.inputs import read_pictures, see_decoded
from server.model import Seen
from server.schemas.items import check_text, read_item
from server.services import Services


class Input(Protocol):
    """What points and queries have in common."""

    @property
    def text(self) -> str | None:
        """A text."""

    @property
    def image(self) -> Any:
        """A picture in one of its forms."""

    @property
    def vector(self) -> list[float] | None:
        """A vector of the client's own."""


@dataclass(slots=True)
class Resolved:
    """Vectors of inputs in order, or why there is none; of pictures with what the guard makes of them."""

    rows: list[Row | ApiError]
    model: str | None = None
    """Which model was asked; None when only vectors were given."""
    guards: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Number of the input -> the guard's part of the answer."""
    pictures: dict[int, bytes] = field(default_factory=dict)
    """Number of the input -> the encoded picture of which its vector was made."""


async def resolve(
    services: Services, info: IndexInfo, given: Sequence[tuple[str, Input]], wanted: str | None
) -> Resolved:
    """(parameter, input) pairs as unit vectors of the collection's width. Raises ApiError for what concerns all."""
    limits = services.settings.limits
    found: dict[int, Row | ApiError] = {}
    texts: list[tuple[int, str]] = []
    pictures: list[tuple[int, tuple[str, str]]] = []
    for number, (param, item) in enumerate(given):
        try:
            if item.vector is not None:
                found[number] = unit(item.vector, info.dim, _at(param, "vector"))
            elif item.text is not None:
                check_text(item.text, _at(param, "text"), limits)
                texts.append((number, item.text))
            else:
                picture = read_item(item.image, _at(param, "image"), "image")
                if picture.kind == "text":
                    raise bad_request(f"{picture.param}: this is a text; give it as text", picture.param)
                pictures.append((number, (picture.param, picture.value)))
        except ApiError as error:
            found[number] = error
    for kind, count, most in (("texts", len(texts), limits.texts), ("pictures", len(pictures), limits.images)):
        if count > most:
            raise bad_request(f"{count} {kind}, at most {most} per request", code="too_many_items")
    resolved = Resolved([])
    if texts or pictures:
        model = model_of(services.registry, info, wanted)
        resolved.model = model.name
        rows_ND, _ = await model.embed_texts([text for _, text in texts])
        found.update(zip((number for number, _ in texts), rows_ND, strict=True))
        inputs = [pair for _, pair in pictures]
        decoded = await read_pictures(inputs)
        for (number, _), data, seen in zip(pictures, decoded, await see_decoded(model, inputs, decoded), strict=True):
            found[number] = seen.row if isinstance(seen, Seen) else seen
            if isinstance(seen, Seen) and isinstance(data, bytes):
                resolved.guards[number], resolved.pictures[number] = seen.guard(), data
    elif wanted:
        resolved.model = model_of(services.registry, info, wanted).name
    resolved.rows = [found[number] for number in range(len(given))]
    return resolved


def require_one(item: Input, param: str, *further: object) -> None:
    """Refuse an input that gives none or several of its forms. `further`: other forms it may have. Raises ApiError."""
    forms = [form for form in (item.text, item.image, item.vector, *further) if form is not None]
    if len(forms) != 1:
        names = "text, image and vector" if not further else "text, image, vector and id"
        where = f"{param}: " if param else ""
        raise bad_request(f"{where}give exactly one of {names}", param or None, "invalid_item")


def _at(param: str, name: str) -> str:
    return f"{param}.{name}" if param else name


def unit(numbers: Sequence[float], dim: int, param: str) -> Row:
    """A client's own vector, made length 1. Raises ApiError 400."""
    if len(numbers) != dim:
        raise bad_request(f"{param}: {len(numbers)} numbers, the collection has vectors of {dim}", param)
    vector_D = np.array(numbers, np.float64)
    with np.errstate(over="ignore"):
        length = float(np.linalg.norm(vector_D))
    if not 1e-30 < length < 1e30:
        raise bad_request(f"{param}: the vector is zero, or not finite", param)
    unit_D: Row = (vector_D / length).astype(np.float32)
    return unit_D


async def stored_rows(services: Services, index: Index, ids: Sequence[PointId]) -> dict[PointId, Row]:
    """Vectors of points of this collection. Raises ApiError 404 when one is not there."""
    points = await services.in_thread(lambda: index.get(list(ids), vectors=True)) if ids else []
    rows = {point.id: point.vector for point in points if point.vector is not None}
    for id in ids:
        if id not in rows:
            raise ApiError(404, f"there is no point {id!r} in this collection", "point_not_found", "id")
    return rows
