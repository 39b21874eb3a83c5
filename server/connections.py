"""Connections that cannot be held for nothing: heads that never end, answers that nobody reads, too many at once.

uvicorn bounds none of these when httptools parses: a client could send headers for ever, or one byte of them a minute,
or queue up a hundred thousand requests on one connection without reading an answer.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.settings import Limits

TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\ncontent-length: 30\r\n"
    b"connection: close\r\n\r\nthe request's head is too long"
)


MOST_PIPELINED = 16
"""Requests that may wait on a connection for the answer to one before; no client of today sends a second."""


class Connection(HttpToolsProtocol):
    """One connection."""

    limits: ClassVar[Limits] = Limits()

    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True

    @property
    def asking(self) -> bool:
        """Whether the head of a request has not come yet, or not to its end; after an answer, once the next begins."""
        return self._in_head

    def connection_made(self, transport: Any) -> None:
        """Closed at once when there are too many already."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._timer = self.loop.call_later(self.limits.read_seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives it."""
        self._cancel("_timer")
        self._cancel("_stalled")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The head may have so many bytes and no more."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self.limits.header_bytes and not self.transport.is_closing():
            self.transport.write(TOO_LONG)
            self.transport.close()

    def on_message_begin(self) -> None:
        """A head begins; with keep-alive not the first one."""
        self._in_head, self._head_bytes = True, self._head_bytes if self._timer else 0
        if self._timer is None:
            self._timer = self.loop.call_later(self.limits.read_seconds, self._give_up)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is whole; the time for the body is the routes' to watch."""
        self._in_head = False
        self._cancel("_timer")
        if len(self.pipeline) >= MOST_PIPELINED:
            self.transport.abort()
            self.pipeline.clear()
        if not self.transport.is_closing():
            super().on_headers_complete()

    def pause_writing(self) -> None:
        """The client does not read: it may take a while, not for ever."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.limits.read_seconds, self._give_up)

    def resume_writing(self) -> None:
        """It reads again."""
        self._cancel("_stalled")
        super().resume_writing()

    def _give_up(self) -> None:
        if self._in_head and self.flow.read_paused:  # the rest of the head may be there and not yet looked at
            self._timer = self.loop.call_later(self.limits.read_seconds, self._give_up)
        else:
            self.transport.abort()  # closing would wait until what is written has been read

    def _cancel(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


def connection_class(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's protocol with these limits; uvicorn makes its connections itself, from a class."""
    return type("Connection", (Connection,), {"limits": limits})
