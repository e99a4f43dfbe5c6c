"""Images that hang or kill their decoder: what is remembered of them, and what they may cost a run."""

from collections.abc import Mapping
from typing import Final

from nsnet.errors import DecoderCrashError, ImageTimeoutError

KINDS: Final = (DecoderCrashError.__name__, ImageTimeoutError.__name__)
"""Error classes of what is remembered."""
BAD_SHARE: Final = 0.25
"""Second tries that fail may take this share of the time that good images took."""
SECONDS_PER_CPU: Final = 10.0
"""Or so many seconds for each CPU of the cluster, and one whole try at least."""

Remembered = Mapping[str, tuple[str, str]]
"""Content and transform (`key`) -> error class and message."""


def key(content_hash: str, transform: str) -> str:
    """What decides whether decoding ends as it did before."""
    return f"{content_hash} {transform}"


class Budget:
    """What second tries may cost a run, in seconds of computing. One for a run; its decoding processes ask it."""

    def __init__(self, cpus: float, max_seconds: float) -> None:
        self._least = max(max_seconds, SECONDS_PER_CPU * cpus)
        self.good = self.bad = self._leased = 0.0

    def lease(self, seconds: float) -> bool | None:
        """Whether an image may take so long; None: ask again, since others are being tried with what is left."""
        allowed = max(self._least, BAD_SHARE * self.good)
        if self.bad + seconds > allowed + 1e-6 and self.bad > 0:
            return False
        if self._leased > 0 and self.bad + self._leased + seconds > allowed + 1e-6:
            return None
        self._leased += seconds
        return True

    def settle(self, leased: float, good: float, bad: float) -> None:
        """Give a lease back, and tell what was spent since the last time on good and on bad images."""
        self._leased = max(0.0, self._leased - leased)
        self.good += good
        self.bad += bad
