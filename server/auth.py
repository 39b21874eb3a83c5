"""API keys: `Authorization: Bearer <key>`, compared as hashes in constant time.

A router dependency, never a test of the path, which proxies and clients can write in many ways.
"""

import hmac

from starlette.requests import Request

from server.errors import ApiError
from server.services import services_of
from server.settings import hash_key


async def require_key(request: Request) -> None:
    """Refuse a request without a valid key when keys are configured."""
    accepted = services_of(request).settings.key_hashes
    if not accepted:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    given = hash_key(key.strip()) if scheme.lower() == "bearer" else ""
    # every hash is compared, so that the time does not tell which one came close
    if not sum(hmac.compare_digest(given, known) for known in accepted):
        raise ApiError(401, "a valid API key is needed: Authorization: Bearer <key>", "invalid_api_key")
