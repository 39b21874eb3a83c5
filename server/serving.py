"""One process that answers: the app built, uvicorn run, signals understood.

SIGTERM: readiness fails at once, requests go on being answered for a moment while balancers look elsewhere, then the
port is closed and what has begun is finished. SIGHUP: keys and models are read again.
"""

import asyncio
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import PipelineError
from server.listeners import accept_all, refuse_new
from server.settings import Settings

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from server.index.remote import EdgeProcess
    from server.services import Services

log = logging.getLogger(__name__)

DRAIN_SECONDS = 16
"""What has begun may take so long to finish; with the waits before it less than the 20 s that most supervisors give."""
KEEP_ALIVE = 30
"""Seconds an idle connection stays open."""
BACKLOG_SECONDS = 0.3
"""Between letting no more connections in and closing the port: time to finish handshakes and accept them all."""
FIRST_BYTES_SECONDS = 2.0
"""Connections that have not asked anything yet have this long for their request's head, before idle ones are closed."""
BEAT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Launch:
    """What `vlp serve` was told."""

    settings: Settings
    bundles: tuple[str, ...]
    index: Path | None = None
    guard: Path | None = None
    device: str = "auto"
    backend: str = "torch"
    drain_wait: float = 0.5
    """Seconds between SIGTERM and closing the port."""
    keys: Path | None = None
    collections: Path | None = None
    """Folder of embedded collections; it is made when it is not there."""
    qdrant: str | None = None
    """URL of a Qdrant server or cluster that keeps them instead."""


@dataclass(slots=True)
class Supervision:
    """How a worker speaks with the process that started it; by default there is none."""

    report: Callable[[dict[str, Any]], None] = field(default=lambda _message: None)
    lifeline: int | None = None
    """A pipe that ends when that process does."""


def build_app(launch: Launch) -> "tuple[FastAPI, dict[str, Any]]":
    """Everything loaded and checked: (the app, what to tell about it). Raises PipelineError."""
    from server.index.remote import EdgeProcess

    index = EdgeProcess(launch.index) if launch.index else None  # first, because importing torch takes seconds
    try:
        return _app_over(launch, index)
    except BaseException:
        if index is not None:
            index.close()
        raise


def _app_over(launch: Launch, index: "EdgeProcess | None") -> "tuple[FastAPI, dict[str, Any]]":
    from server.app import create_app
    from server.catalogue import DEFAULT, Collections
    from server.index.scan import ScanIndex
    from server.index.stores import open_store
    from server.loading import check_same_model, load_sources

    sources = load_sources(launch.bundles, launch.guard, launch.device, launch.backend, launch.settings.limits)
    if index is not None:
        check_same_model(index.info, sources)
    first = sources[0].loaded
    info = {
        "model": first.engine.name,
        "dim": first.engine.dim,
        "models": [source.loaded.engine.name for source in sources],
        "backends": {source.loaded.engine.name: source.loaded.engine.backend for source in sources},
        "points": index.info.points if index else None,
        "guard": first.guarding.state() if first.guarding else None,
    }
    store = open_store(launch.collections, launch.qdrant)
    kept = Collections(store, {} if index is None else {DEFAULT: ScanIndex(index)})
    return create_app(launch.settings, sources, kept=kept), info


def start(launch: Launch, listener: socket.socket, announce: Callable[[dict[str, Any]], None]) -> None:
    """Serve with as many workers as the settings say, until told to stop."""
    # uvicorn stops gracefully and then raises the signal once more, for handlers set before it: these end the process
    # by returning, with exit code 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: None)
    if launch.settings.workers == 1:
        run(launch, listener, announce)
        return
    from server.supervisor import Supervisor

    with tempfile.TemporaryDirectory(prefix="vlp-serve-") as shared:
        settings = launch.settings.model_copy(update={"shared": Path(shared)})
        Supervisor(replace(launch, settings=settings), listener, announce).run()


