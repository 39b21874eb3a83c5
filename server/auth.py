"""Who asks and what they may: `Authorization: Bearer <key>`, compared as hashes in constant time, then their rate.

Router dependencies, never a test of the path, which proxies and clients can write in many ways.
"""

import hmac
from collections.abc import Awaitable, Callable

from starlette.requests import Request

from server.context import STATE
from server.errors import ApiError
from server.services import Services, services_of
from server.settings import SCOPES, Key, Scope, hash_key

ANONYMOUS = "anonymous"


def needs(scope: Scope) -> Callable[[Request], Awaitable[None]]:
    """Dependency that refuses requests without a key of that scope, and those that come too fast.

    Whatever needs more than `read` changes something, and is written to the audit log.
    """

    async def check(request: Request) -> None:
        services = services_of(request)
        state = STATE.get()
        if state is not None and scope != "read":
            state.audited = True
        key = identify(services.keys, request.headers.get("authorization", ""))
        if state is not None:
            state.client = key.name if key else ANONYMOUS
        if key is not None and SCOPES.index(key.scope) < SCOPES.index(scope):
            message = f"this key may {key.scope}, and this request needs a key that may {scope}"
            raise ApiError(403, message, "insufficient_scope")
        _slow_down(services, key, request)

    return check


def identify(keys: tuple[Key, ...], header: str) -> Key | None:
    """The key behind an Authorization header; None when the server has no keys. Raises ApiError 401."""
    if not keys:
        return None
    scheme, _, value = header.partition(" ")
    given = hash_key(value.strip()) if scheme.lower() == "bearer" else ""
    # every hash is compared, so that the time does not tell which one came close
    found = [key for key in keys if hmac.compare_digest(given, key.sha256)]
    if not found:
        raise ApiError(401, "a valid API key is needed: Authorization: Bearer <key>", "invalid_api_key")
    return found[0]


def _slow_down(services: Services, key: Key | None, request: Request) -> None:
    rate = (key.rate if key else None) or services.settings.rate
    if rate is None:
        return
    # two kinds of names that cannot meet: a key's name has no space
    name = key.name if key else f"address {request.client.host if request.client else ''}"
    wait = services.buckets.take(name, rate)
    if wait > 0:
        message = f"more than {rate.per_second:g} requests per second; wait {wait:.1f} s"
        raise ApiError(429, message, "rate_limited", retry_after=wait)
