"""Around every request: an id, a bound on how many run at once, one log line, and no traceback outside."""

import asyncio
import datetime
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.audit import AuditLog
from server.browsers import accepted_hosts, host_name, security_headers
from server.context import STATE, RequestState
from server.dialects import answer
from server.errors import ApiError
from server.guarding import headers
from server.model import overloaded
from server.services import Services

log = logging.getLogger("server.requests")

GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ALWAYS_ANSWERED = frozenset({"/healthz", "/health", "/livez", "/ping", "/readyz", "/readiness"})
PROBES = frozenset({*ALWAYS_ANSWERED, "/metrics"})
DRAIN_BYTES = 1_000_000
"""What is read of a refused request's body before and after the answer: closed at once, the connection would be reset,
and a client that is still sending would not see the answer."""
BEFORE_SECONDS = 0.02
"""A body that is here by then leaves the connection open for the next request."""
AFTER_SECONDS = 1.0
LARGE = 16_384
"""Bytes from which a body most likely holds pictures. Smaller ones cost little, and may ask for what is kept."""


@dataclass(slots=True)
class _Exchange:
    """One request on its way through."""

    scope: Scope
    send: Send
    state: RequestState
    began: float
    receive: Receive
    status: int = 0
    whole: bool = False
    """Whether all of the body has been read."""
    lingering: bool = False
    """Whether the answer goes out while the body is still on its way."""


