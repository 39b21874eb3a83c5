"""Pictures given as URLs: off unless the server was started so, and then through the one safe fetcher.

What a client is told never says whether an inner address exists: refused and unreachable addresses read the same but
for spelling errors, which are about the request alone.
"""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor

from data_pipelines.errors import BadSample
from data_pipelines.fetch import FetchOptions, read_bytes
from server.errors import ApiError, bad_request

REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
AT_ONCE = 16
"""Fetches in progress; further ones wait for their turn, within the time of their request."""
SPELLING = frozenset({"bad_url", "bad_scheme", "bad_port"})
LARGE = frozenset({"too_big"})


def is_remote(value: str) -> bool:
    """Whether an input names a place instead of holding a picture."""
    return REMOTE.match(value) is not None


class Fetcher:
    """Fetches in threads of its own, so that slow hosts take none from others."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="vlp-fetch")

    async def picture(self, url: str, param: str) -> bytes | ApiError:
        """Bytes behind a URL, or why there are none."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, read_bytes, url, self._options)
        except BadSample as error:
            return _refused(error, param)

    def close(self) -> None:
        """Begin no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _refused(error: BadSample, param: str) -> ApiError:
    if error.reason in SPELLING:
        message = f"{param}: this URL is not fetched: http or https, a host name, port 80, 443 or above 1023"
        return bad_request(message, param, "url_not_allowed")
    if error.reason in LARGE:
        return bad_request(f"{param}: what is behind this URL is too large", param, "url_too_large")
    if error.reason.startswith("http_"):
        status = error.reason.removeprefix("http_")
        return bad_request(f"{param}: the host of this URL answered {status}", param, "url_unreachable")
    return bad_request(f"{param}: nothing could be fetched from this URL", param, "url_unreachable")
