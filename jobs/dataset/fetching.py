"""Fetch the bytes of a manifest row's image: an object, a member of a tar, or a row of a Parquet file."""

import threading
from collections import OrderedDict
from typing import Any, Final, TypeAlias

from jobs.dataset.containers import Container, ContainerError, ContainerTooLargeError, ReaderEndedError
from jobs.dataset.external import fetch_external
from jobs.dataset.tables import find_columns
from jobs.storage import errors, listing, reading
from jobs.storage.reading import Fetched
from nsnet.errors import FetchError, ImageTooLargeError, SourceError

WINDOW: Final = 16
"""Stored images kept before the requested one: threads request neighbouring rows in no strict order."""
MAX_KEPT_BYTES: Final = 2**26
MAX_UNREADABLE: Final = 100
"""Maximum unreadable parts of Parquet files that are remembered."""
MAX_OPEN: Final = 2
"""Maximum Parquet files whose readers stay open for the next image."""

_Key: TypeAlias = tuple[str, str, str | None]
"""Address of a Parquet file, its version, and its image column if the row names one."""


def fetch(row: dict[str, Any], max_bytes: int, source: str | None = None) -> Fetched:
    """Fetch an image, at most `max_bytes` + 1 bytes, so that the caller detects an excess.

    `source`: URI of the source, below which a Parquet file may name images by path.
    Raises a `FetchError`, for example if the image was replaced since it was listed, or another `ImageError`.
    """
    if row.get("problem"):
        raise FetchError(row["problem"])
    container, position, size = row["container"], row["position"], row["size_bytes"]
    etag = row["etag"] if row["listed"] else None
    if container is None:
        # the length also determines the timeout; sizes in a user's manifest may be wrong
        expected_size = size if row["listed"] and size is not None else max_bytes
        return reading.fetch(row["uri"], 0, min(expected_size, max_bytes) + 1, etag)
    if container.lower().endswith(".tar"):
        return reading.fetch(container, position, min(size, max_bytes + 1), etag)
    key = (container, row["etag"].rpartition("-")[0], row.get("column"))
    path: str | None = None

    def read() -> tuple[bytes, int]:
        nonlocal path
        stored, retries = _read(key, position, max_bytes + 1)
        path = stored if isinstance(stored, str) else None
        return b"" if isinstance(stored, str) else stored, retries

    with _reading:  # one thread reads a row group while the others wait
        fetched = reading.with_retries(read, container)
    return fetched if path is None else fetch_external(path, container, source, max_bytes)


def _read(key: _Key, position: int, most: int) -> tuple[bytes | str, int]:
    """The image in a row of a Parquet file, or its path elsewhere, and the number of retries of its store."""
    known_error = next((error for (file, rows), error in _unreadable.items() if file == key and position in rows), None)
    if known_error is not None:
        raise _of_image(known_error)
    try:
        try:
            return _try(key, position, most)
        except ReaderEndedError:  # the machine may have killed or delayed the reader
            return _try(key, position, most)
    except SourceError as error:
        by_machine = isinstance(error, ReaderEndedError) and error.by_machine
        if isinstance(error, ContainerError) and error.rows is not None and not by_machine:
            _unreadable[key, error.rows] = error
            while len(_unreadable) > MAX_UNREADABLE:
                _unreadable.popitem(last=False)
        raise _of_image(error) from error


def _try(key: _Key, position: int, most: int) -> tuple[bytes | str, int]:
    try:
        stored = _open(key)
        return stored.image(position, most), stored.retries()
    except BaseException:  # the next request must not read the rest of this answer
        if key in _opened:
            _opened.pop(key).close()
        raise


def _of_image(error: SourceError) -> ImageTooLargeError | FetchError:
    """The image error for a container's error."""
    return (ImageTooLargeError if isinstance(error, ContainerTooLargeError) else FetchError)(str(error))


def close() -> None:
    """End all open readers."""
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
            image_column = find_columns(uri, self._container.describe(), named).image
            if image_column is None:
                raise SourceError(f"{uri} holds no images")
        except BaseException:
            self.close()
            raise
        self._column = image_column
        self._kept: OrderedDict[int, bytes | str | None] = OrderedDict()
        self._most = self._next = 0
        self._group = range(0)
        """Rows of the row group read last."""

    def image(self, position: int, most: int) -> bytes | str:
        """The image in a row, at most `most` bytes, or its path elsewhere; empty if the row is null."""
        if most != self._most:  # the kept images were truncated to the old limit
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
                error.rows = range(first, group.stop)  # later rows can only be read through this one
                raise
            self._next = first
        return self._kept[position] or b""

    def retries(self) -> int:
        """Retries of the store since the last call; the first of neighbouring rows counts those of all."""
        retries, self._retries = self._retries, 0
        return retries

    def close(self) -> None:
        """End the reader."""
        self._container.close()

    def _keep(self, position: int, content: bytes | str | None) -> None:
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
"""Unreadable rows of row groups: testing each row again could take hours."""


def _open(key: _Key) -> _Stored:
    if key not in _opened:
        _opened[key] = _Stored(*key)
        while len(_opened) > MAX_OPEN:
            _opened.popitem(last=False)[1].close()
    _opened.move_to_end(key)
    return _opened[key]
