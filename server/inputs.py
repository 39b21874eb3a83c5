"""From the items of a request to vectors: the one place where routes turn picture inputs into bytes, and embed."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.errors import BadSample
from server.batcher import Row
from server.context import STATE
from server.errors import ApiError, bad_item, bad_request
from server.fetching import Fetcher, is_remote
from server.images import image_bytes
from server.model import Model, Seen
from server.schemas.items import Entry, Item

IN_THREAD = 200_000
"""Characters of base64 from which decoding leaves the event loop alone."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Items in order: vectors, or why there is none; and what they cost."""

    rows: list[Row | ApiError]
    tokens: int
    """Of the texts, without padding."""
    images: int

    def all(self) -> list[Row]:
        """The vectors. Raises the first error."""
        good: list[Row] = []
        for row in self.rows:
            if isinstance(row, ApiError):
                raise row
            good.append(row)
        return good


async def read_pictures(given: Sequence[tuple[str, str]]) -> list[bytes | ApiError]:
    """Encoded pictures of (parameter, base64, data URI or, where allowed, URL) inputs, or why there is none."""
    state = STATE.get()
    if state is not None and state.fetcher is not None and any(is_remote(value) for _, value in given):
        return await _fetched(state.fetcher, given)
    if sum(len(value) for _, value in given) < IN_THREAD:
        return _decoded(given)
    return await asyncio.to_thread(_decoded, given)


async def _fetched(fetcher: Fetcher, given: Sequence[tuple[str, str]]) -> list[bytes | ApiError]:
    """The same with URLs among them, fetched side by side."""
    remote = [(param, value) for param, value in given if is_remote(value)]
    local = iter(_decoded([(param, value) for param, value in given if not is_remote(value)]))
    found = iter(await asyncio.gather(*(fetcher.picture(value, param) for param, value in remote)))
    return [next(found) if is_remote(value) else next(local) for _, value in given]


def _decoded(given: Sequence[tuple[str, str]]) -> list[bytes | ApiError]:
    found: list[bytes | ApiError] = []
    for param, value in given:
        try:
            found.append(image_bytes(value, param))
        except ApiError as error:
            found.append(error)
    return found


async def see_pictures(model: Model, given: Sequence[tuple[str, str]]) -> list[Seen | ApiError]:
    """(parameter, picture) inputs embedded; one that cannot be used fails alone."""
    return await see_decoded(model, given, await read_pictures(given))


async def see_decoded(
    model: Model, given: Sequence[tuple[str, str]], decoded: Sequence[bytes | ApiError]
) -> list[Seen | ApiError]:
    """`see_pictures` for what `read_pictures` made of the inputs."""
    seen = iter(await model.see_images([data for data in decoded if isinstance(data, bytes)]))
    outcomes = [item if isinstance(item, ApiError) else next(seen) for item in decoded]
    return [
        bad_item(outcome, param) if isinstance(outcome, BadSample) else outcome
        for outcome, (param, _) in zip(outcomes, given, strict=True)
    ]


async def embed_items(model: Model, items: Sequence[Item]) -> Embedded:
    """Texts and pictures mixed, in order; a picture that cannot be used fails alone."""
    texts = [item.value for item in items if item.kind == "text"]
    pictures = [(item.param, item.value) for item in items if item.kind == "image"]
    (text_rows, tokens), seen = await asyncio.gather(model.embed_texts(texts), see_pictures(model, pictures))
    of_texts, of_pictures = iter(text_rows), (item.row if isinstance(item, Seen) else item for item in seen)
    rows: list[Row | ApiError] = [next(of_texts) if item.kind == "text" else next(of_pictures) for item in items]
    return Embedded(rows, tokens, len(pictures))


async def embed_entries(model: Model, entries: Sequence[Entry]) -> tuple[list[Row], int, int]:
    """(one vector per entry, text tokens, pictures); several items become the mean of their vectors, normalised.

    Raises the ApiError of the first picture that cannot be used.
    """
    embedded = await embed_items(model, [item for entry in entries for item in entry])
    rows = iter(embedded.all())
    return [fused([next(rows) for _ in entry]) for entry in entries], embedded.tokens, embedded.images


def fused(rows: Sequence[Row]) -> Row:
    """The normalised mean; a single vector stays as it is, to the last bit."""
    if len(rows) == 1:
        return rows[0]
    mean: Row = np.mean(rows, axis=0, dtype=np.float32)
    norm = float(np.linalg.norm(mean))
    return mean / np.float32(norm) if norm else mean


def check_dimensions(wanted: int | None, model: Model, param: str) -> None:
    """Refuse to shorten vectors that no training has made fit for it; 0 and None leave them alone. Raises ApiError."""
    if wanted and wanted != model.dim:
        raise bad_request(
            f"{param}: this model's vectors have {model.dim} and cannot be shortened; leave it out", param
        )


async def check_length(model: Model, items: Sequence[Item]) -> None:
    """Refuse texts that the model's context would cut. Raises ApiError 400."""
    texts = [item for item in items if item.kind == "text"]
    overlong = await asyncio.to_thread(model.engine.overlong, [item.value for item in texts])
    for item, cut in zip(texts, overlong, strict=True):
        if cut:
            message = (
                f"{item.param}: the text is longer than the model's {model.engine.context} tokens; allow to cut it"
            )
            raise bad_request(message, item.param, "text_too_long")
