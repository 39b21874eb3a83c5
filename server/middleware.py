"""Around every request: an id, a bound on how many run at once, one log line, and no traceback outside."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.context import STATE, RequestState
from server.dialects import answer
from server.errors import ApiError
from server.guarding import headers

log = logging.getLogger("server.requests")

GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ALWAYS_ANSWERED = frozenset({"/healthz", "/readyz"})


class RequestContext:
    """ASGI middleware; counts the requests in progress."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        """`most`: requests in progress, beyond which a new one is refused before its body is read."""
        self._app = app
        self._most = most
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0
        state = RequestState(request_id)
        STATE.set(state)

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marked = MutableHeaders(scope=message)
                marked["X-Request-Id"] = request_id
                marked["X-Content-Type-Options"] = "nosniff"
                marked.update(headers(state.verdicts))
            await send(message)

        began = time.monotonic()
        self._running += 1
        try:
            if self._running > self._most and scope["path"] not in ALWAYS_ANSWERED:
                refusal = ApiError(429, "too many requests are in progress; try again", "overloaded", retry_after=1)
                await answer(refusal, scope["path"])(scope, receive, send_marked)
            else:
                await self._app(scope, receive, send_marked)
        except Exception:  # the last line of defence: the client gets an id, the log the traceback
            log.exception("request %s failed", request_id)
            if status:
                raise  # part of an answer is out; the connection has to break
            failure = ApiError(500, f"internal error; the log has it under request id {request_id}", "internal_error")
            await answer(failure, scope["path"])(scope, receive, send_marked)
        finally:
            self._running -= 1
            state.release()
            seconds = time.monotonic() - began
            log.info("%s %s %d %.1f ms id=%s", scope["method"], _route(scope), status, seconds * 1000, request_id)


def _route(scope: Scope) -> str:
    """The route's pattern rather than the path, which a client could fill with anything."""
    return str(getattr(scope.get("route"), "path", "-"))
