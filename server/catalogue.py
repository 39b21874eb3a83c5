"""The collections of a server: opened on first use, kept open while they are wanted, compacted when they have grown."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from data_pipelines.errors import PipelineError
from server.context import STATE
from server.dialects import answer
from server.errors import ApiError, bad_request
from server.index import FilterError, Index, IndexFailure, IndexInfo, NoKeywords
from server.index.remote import EdgeProcess
from server.index.scan import ScanIndex
from server.index.stores import NAME, Store
from server.model import Model
from server.registry import Registry

log = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT = "default"
"""Asked for when a request names no collection and none was given with --index."""
MOST_OPEN = 16
"""Embedded collections open at a time: each is a process."""
NO_STORE = "this server keeps no collections: start it with --collections FOLDER, or --qdrant URL"
NO_INDEX = (
    "this server has no index: vlp embed BUNDLE --data SHARDS --out EMB; vlp index build EMB --out INDEX; "
    "vlp serve BUNDLE --index INDEX"
)


@dataclass(slots=True)
class _Open:
    opening: "asyncio.Future[Index]"
    users: int = 0
    used: int = 0


class Collections:
    """Named collections. Belongs to one event loop; what blocks runs in threads."""

    def __init__(self, store: Store | None = None, given: Mapping[str, Index] | None = None) -> None:
        """`given`: collections that are open already and stay so; the first is the default."""
        self._store, self._given = store, dict(given or {})
        self._open: dict[str, _Open] = {}
        self._clock = itertools.count(1)
        self._changing = asyncio.Lock()
        self._compactor = ThreadPoolExecutor(1, thread_name_prefix="vlp-compact")

    @property
    def keeps(self) -> bool:
        """Whether collections can be made here."""
        return self._store is not None

    @property
    def search_possible(self) -> bool:
        """Whether there are, or may be, collections."""
        return self.keeps or bool(self._given)

    async def names(self) -> list[str]:
        """All collections, the default first."""
        stored = [] if self._store is None else await _away(self._store.names)
        others = [name for name in stored if name not in self._given]
        first = [*self._given] or [name for name in others if name == DEFAULT]
        return [*first, *(name for name in others if name not in first)]

    async def default(self) -> str | None:
        """Name of the collection that is meant when none is named."""
        if self._given:
            return next(iter(self._given))
        names = await self.names()
        return names[0] if DEFAULT in names or len(names) == 1 else None

    async def get(self, name: str | None = None) -> Index:
        """A collection, for this request. Raises ApiError 404 when it is not there."""
        if name is None:
            name = await self.default()
            if name is None:
                several = "name one of the collections of GET /v1/collections" if await self.names() else NO_INDEX
                raise ApiError(404, several, "no_index")
        if name in self._given:
            return self._given[name]
        if self._store is None or NAME.fullmatch(name) is None:
            raise _unknown(name)
        entry = self._open.get(name)
        if entry is None:
            store = self._store
            entry = self._enter(name, lambda: store.open(name))
        return await self._hold(name, entry)

    def _enter(self, name: str, function: Callable[[], Index]) -> _Open:
        entry = self._open[name] = _Open(asyncio.ensure_future(asyncio.to_thread(function)))
        return entry

    async def _hold(self, name: str, entry: _Open) -> Index:
        entry.users += 1
        entry.used = next(self._clock)
        release = self._release(entry)
        try:
            index = await asyncio.shield(entry.opening)
        except PipelineError as error:
            release()
            if self._open.get(name) is entry:
                del self._open[name]
            if name not in await self.names():
                raise _unknown(name) from error
            log.error("collection %s cannot be opened: %s", name, error)
            raise ApiError(503, f"collection {name!r} cannot be opened; the log says why", "unavailable") from error
        except BaseException:
            release()
            raise
        state = STATE.get()
        if state is None:
            release()
        else:
            state.releases.append(release)
        await self._close_idle()
        return index

    def _release(self, entry: _Open) -> Callable[[], None]:
        def release() -> None:
            entry.users -= 1

        return release

    async def _close_idle(self) -> None:
        """Close what was not used for longest, beyond the number that may be open."""
        idle = sorted((e.used, name) for name, e in self._open.items() if not e.users and e.opening.done())
        for _, name in idle[: max(0, len(self._open) - MOST_OPEN)]:
            entry = self._open.pop(name)
            if entry.opening.exception() is None:
                await asyncio.to_thread(entry.opening.result().close)

    async def info(self, name: str) -> IndexInfo:
        """What a collection holds, without opening it for that. Raises ApiError."""
        entry = self._open.get(name)
        if entry is not None and entry.opening.done() and entry.opening.exception() is None:
            return entry.opening.result().info
        if name in self._given or self._store is None:
            return (await self.get(name)).info
        store = self._store
        return await _away(lambda: store.info(name))

    async def create(self, name: str, info: IndexInfo, most: int) -> Index:
        """A new collection. Raises ApiError 409 when there is one of that name, or there are `most` already."""
        if self._store is None:
            raise ApiError(409, NO_STORE, "no_store")
        if NAME.fullmatch(name) is None:
            raise bad_request("name: 1 to 64 letters, digits, _ and -, beginning with a letter or digit", "name")
        async with self._changing:
            names = await self.names()
            if name in names:
                raise _taken(name)
            if len(names) >= most:
                raise ApiError(409, f"this server keeps at most {most} collections: drop one", "too_many_collections")
            store = self._store
            try:
                return await self._hold(name, self._enter(name, lambda: store.create(name, info)))
            except FileExistsError as error:  # of another replica
                del self._open[name]
                raise _taken(name) from error

    async def drop(self, name: str) -> None:
        """Delete a collection. Requests that are still using it fail."""
        if name in self._given:
            message = f"collection {name!r} was given with --index: delete its folder when the server has stopped"
            raise ApiError(409, message, "not_droppable")
        async with self._changing:
            if self._store is None or name not in await self.names():
                raise _unknown(name)
            entry = self._open.pop(name, None)
            if entry is not None:
                await asyncio.wait({entry.opening})
                if entry.opening.exception() is None:
                    await asyncio.to_thread(entry.opening.result().close)
            store = self._store
            await _away(lambda: store.drop(name))

    def after_write(self, index: Index) -> None:
        """Rebuild the graph in the background if so much has changed that searches would gain by it."""
        engine = index.inner if isinstance(index, ScanIndex) else index
        if isinstance(engine, EdgeProcess) and engine.wants_compaction:
            self._compactor.submit(_compact, engine)

    async def stop(self) -> None:
        """Close everything."""
        self._compactor.shutdown(wait=False, cancel_futures=True)
        opened = [entry.opening for entry in self._open.values()]
        if opened:
            await asyncio.wait(opened)
        indexes = [*self._given.values(), *(done.result() for done in opened if done.exception() is None)]
        await asyncio.gather(*(asyncio.to_thread(index.close) for index in indexes))
        if self._store is not None:
            await asyncio.to_thread(self._store.close)


def _compact(engine: EdgeProcess) -> None:
    if engine.wants_compaction:  # it may have waited behind another compaction of the same collection
        try:
            engine.compact()
        except Exception:  # the collection stays as it was, only slower
            log.exception("compaction failed")


async def _away(function: Callable[[], T]) -> T:
    try:
        return await asyncio.to_thread(function)
    except PipelineError as error:
        log.error("the store of collections does not answer: %s", error)
        raise _no_answer() from error


def _unknown(name: str) -> ApiError:
    shown = name if NAME.fullmatch(name) else "of that name"
    return ApiError(404, f"no collection {shown!r} here; GET /v1/collections lists them", "collection_not_found")


def _taken(name: str) -> ApiError:
    return ApiError(409, f"there is a collection {name!r} already", "collection_exists", "name")


def _no_answer() -> ApiError:
    return ApiError(503, "the index does not answer; try again", "index_unavailable", retry_after=2)


def model_of(registry: Registry, info: IndexInfo, wanted: str | None = None) -> Model:
    """The model that made a collection's vectors; `wanted` has to be that one. Raises ApiError 409, or 400."""
    for model in registry.all():
        unknown = not info.weights_sha256 or not model.digest  # then the width is all there is to compare
        made_it = model.dim == info.dim and (unknown or info.weights_sha256 == model.digest)
        if made_it and wanted in (None, "", model.name):
            return registry.get(model.name)
    if wanted:
        registry.get(wanted)  # 400 for a model that is not served at all
    message = f"this collection was made with model {info.model or 'unknown'!r}, which is not " + (
        f"{wanted!r}" if wanted else "served here: send vectors"
    )
    raise ApiError(409, message, "model_mismatch", "model" if wanted else None)


async def on_index_error(request: Request, error: Exception) -> Response:
    """Handler for what an index refuses or cannot do."""
    if isinstance(error, FilterError):
        refusal = bad_request(f"filter: {error}", f"filter.{error.field}", "invalid_filter")
    elif isinstance(error, NoKeywords):
        refusal = bad_request(f"keywords: {error}", "keywords", "no_keywords")
    else:
        assert isinstance(error, IndexFailure)
        log.error("index: %s", error)
        refusal = _no_answer()
    return answer(refusal, request.scope["path"])


INDEX_ERRORS = (FilterError, NoKeywords, IndexFailure)