def run(launch: Launch, listener: socket.socket, announce: Callable[[dict[str, Any]], None],
        supervision: Supervision | None = None) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM, then finish what was begun. `announce` is called once it answers."""
    import uvicorn

    from server.connections import connection_class
    from server.services import Services

    app, info = build_app(launch)
    services = app.state.services
    assert isinstance(services, Services)
    config = uvicorn.Config(
        app, http=connection_class(launch.settings.limits), ws="none", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, lifespan="on", timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )  # fmt: skip
    with asyncio.Runner(loop_factory=config.get_loop_factory()) if hasattr(asyncio, "Runner") else _Runner() as runner:
        runner.run(_serve(config, services, launch, listener, lambda: announce(info), supervision or Supervision()))


class _Runner:
    """asyncio.Runner as far as it is needed, for Python 3.10."""

    def __enter__(self) -> "_Runner":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, main: Any) -> None:
        """To the end."""
        asyncio.run(main)


async def _serve(
    config: "uvicorn.Config", services: "Services", launch: Launch, listener: socket.socket,
    announce: Callable[[], None], supervision: Supervision,
) -> None:  # fmt: skip
    server = _server(config, services, launch, listener, supervised=supervision.lifeline is not None)
    loop = asyncio.get_running_loop()
    hup: set[asyncio.Task[None]] = set()

    def again() -> None:
        task = loop.create_task(_read_again(services, launch))
        hup.add(task)
        task.add_done_callback(hup.discard)

    def orphaned(lifeline: int) -> None:
        loop.remove_reader(lifeline)
        server.begin_drain(whole=True)  # the other workers see it too, and nobody is left to close the port for us

    loop.add_signal_handler(signal.SIGHUP, again)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.02)
    if server.started:
        announce()
        services.on_reload = lambda name: supervision.report({"reload": name})
        if supervision.lifeline is not None:
            loop.add_reader(supervision.lifeline, orphaned, supervision.lifeline)
            hup.add(loop.create_task(_beat(services, server, supervision)))
    await serving
    if not server.started:
        raise PipelineError("the server did not start; the log above says why")


def _server(
    config: "uvicorn.Config", services: "Services", launch: Launch, listener: socket.socket, supervised: bool
) -> Any:
    """uvicorn's server, with another idea of how to stop."""
    import uvicorn

    from server.connections import Connection

    class Server(uvicorn.Server):
        """Drains before it closes."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            """First SIGTERM: drain. SIGINT, or any second signal: close, and with a third do not wait."""
            if sig == signal.SIGTERM and not services.draining:
                services.draining = True
                asyncio.get_running_loop().call_soon_threadsafe(self.begin_drain)
            elif self.should_exit:
                self.force_exit = True
            else:
                self.should_exit = True

        def begin_drain(self, whole: bool = not supervised) -> None:
            """Called in the loop. `whole`: the port ends with this process; otherwise others go on with it."""
            services.draining = True
            asyncio.get_running_loop().call_later(launch.drain_wait, self._close, whole)

        def _close(self, whole: bool) -> None:
            if whole and listener.fileno() >= 0:
                refuse_new(listener)
            asyncio.get_running_loop().call_later(BACKLOG_SECONDS, self._exit)

        def _exit(self) -> None:
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """uvicorn's, but connections are accepted to the last, and none is closed before it could ask."""
            loop = asyncio.get_running_loop()
            if not supervised:
                refuse_new(listener)
            last = [] if supervised else accept_all(listener)
            for accepting in self.servers:
                accepting.close()
            for connection in last:
                await loop.connect_accepted_socket(self._protocol, connection)
            deadline = loop.time() + FIRST_BYTES_SECONDS
            while services.draining and self._asked() and loop.time() < deadline:
                await asyncio.sleep(0.02)
            await super().shutdown(sockets)

        def _asked(self) -> bool:
            """Whether a request may be on its way on a connection that is open."""
            return any(isinstance(one, Connection) and one.asking for one in self.server_state.connections)

        def _protocol(self) -> asyncio.Protocol:
            return self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

    return Server(config)


async def _read_again(services: "Services", launch: Launch) -> None:
    from server.keys import read_keys

    try:
        services.keys = read_keys(launch.keys)
    except PipelineError as error:
        log.error("the keys stay as they were: %s", error)
    await services.registry.reload_all()


async def _beat(services: "Services", server: Any, supervision: Supervision) -> None:
    """Tell the supervisor that this loop turns. A worker whose model thread has ended makes room for another."""
    while True:
        if any(model.dead for model in services.registry.all()):
            log.critical("a model thread has ended: worker %d stops", os.getpid())
            supervision.report({"dead": True})
            server.begin_drain()
            return
        supervision.report({"beat": True})
        await asyncio.sleep(BEAT_SECONDS)
