"""Several workers on one port: started from a process that has everything imported, replaced when they end.

The supervisor imports torch once and never runs it; a worker is a fork of it, so that a new one needs no imports and
shares their memory. It watches each worker through a pipe: a worker that says nothing for a while is ended as well.
"""

import contextlib
import importlib
import json
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_pipelines.errors import PipelineError
from server.listeners import accept_all, refuse_new, turn_away
from server.serving import BACKLOG_SECONDS, DRAIN_SECONDS, FIRST_BYTES_SECONDS, Launch, Supervision, run

log = logging.getLogger(__name__)

SILENCE_SECONDS = 30.0
"""A worker whose event loop has not turned for so long is ended."""
START_SECONDS = 600.0
"""The same before it answers: large models take long to load."""
QUICK_END_SECONDS = 5.0
"""A worker that ends sooner than this after its start is replaced with growing delays."""
DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(slots=True)
class Worker:
    """A running worker."""

    pid: int
    pipe: int
    started: float
    heard: float
    ready: bool = False
    rest: bytes = b""


class Supervisor:
    """Keeps a number of workers alive until told to stop."""

    def __init__(self, launch: Launch, listener: socket.socket, announce: Callable[[dict[str, Any]], None]) -> None:
        self._launch, self._listener, self._announce = launch, listener, announce
        self._workers: dict[int, Worker] = {}
        self._selector = selectors.DefaultSelector()
        self._life = os.pipe()
        self._wake = os.pipe()
        self._stopping: float | None = None
        self._failures = 0
        self._announced = False
        self._refusing = False
        self._due: list[float] = []
        """When workers that are missing may be started."""

    def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises PipelineError when the first workers do not start."""
        os.set_blocking(self._wake[1], False)
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda _number, _frame: None)
        self._selector.register(self._wake[0], selectors.EVENT_READ)
        preload()
        self._due = [0.0] * self._launch.settings.workers
        try:
            while self._workers or self._stopping is None:
                self._start_due()
                for key, _ in self._selector.select(self._patience()):
                    self._hear(int(key.fd))
                self._end_silent()
                self._close_port()
            refuse_new(self._listener)
            while left := accept_all(self._listener):
                for connection in left:
                    turn_away(connection)
            self._listener.close()
        finally:
            for worker in self._workers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

    def _patience(self) -> float:
        if self._stopping is not None:
            return 0.02
        waiting = [due - time.monotonic() for due in self._due]
        return max(0.0, min([0.5, *waiting]))

    def _start_due(self) -> None:
        now = time.monotonic()
        due, self._due = [at for at in self._due if at <= now], [at for at in self._due if at > now]
        if self._stopping is None:
            for _ in due:
                self._start()

    def _start(self) -> None:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                self._work(writing)
                status = 0
            except PipelineError as error:
                _send(writing, {"failed": str(error)})
            except BaseException:
                log.exception("worker %d failed", os.getpid())
            finally:
                os._exit(status)
        os.close(writing)
        os.set_blocking(reading, False)
        now = time.monotonic()
        self._workers[reading] = Worker(pid, reading, now, now)
        self._selector.register(reading, selectors.EVENT_READ)

    def _work(self, pipe: int) -> None:
        """In the worker."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: os._exit(0))  # until uvicorn takes them: nothing has begun
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._selector.close()
        for handle in (self._life[1], *self._wake, *self._workers):
            os.close(handle)

        def report(message: dict[str, Any]) -> None:
            _send(pipe, message)

        run(self._launch, self._listener, lambda info: report({"ready": info}), Supervision(report, self._life[0]))

    def _hear(self, handle: int) -> None:
        if handle == self._wake[0]:
            for number in os.read(handle, 1024):
                self._signalled(number)
            return
        worker = self._workers[handle]
        data = os.read(handle, 65_536)
        if not data:
            self._ended(worker)
            return
        worker.heard = time.monotonic()
        *lines, worker.rest = (worker.rest + data).split(b"\n")
        for line in lines:
            self._told(worker, json.loads(line))

    def _told(self, worker: Worker, message: dict[str, Any]) -> None:
        if "ready" in message:
            worker.ready, self._failures = True, 0
            log.info("worker %d answers after %.1f s", worker.pid, time.monotonic() - worker.started)
            if not self._announced and sum(w.ready for w in self._workers.values()) == self._launch.settings.workers:
                self._announced = True
                self._announce(message["ready"])
        elif "failed" in message and not self._announced:
            raise PipelineError(message["failed"])
        elif "failed" in message:
            log.error("worker %d did not start: %s", worker.pid, message["failed"])
        elif "reload" in message:
            self._signal([other for other in self._workers.values() if other is not worker], signal.SIGHUP)

    def _signalled(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            first = self._stopping is None
            self._stopping = self._stopping or time.monotonic()
            self._signal([*self._workers.values()], number)
            if first and number == signal.SIGTERM:
                log.info("stopping %d workers", len(self._workers))
        elif number == signal.SIGHUP:
            self._signal([*self._workers.values()], number)

    def _signal(self, workers: list[Worker], number: int) -> None:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, number)

    def _close_port(self) -> None:
        """While stopping: let no more connections in, and answer those that no worker took any more."""
        if self._stopping is None:
            return
        stopping = time.monotonic() - self._stopping
        if stopping > self._launch.drain_wait and not self._refusing:
            self._refusing = True
            refuse_new(self._listener)
        if stopping > self._launch.drain_wait + 2 * BACKLOG_SECONDS or not self._workers:
            for connection in accept_all(self._listener):
                turn_away(connection)

    def _ended(self, worker: Worker) -> None:
        _, status = os.waitpid(worker.pid, 0)
        self._selector.unregister(worker.pipe)
        os.close(worker.pipe)
        del self._workers[worker.pipe]
        if self._stopping is not None:
            return
        if not self._announced:
            raise PipelineError("a worker ended before it answered; the log above says why")
        lived = time.monotonic() - worker.started
        self._failures = self._failures + 1 if lived < QUICK_END_SECONDS or not worker.ready else 0
        delay = DELAYS[min(max(self._failures - 1, 0), len(DELAYS) - 1)]
        how = os.waitstatus_to_exitcode(status)
        log.error("worker %d ended (%d) after %.1f s; another starts in %.1f s", worker.pid, how, lived, delay)
        self._due.append(time.monotonic() + delay)

    def _end_silent(self) -> None:
        now = time.monotonic()
        limit = self._launch.drain_wait + BACKLOG_SECONDS + FIRST_BYTES_SECONDS + DRAIN_SECONDS + 1
        for worker in self._workers.values():
            silent = now - worker.heard > (SILENCE_SECONDS if worker.ready else START_SECONDS)
            late = self._stopping is not None and now - self._stopping > limit
            if silent or late:
                log.error("worker %d does not answer: it is killed", worker.pid)
                self._signal([worker], signal.SIGKILL)
                worker.heard = now


def _send(pipe: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the supervisor has gone, and the lifeline says so too
        os.write(pipe, json.dumps(message).encode() + b"\n")


def preload() -> None:
    """Import what workers need, so that forks have it; nothing is run, for threads do not survive a fork."""
    for module in ("server.app", "server.loading", "server.backends", "server.connections", "server.index.edge",
                   "vlp.backdoor.guard", "vlp.bundle", "vlp.distributed", "vlp.embed", "uvicorn"):  # fmt: skip
        importlib.import_module(module)
