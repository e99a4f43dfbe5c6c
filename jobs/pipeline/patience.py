"""Timeouts of a decoding process: a short first try, and a second try within the run's budget.

Nearly all honest images finish within the first try. Its limit grows with the time that other images take and with the
size of the file: a large photograph is a large file, while an image that hangs its decoder is mostly small. An image
that times out is tried once more after the others of its block, with the full limit (`--max-seconds`), as long as the
run's budget for slow images lasts (`poison.Budget`). Failures are remembered by content, so that the same bytes are not
decoded again.
"""

from bisect import bisect_left, insort
from collections import deque
from typing import Final, Protocol

from jobs.pipeline.decoding import GuardedDecoder
from jobs.pipeline.poison import Remembered, key
from nsnet import errors
from nsnet.errors import DecoderCrashError, ImageBudgetError, ImageError, ImageTimeoutError
from nsnet.preparation import Prepared

FIRST_SECONDS: Final = 0.3
"""Limit of computing time for a first try, until `MIN_SEEN` images have been decoded."""
MIN_FIRST_SECONDS: Final = 0.1
"""Smallest limit after that."""
FIRST_FACTOR: Final = 10.0
"""The limit after that, as a multiple of the median time: 5 % of hanging images then add half of the others' time."""
FIRST_SECONDS_PER_BYTE: Final = 0.2e-6
"""Added to either limit for each byte of the file."""
MIN_SEEN: Final = 32
"""Images that the median needs."""
MAX_SEEN: Final = 512
"""Latest images that the median covers."""
MAX_REMEMBERED: Final = 10_000
"""Failed contents that a process remembers."""


class Lender(Protocol):
    """Access of a decoding process to its run's budget."""

    def lease(self, seconds: float) -> float:
        """Seconds of computing granted to a slow image, at most `seconds`; 0: the budget is spent."""

    def settle(self, leased: float, good: float, slow: float) -> None:
        """As `Budget.settle`."""


class Patience:
    """Decodes the images of a run in one process, with first and second tries."""

    def __init__(self, decoder: GuardedDecoder, lender: Lender) -> None:
        self._decoder, self._lender = decoder, lender
        self._failed: dict[str, tuple[str, str]] = {}
        self.remembered: Remembered = {}
        """Failures of earlier runs."""
        self._seen: deque[float] = deque()
        self._ordered: list[float] = []
        """The same times in order: sorting them anew for each image would take a hundredth of a small one's time."""
        self._good_seconds = 0.0

    def close(self) -> None:
        """End the guarded child; the next image starts another."""
        self._decoder.close()

    def first(self, image: bytes, content_hash: str, transform: str, seed: int) -> Prepared | None:
        """Make the first try; None: it timed out, call `again` after the other images. Raises `ImageError`."""
        self._refuse(key(content_hash, transform))
        full = self._decoder.config.limits.max_seconds
        limit = min(full, self._first_seconds() + FIRST_SECONDS_PER_BYTE * len(image))
        try:
            prepared = self._decoder.prepare(image, transform, seed, limit)
        except ImageError as error:
            if isinstance(error, ImageTimeoutError) and limit < full:
                return None
            self._remember(key(content_hash, transform), error)
            raise
        self._good_seconds += self._decoder.computed
        self._see(self._decoder.computed)
        return prepared

    def again(self, image: bytes, content_hash: str, transform: str, seed: int) -> Prepared:
        """Make the second and last try, within the run's budget. Raises `ImageError`."""
        name = key(content_hash, transform)
        self._refuse(name)  # the same bytes may occur twice in a block
        full = self._decoder.config.limits.max_seconds
        self.settle()
        leased = self._lender.lease(full)
        try:
            if not leased:
                raise ImageTimeoutError
            prepared = self._decoder.prepare(image, transform, seed, leased)
        except ImageError as error:
            if isinstance(error, ImageTimeoutError) and leased < full:
                raise ImageBudgetError(
                    "decoding is slow and the run's budget for slow images is spent: the next run tries again"
                ) from error
            self._remember(name, error)
            raise
        finally:
            self._lender.settle(leased, 0.0, self._decoder.computed if leased else 0.0)
        self._see(self._decoder.computed)
        return prepared

    def settle(self) -> None:
        """Report the seconds spent on first tries since the last call to the run's budget."""
        if self._good_seconds:
            self._lender.settle(0.0, self._good_seconds, 0.0)
            self._good_seconds = 0.0

    def _see(self, seconds: float) -> None:
        if len(self._seen) == MAX_SEEN:
            del self._ordered[bisect_left(self._ordered, self._seen.popleft())]
        self._seen.append(seconds)
        insort(self._ordered, seconds)

    def _first_seconds(self) -> float:
        if len(self._seen) < MIN_SEEN:
            return FIRST_SECONDS
        return max(MIN_FIRST_SECONDS, FIRST_FACTOR * self._ordered[len(self._ordered) // 2])

    def _remember(self, name: str, error: ImageError) -> None:
        if not isinstance(error, ImageTimeoutError | DecoderCrashError):
            return
        if len(self._failed) >= MAX_REMEMBERED:
            del self._failed[next(iter(self._failed))]
        self._failed[name] = type(error).__name__, f"{error} (the same bytes were tried before)"

    def _refuse(self, name: str) -> None:
        """Raise the remembered error of these bytes, if any."""
        if failure := self._failed.get(name) or self.remembered.get(name):
            raise getattr(errors, failure[0])(failure[1])
