"""Fetch the bytes of images, and wait out an outage of their store."""

import itertools
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from threading import Event
from typing import Any, Final, TypeAlias

from jobs.dataset import fetching
from jobs.pipeline.rows import RowDicts
from jobs.storage import probes, uris
from jobs.storage.reading import Fetched
from jobs.storage.uris import Uri
from nsnet.errors import FetchError, ImageError, ImageTooLargeError, ObjectChangedError, ObjectMissingError, OutageError

FETCH_THREADS: Final = 8
"""Objects that a process fetches in parallel."""
ROWS_AT_ONCE: Final = 32
"""Most images that are fetched before the first of them is decoded."""
BYTES_AT_ONCE: Final = 32 * 2**20
"""Bytes of images after which no further fetch begins."""
OUTAGE_POLL_SECONDS: Final = 5.0
OUTAGE_FAILURES: Final = 8
"""Outage: a store fails for this many images of those fetched at once and delivers none, even if it answers."""
FetchResult: TypeAlias = "tuple[Fetched | ImageError, int]"
"""Bytes or the error of an image, and its number of requests."""


class StoppedError(Exception):
    """Nobody needs the images any more."""


@dataclass(frozen=True, kw_only=True)
class Fetcher:
    """Fetches images. Raises `OutageError` when an outage of a store lasts longer than `outage_seconds`."""

    max_bytes: int
    """Largest file."""
    source: Uri | None
    """URI of the source. An image counts as missing only if the source exists."""
    outage_seconds: float
    stop: Event = field(default_factory=Event)
    """Set it to end a fetch in another thread with `StoppedError`."""

    def fetch(self, rows: RowDicts) -> list[FetchResult]:
        """Bytes or the error of the first rows, and their numbers of requests; retries while the store is the cause.

        Returns at most `ROWS_AT_ONCE` results, and fewer if their bytes exceed `BYTES_AT_ONCE`, whatever sizes a
        manifest claims.
        """
        end = time.monotonic() + self.outage_seconds
        fetched = self._fetch_all(rows[:ROWS_AT_ONCE], BYTES_AT_ONCE)
        rows = rows[: len(fetched)]
        requests = [result.requests for result in fetched]
        for repetition in itertools.count():
            retriable, is_outage = self._retriable(rows, fetched)
            if not retriable or (repetition and not is_outage):
                return list(zip(fetched, requests, strict=True))
            if is_outage:
                self._wait(rows[retriable[0]], fetched[retriable[0]], end)
            for i, result in zip(retriable, self._fetch_all([rows[i] for i in retriable]), strict=True):
                fetched[i] = result
                requests[i] += result.requests
        raise AssertionError("unreachable: the loop ends by return or raise")

    def _fetch_all(self, rows: RowDicts, most_bytes: float = math.inf) -> list[Fetched | ImageError]:
        """One attempt, which begins no further file once it holds more than `most_bytes`.

        Files of a disk are read one by one: threads would cost more CPU time than reading does.
        """
        parallel = 1 if all(uris.is_local(_place(row)) for row in rows) else FETCH_THREADS
        results: list[Fetched | ImageError] = []
        pending: deque[Future[Fetched | ImageError]] = deque()
        held = 0
        for row in rows:
            if held > most_bytes:
                break
            if parallel == 1:
                results.append(self._fetch(row))
            else:
                pending.append(_threads().submit(self._fetch, row))
                if len(pending) < parallel:
                    continue
                results.append(pending.popleft().result())
            held += len(results[-1].data) if isinstance(results[-1], Fetched) else 0
        return results + [future.result() for future in pending]

    def _fetch(self, row: dict[str, Any]) -> Fetched | ImageError:
        if self.stop.is_set():
            raise StoppedError
        known = row["size_bytes"]
        if known is not None and known > self.max_bytes:
            return ImageTooLargeError(f"{known:,} bytes, the limit is {self.max_bytes:,} (--max-bytes)")
        try:
            fetched = fetching.fetch(row, self.max_bytes, self.source)
        except ImageError as error:
            return error
        if len(fetched.data) > self.max_bytes:  # only the beginning was read, so its hash would be useless
            too_large = ImageTooLargeError(f"more than {self.max_bytes:,} bytes, the limit (--max-bytes)")
            too_large.requests = fetched.requests
            return too_large
        return fetched

    def _wait(self, row: dict[str, Any], result: Fetched | ImageError, end: float) -> None:
        """Wait until the store of a row answers, for one poll at least: an object may be missing due to an outage."""
        while time.monotonic() < end:
            if self.stop.wait(min(OUTAGE_POLL_SECONDS, self.outage_seconds)):
                raise StoppedError
            if probes.store_is_up(_place(row), self.source):
                return
        raise OutageError(
            f"the store of the images has not answered for {self.outage_seconds:g} s ({row['uri']}: {result}): run "
            "the same command again once it answers; finished images are kept"
        )

    def _retriable(self, rows: RowDicts, fetched: Sequence[Fetched | ImageError]) -> tuple[list[int], bool]:
        """Rows to fetch again, and whether their store has an outage: it does not answer, or it fails for many images
        and delivers none.
        """
        retriable = [i for i, result in enumerate(fetched) if isinstance(result, FetchError) and result.may_be_outage]
        stores = {i: uris.failure_domain(_place(rows[i])) for i in retriable}
        probed = {store: _place(rows[i]) for i, store in stores.items()}
        down = {store for store, uri in probed.items() if not probes.store_is_up(uri, self.source)}
        if down:
            return [i for i in retriable if stores[i] in down], True
        retriable = [i for i in retriable if not isinstance(fetched[i], ObjectMissingError)]
        delivers = any(isinstance(result, Fetched | ObjectChangedError) for result in fetched)
        return retriable, len(retriable) >= OUTAGE_FAILURES and not delivers


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(FETCH_THREADS)


def _place(row: dict[str, Any]) -> str:
    """The file that is read: the image's own, or the container that holds it."""
    place: str = row["container"] or row["uri"]
    return place
