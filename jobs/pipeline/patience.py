"""How long a decoding process waits for an image.

Every image gets a short first try, within which nearly all honest ones are done. It grows with the time that others
take and with the size of the file: a large photograph is a large file, and poison mostly a small one. What is not done
by then is tried once more, after the others of its block, with the full limit (`--max-seconds`), as far as the run's
budget for slow images goes (`poison.Budget`). What failed is remembered by its content, so that the same bytes cost
nothing again.
"""

from collections import deque
from statistics import median
from typing import Final, Protocol

from jobs.pipeline.decoding import GuardedDecoder
from jobs.pipeline.poison import Remembered, key
from nsnet import errors
from nsnet.errors import DecoderCrashError, ImageBudgetError, ImageError, ImageTimeoutError
from nsnet.preparation import Prepared

FIRST_SECONDS: Final = 0.3
"""Of computing, for the first try of an image, before it is known what others take."""
MIN_FIRST_SECONDS: Final = 0.1
"""And later at least so long,"""
FIRST_FACTOR: Final = 10.0
"""and so many times what the others take (the median): 5 % of poison then cost half of what the others cost."""
FIRST_SECONDS_PER_BYTE: Final = 0.2e-6
"""In both cases so many more for each byte of its file."""
MIN_SEEN: Final = 32
MAX_SEEN: Final = 512
"""Images after which it is known what others take, and how many of the last of them count."""
MAX_REMEMBERED: Final = 10_000
"""Contents that a process remembers."""


class Lender(Protocol):
    """Where a decoding process asks for its run's budget."""

    def lease(self, seconds: float) -> float:
        """Seconds of computing that a slow image may take, at most as many as wanted; 0: none are left."""

    def settle(self, leased: float, good: float, slow: float) -> None:
        """As `Budget.settle`."""


class Patience:
    """One process's tries of the images of a run."""

    def __init__(self, decoder: GuardedDecoder, lender: Lender) -> None:
        self._decoder, self._lender = decoder, lender
        self._failed: dict[str, tuple[str, str]] = {}
        self.remembered: Remembered = {}
        """What failed in earlier runs."""
        self._seen: deque[float] = deque(maxlen=MAX_SEEN)
        self._good = 0.0

    def first(self, image: bytes, content_hash: str, transform: str, seed: int) -> Prepared | None:
        """The first try; None: it takes longer, try it `again` once the others are done. Raises an `ImageError`."""
        self._refuse(key(content_hash, transform))
        full = self._decoder.config.limits.max_seconds
        limit = min(full, self._short() + FIRST_SECONDS_PER_BYTE * len(image))
        try:
            done = self._decoder.prepare(image, transform, seed, limit)
        except ImageError as error:
            if isinstance(error, ImageTimeoutError) and limit < full:
                return None
            self._remember(key(content_hash, transform), error)
            raise
        self._good += self._decoder.computed
        self._seen.append(self._decoder.computed)
        return done

    def again(self, image: bytes, content_hash: str, transform: str, seed: int) -> Prepared:
        """The second and last try, as far as the run's budget goes. Raises an `ImageError`."""
        name = key(content_hash, transform)
        self._refuse(name)  # the same bytes may stand twice in a block
        full = self._decoder.config.limits.max_seconds
        self.settle()
        leased = self._lender.lease(full)
        try:
            if not leased:
                raise ImageTimeoutError
            done = self._decoder.prepare(image, transform, seed, leased)
        except ImageError as error:
            if isinstance(error, ImageTimeoutError) and leased < full:
                raise ImageBudgetError(
                    "decoding it takes long, and the run's budget for slow images is used up: the next run tries again"
                ) from error
            self._remember(name, error)
            raise
        finally:
            self._lender.settle(leased, 0.0, self._decoder.computed if leased else 0.0)
        self._seen.append(self._decoder.computed)
        return done

    def settle(self) -> None:
        """Tell the run what was spent on good images since the last time."""
        if self._good:
            self._lender.settle(0.0, self._good, 0.0)
            self._good = 0.0

    def _short(self) -> float:
        if len(self._seen) < MIN_SEEN:
            return FIRST_SECONDS
        return max(MIN_FIRST_SECONDS, FIRST_FACTOR * median(self._seen))

    def _remember(self, name: str, error: ImageError) -> None:
        if not isinstance(error, ImageTimeoutError | DecoderCrashError):
            return
        if len(self._failed) >= MAX_REMEMBERED:
            del self._failed[next(iter(self._failed))]
        self._failed[name] = type(error).__name__, f"{error} (the same bytes were tried before)"

    def _refuse(self, name: str) -> None:
        """Raise the error that these bytes ended with before."""
        if found := self._failed.get(name) or self.remembered.get(name):
            raise getattr(errors, found[0])(found[1])
