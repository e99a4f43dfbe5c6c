"""Images that hang or kill their decoder: what is remembered of them, and what they may cost a run."""

import time
from collections.abc import Mapping
from typing import Final

from jobs.isolation.guard import WALL_FACTOR
from nsnet.errors import DecoderCrashError, ImageTimeoutError

KINDS: Final = (DecoderCrashError.__name__, ImageTimeoutError.__name__)
"""Error classes of what is remembered."""
SLOW_SHARE: Final = 0.25
"""Second tries of slow images may take this share of the time that the others took."""
SECONDS_PER_CPU: Final = 8.0
"""Or so many seconds for each CPU of the cluster, and one whole try at least."""
MIN_LEASE_SECONDS: Final = 1.0
"""Less is not worth a try."""

Remembered = Mapping[str, tuple[str, str]]
"""Content and transform (`key`) -> error class and message."""


def key(content_hash: str, transform: str) -> str:
    """What decides whether decoding ends as it did before."""
    return f"{content_hash} {transform}"


class Budget:
    """What second tries of slow images may cost a run, in seconds of computing; its decoding processes ask for leases.

    It does not matter how a try ends: what a stranger can send a thousand times may be a valid image, too.
    """

    def __init__(self, cpus: float, max_seconds: float) -> None:
        self._least = max(max_seconds, SECONDS_PER_CPU * cpus)
        self._at_once = max(1.0, cpus)
        self._leased: list[tuple[float, float]] = []
        """Seconds that are lent, and the time (monotonic) after which their worker is taken for dead."""
        self.good = self.slow = 0.0

    def lease(self, seconds: float) -> float | None:
        """Seconds that an image may take, at most so many; 0: none are left; None: ask again, since it depends on what
        others leave of their leases.

        As many tries as there are CPUs may have the same seconds lent to them: to wait for each other would cost more
        than what they may spend too much.
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
        """Give a lease back, and tell what was spent since the last time on good images, and on second tries."""
        for lease in self._leased:
            if lease[0] == leased:
                self._leased.remove(lease)
                break
        self.good += good
        self.slow += slow
