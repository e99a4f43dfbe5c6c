"""The bytes of a manifest row's image: of an object, a member of a tar, or a row of a Parquet file."""

import threading
from collections import OrderedDict
from typing import Any, Final, TypeAlias

from jobs.dataset.containers import Container, ContainerError, ContainerTooLargeError, ReaderEndedError
from jobs.dataset.tables import find_columns
from jobs.storage import errors, listing, reading
from jobs.storage.reading import Fetched
from nsnet.errors import FetchError, ImageTooLargeError, SourceError

WINDOW: Final = 16
"""Stored images before the one that is asked for that are kept: threads ask for neighbours in no strict order."""
MAX_KEPT_BYTES: Final = 2**26
MAX_UNREADABLE: Final = 100
"""Parts of Parquet files that are known to be unreadable."""
MAX_OPEN: Final = 2
"""Parquet files whose readers are kept for the next image."""

_Key: TypeAlias = tuple[str, str, str | None]
"""Address of a Parquet file, its version, and its column of images where that has been named."""


def fetch(row: dict[str, Any], max_bytes: int) -> Fetched:
    """At most one byte more than allowed, so that the caller sees the excess.

    Raises a `FetchError`, as where an image was replaced since it was listed, or another `ImageError`.
    """
    if row.get("problem"):
        raise FetchError(row["problem"])
    container, position, size = row["container"], row["position"], row["size_bytes"]
    etag = row["etag"] if row["listed"] else None
    if container is None:
        # how much is asked for also says how long it may take; a manifest's sizes may be wrong
        known = size if row["listed"] and size is not None else max_bytes
        return reading.fetch(row["uri"], 0, min(known, max_bytes) + 1, etag)
    if container.lower().endswith(".tar"):
        return reading.fetch(container, position, min(size, max_bytes + 1), etag)
    key = (container, row["etag"].rpartition("-")[0], row.get("column"))
    with _reading:  # one thread reads a row group, the others wait for it
        return reading.with_retries(lambda: _read(key, position, max_bytes + 1), container)


def _read(key: _Key, position: int, most: int) -> tuple[bytes, int]:
    """The image of a row of a Parquet file, and how often its store was asked again."""
    known = next((error for (file, rows), error in _unreadable.items() if file == key and position in rows), None)
    if known is not None:
        raise _of_image(known)
    try:
        try:
            return _try(key, position, most)
        except ReaderEndedError:  # the machine may have ended it, or kept it waiting
            return _try(key, position, most)
    except SourceError as error:
        by_machine = isinstance(error, ReaderEndedError) and error.by_machine
        if isinstance(error, ContainerError) and error.rows is not None and not by_machine:
            _unreadable[key, error.rows] = error
            while len(_unreadable) > MAX_UNREADABLE:
                _unreadable.popitem(last=False)
        raise _of_image(error) from error


def _try(key: _Key, position: int, most: int) -> tuple[bytes, int]:
    try:
        stored = _open(key)
        return stored.image(position, most), stored.retries()
    except BaseException:  # the rest of an answer must not be taken for the next one
        if key in _opened:
            _opened.pop(key).close()
        raise


def _of_image(error: SourceError) -> ImageTooLargeError | FetchError:
    """The error of an image that a container's error costs."""
    return (ImageTooLargeError if isinstance(error, ContainerTooLargeError) else FetchError)(str(error))


def close() -> None:
    """End the readers that are kept."""
    with _reading:
        _unreadable.clear()
        while _opened:
            _opened.popitem()[1].close()


class _Stored:
    """The images of one version of a Parquet file."""

    def __init__(self, uri: str, version: str, column: str | None) -> None:
        self._uri, self._version = uri, version
        self._retries = 0
        entry = listing.describe(uri)
        if entry.etag != version:
            raise errors.ChangedError(f"{uri} was replaced since it was listed")
        self._container = Container(uri, "parquet", entry.size_bytes, self._read)
        self._container.__enter__()
        try:
            named = {} if column is None else {"image": column}
            found = find_columns(uri, self._container.describe(), named).image
            if found is None:
                raise SourceError(f"{uri} holds no images")
        except BaseException:
            self.close()
            raise
        self._column = found
        self._kept: OrderedDict[int, bytes | None] = OrderedDict()
        self._most = self._next = 0
        self._group = range(0)
        """Rows of the row group that was read last."""

    def image(self, position: int, most: int) -> bytes:
        """The image of a row, at most so many bytes; nothing where the row is null."""
        if most != self._most:  # what is kept was cut there
            self._most = most
            self._kept.clear()
        if position not in self._kept:
            group = self._group
            if position not in group:
                group = self._group = self._container.group(position)
            first = position if position < self._next else max(self._next, position - WINDOW, group.start)
            try:
                for content in self._container.images(self._column, first, position, most):
                    self._keep(first, content)
                    first += 1
            except ContainerError as error:
                error.rows = range(first, group.stop)  # those behind it are read through this one
                raise
            self._next = first
        return self._kept[position] or b""

    def retries(self) -> int:
        """How often the store was asked again since the last time: of neighbours the first asks for all."""
        retries, self._retries = self._retries, 0
        return retries

    def close(self) -> None:
        """End its reader."""
        self._container.close()

    def _keep(self, position: int, content: bytes | None) -> None:
        self._kept[position] = content
        while len(self._kept) > 1 and (
            len(self._kept) > WINDOW or sum(len(one or b"") for one in self._kept.values()) > MAX_KEPT_BYTES
        ):
            self._kept.popitem(last=False)

    def _read(self, offset: int, length: int) -> bytes:
        fetched = reading.fetch(self._uri, offset, length, self._version)
        self._retries += fetched.requests - 1
        return fetched.data


_reading: Final = threading.Lock()
_opened: Final[OrderedDict[_Key, _Stored]] = OrderedDict()
_unreadable: Final[OrderedDict[tuple[_Key, range], ContainerError]] = OrderedDict()
"""Rows of a row group that cannot be read: to find that out for each of them anew could take all night."""


def _open(key: _Key) -> _Stored:
    if key not in _opened:
        _opened[key] = _Stored(*key)
        while len(_opened) > MAX_OPEN:
            _opened.popitem(last=False)[1].close()
    _opened.move_to_end(key)
    return _opened[key]