class RequestContext:
    """ASGI middleware; counts the requests in progress."""

    def __init__(
        self,
        app: ASGIApp,
        services: Services,
        seeing: Sequence[BaseRoute],
        sharing: Callable[[ASGIApp], ASGIApp] | None = None,
    ) -> None:
        """`seeing`: routes whose large bodies hold pictures, refused unread when there is no room for any.

        `sharing`: tells pages of other origins what they may read, of refusals as of answers.
        """
        self._share = sharing or (lambda inner: inner)
        self._app = self._share(app)
        self._services = services
        self._seeing = [route for route in seeing if isinstance(route, Route) and "POST" in (route.methods or ())]
        self._most = services.settings.limits.requests
        self._hosts = accepted_hosts(services.settings)
        self._audit = AuditLog(services.settings.audit) if services.settings.audit else None
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head = Headers(scope=scope)
        given = head.get("x-request-id", "")
        state = RequestState(given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex)
        state.fetcher = self._services.fetcher
        STATE.set(state)
        exchange = _Exchange(scope, send, state, time.monotonic(), receive)

        async def receive_noted() -> Message:
            message = await receive()
            exchange.whole = exchange.whole or not message.get("more_body", False)
            return message

        async def send_marked(message: Message) -> None:
            await self._send(exchange, message)

        self._running += 1
        try:
            refusal = self._refusal(scope, head)
            if refusal is None:
                await self._app(scope, receive_noted, send_marked)
            else:
                await self._share(answer(refusal, scope["path"]))(scope, receive, send_marked)
        except Exception:  # the last line of defence: the client gets an id, the log the traceback
            log.exception("request %s failed", state.id)
            if exchange.status:
                raise  # part of an answer is out; the connection has to break
            failure = ApiError(500, f"internal error; the log has it under request id {state.id}", "internal_error")
            await self._share(answer(failure, scope["path"]))(scope, receive, send_marked)
        finally:
            self._running -= 1
            state.release()
            self._note(exchange)

    def _refusal(self, scope: Scope, head: Headers) -> ApiError | None:
        """Why a request is not looked at; None when it is."""
        if self._hosts is not None and host_name(head.get("host", "")) not in self._hosts:
            message = "this server does not answer to that Host; start it with --allow-host NAME to change that"
            return ApiError(400, message, "invalid_host")
        if self._running > self._most and scope["path"] not in ALWAYS_ANSWERED:
            return ApiError(429, "too many requests are in progress; try again", "overloaded", retry_after=1)
        seconds = self._excess(scope, head)
        return overloaded(seconds) if seconds > 0 else None

    def _excess(self, scope: Scope, head: Headers) -> float:
        """Seconds until a model would take the pictures of this request; 0 for one that has none, or has room.

        Looked at before anything else is: routing, reading, parsing and decoding what is refused afterwards would take
        time from those that are not.
        """
        declared = head.get("content-length", "")
        if scope["method"] != "POST" or (declared.isdecimal() and int(declared) < LARGE):
            return 0.0
        seconds = self._services.excess()
        route = next((each for each in self._seeing if each.path_regex.match(scope["path"])), None) if seconds else None
        if route is None:
            return 0.0
        scope["route"] = route
        return seconds

    async def _send(self, exchange: _Exchange, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(exchange, message)
        elif exchange.lingering and not message.get("more_body", False):
            await exchange.send({**message, "more_body": True})
            await _drain(exchange.receive, AFTER_SECONDS)
            message = {"type": "http.response.body"}
        await exchange.send(message)

    async def _begin(self, exchange: _Exchange, message: Message) -> None:
        """Everything about the head of an answer."""
        state = exchange.state
        exchange.status = message["status"]
        if state.audited and self._audit is not None:
            # before the answer: what was acknowledged has its line
            await asyncio.to_thread(self._audit.append, _entry(exchange))
        marked = MutableHeaders(scope=message)
        if exchange.status >= 400 and not exchange.whole and not await _drain(exchange.receive, BEFORE_SECONDS):
            exchange.lingering = True
            marked["Connection"] = "close"  # or the rest of its body would be read, for as long as it comes
        marked["X-Request-Id"] = state.id
        for name, value in security_headers(exchange.scope["path"]).items():
            marked.setdefault(name, value)
        marked.update(headers(state.verdicts))
        if self._services.draining:
            marked["Connection"] = "close"  # so that its client comes back to a server that stays

    def _note(self, exchange: _Exchange) -> None:
        """Metrics and the log line. Of the client's words only the method, which the parser knows, is in them."""
        scope, state, status = exchange.scope, exchange.state, exchange.status
        seconds = time.monotonic() - exchange.began
        route, method = _route(scope), scope["method"]
        metrics = self._services.metrics
        metrics.add("vlp_requests_total", route=route, method=method, status=str(status))
        metrics.observe("vlp_request_seconds", seconds, route=route)
        metrics.gauge("vlp_requests_running", self._running)
        if status >= 400:
            metrics.add("vlp_refusals_total", code=state.code or str(status))
        fields = {
            "request": state.id, "method": method, "route": route, "status": status,
            "ms": round(seconds * 1000, 1), "client": state.client, "model": state.model, "code": state.code or None,
        }  # fmt: skip
        level = logging.DEBUG if route in PROBES and status < 400 else logging.INFO
        log.log(
            level, "%s %s %d %.1f ms id=%s client=%s", method, route, status, seconds * 1000, state.id, state.client,
            extra={"fields": fields},
        )  # fmt: skip


async def _drain(receive: Receive, seconds: float) -> bool:
    """Read a little of an unwanted body: most clients look for the answer once they have sent it. True at its end."""

    async def read() -> bool:
        total = 0
        while total < DRAIN_BYTES:
            message = await receive()
            total += len(message.get("body", b""))
            if not message.get("more_body", False):
                return True
        return False

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        return False


def _entry(exchange: _Exchange) -> dict[str, object]:
    """A line of the audit log: who did what to what, and how it ended."""
    scope, state = exchange.scope, exchange.state
    now = datetime.datetime.now(datetime.timezone.utc)
    target = {str(key): str(value)[:200] for key, value in scope.get("path_params", {}).items()}
    return {
        "time": now.isoformat(timespec="milliseconds"), "client": state.client, "method": scope["method"],
        "route": _route(scope), "target": target, "status": exchange.status, "request": state.id,
    }  # fmt: skip


def _route(scope: Scope) -> str:
    """The route's pattern rather than the path, which a client could fill with anything."""
    return str(getattr(scope.get("route"), "path", "-"))
