"""Images that hang or kill their decoder: keys to remember them by, and a run's time budget for them."""

import time
from collections.abc import Mapping
from typing import Final

from jobs.isolation.guard import WALL_FACTOR
from nsnet.errors import DecoderCrashError, ImageTimeoutError

KINDS: Final = (DecoderCrashError.__name__, ImageTimeoutError.__name__)
"""Error classes that are remembered."""
SLOW_SHARE: Final = 0.25
"""Budget of second tries, as a share of the time that first tries took."""
SECONDS_PER_CPU: Final = 8.0
"""Smallest budget per CPU of the cluster; it covers one full try at least."""
MIN_LEASE_SECONDS: Final = 1.0
"""Shortest lease that is granted, unless less was requested."""

Remembered = Mapping[str, tuple[str, str]]
"""Content and transform (`key`) -> error class and message."""


def key(content_hash: str, transform: str) -> str:
    """Key of a decoding: the same key gives the same result."""
    return f"{content_hash} {transform}"


class Budget:
    """A run's budget for second tries of slow images, in seconds of computing, granted to decoding processes as leases.

    Successful tries count as well: an attacker can also send a thousand slow but valid images.
    """

    def __init__(self, cpus: float, max_seconds: float) -> None:
        self._least = max(max_seconds, SECONDS_PER_CPU * cpus)
        self._at_once = max(1.0, cpus)
        self._leased: list[tuple[float, float]] = []
        """Leased seconds, and the monotonic time after which the worker counts as dead."""
        self.good = self.slow = 0.0

    def lease(self, seconds: float) -> float | None:
        """Seconds granted to an image, at most `seconds`; 0: the budget is spent; None: ask again later, since open
        leases may return unused seconds.

        As many tries as there are CPUs may lease the same seconds: waiting for each other would cost more than the
        possible overspending.
        """
        left = max(self._least, SLOW_SHARE * self.good) - self.slow
        if left < min(seconds, MIN_LEASE_SECONDS):
            return 0.0
        granted = min(seconds, left)
        now = time.monotonic()
        self._leased = [(lent, end) for lent, end in self._leased if end > now]
        if len(self._leased) >= self._at_once and sum(lent for lent, _ in self._leased) + granted > left:
            return None
        self._leased.append((granted, now + WALL_FACTOR * granted))
        return granted

    def settle(self, leased: float, good: float, slow: float) -> None:
        """Return a lease, and add the seconds spent since the last call on first tries (`good`) and second (`slow`)."""
        for lease in self._leased:
            if lease[0] == leased:
                self._leased.remove(lease)
                break
        self.good += good
        self.slow += slow
