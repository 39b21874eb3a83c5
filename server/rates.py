"""Token buckets, one per key or client address: none can take the whole server for itself."""

import time
from collections import OrderedDict
from collections.abc import Callable

from server.settings import Rate

MOST = 10_000
"""Buckets kept; the one unused longest goes first, so that inventing addresses costs no memory."""


class Buckets:
    """Belongs to one event loop."""

    def __init__(self, share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`share`: part of every rate that this process may grant."""
        self._share, self._clock = share, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, rate: Rate) -> float:
        """Take one token: 0, or the seconds until there is one."""
        per_second, burst = rate.per_second * self._share, max(1.0, rate.burst * self._share)
        now = self._clock()
        left, at = self._buckets.pop(name, (burst, now))
        left = min(burst, left + (now - at) * per_second)
        granted = left >= 1
        self._buckets[name] = (left - 1 if granted else left, now)
        if len(self._buckets) > MOST:
            self._buckets.popitem(last=False)
        return 0.0 if granted else (1 - left) / per_second
