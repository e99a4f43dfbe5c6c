"""How long a decoding process waits for an image.

Every image gets a short first try, long enough for nearly all honest ones. What is not done by then is tried once more,
after the others of its block, with the full limit (`--max-seconds`), as long as the run's budget lasts
(`poison.Budget`). What failed is remembered by its content, so that the same bytes cost nothing again.
"""

from typing import Final, Protocol

from jobs.decoding import GuardedDecoder
from jobs.poison import Remembered, key
from nsnet import errors
from nsnet.errors import DecoderCrashError, ImageBudgetError, ImageError, ImageTimeoutError
from nsnet.preparation import Prepared

FIRST_SECONDS: Final = 0.5
"""Of computing, for the first try of an image."""
FIRST_SECONDS_PER_BYTE: Final = 0.5e-6
"""And so many more for each byte of its file: a large photograph is a large file, poison mostly a small one."""
MAX_REMEMBERED: Final = 10_000
"""Contents that a process remembers."""


class Lender(Protocol):
    """Where a decoding process asks for its run's budget."""

    def lease(self, seconds: float) -> bool:
        """Wait for the budget's answer."""

    def settle(self, leased: float, good: float, bad: float) -> None:
        """As `Budget.settle`."""


class Patience:
    """One process's tries of the images of a run."""

    def __init__(self, decoder: GuardedDecoder, lender: Lender) -> None:
        self._decoder, self._lender = decoder, lender
        self._failed: dict[str, tuple[str, str]] = {}
        self.remembered: Remembered = {}
        """What failed in earlier runs."""
        self._good = self._bad = 0.0

    def first(self, image: bytes, content_hash: str, transform: str, seed: int) -> Prepared | None:
        """The first try; None: it takes longer, try it `again` once the others are done. Raises an `ImageError`."""
        self._refuse(key(content_hash, transform))
        full = self._decoder.config.limits.max_seconds
        limit = min(full, FIRST_SECONDS + FIRST_SECONDS_PER_BYTE * len(image))
        try:
            return self._try(image, content_hash, transform, seed, limit)
        except ImageTimeoutError as error:
            if limit < full:
                return None
            self._fail(key(content_hash, transform), error)
            raise

    def again(self, image: bytes, content_hash: str, transform: str, seed: int) -> Prepared:
        """The second and last try, if the run's budget allows one. Raises an `ImageError`."""
        name = key(content_hash, transform)
        self._refuse(name)  # the same bytes may stand twice in a block
        full = self._decoder.config.limits.max_seconds
        self.settle()
        if not self._lender.lease(full):
            raise ImageBudgetError(
                "decoding takes longer than a short try, and the run's budget for slow images is used up: "
                "run again with --retry-failed"
            )
        try:
            return self._try(image, content_hash, transform, seed, full)
        except ImageTimeoutError as error:
            self._fail(name, error)
            raise
        finally:
            self.settle(full)

    def settle(self, leased: float = 0.0) -> None:
        """Tell the run what was spent since the last time."""
        if leased or self._good or self._bad:
            self._lender.settle(leased, self._good, self._bad)
            self._good = self._bad = 0.0

    def _try(self, image: bytes, content_hash: str, transform: str, seed: int, seconds: float) -> Prepared:
        try:
            done = self._decoder.prepare(image, transform, seed, seconds)
        except DecoderCrashError as error:
            self._fail(key(content_hash, transform), error)
            raise
        self._good += self._decoder.computed
        return done

    def _fail(self, name: str, error: ImageError) -> None:
        self._bad += self._decoder.computed
        if len(self._failed) >= MAX_REMEMBERED:
            del self._failed[next(iter(self._failed))]
        self._failed[name] = type(error).__name__, f"{error} (the same bytes were tried before)"

    def _refuse(self, name: str) -> None:
        """Raise the error that these bytes ended with before."""
        if found := self._failed.get(name) or self.remembered.get(name):
            raise getattr(errors, found[0])(found[1])
