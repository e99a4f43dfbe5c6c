"""Fetch images that a Parquet file of strangers names by path, as `datasets` does for images that it does not store.

Only files below the Parquet file's own folder, or below the source that contains it, are read: whoever can add a file
to a bucket must not make this job read anything else that it may. Containment is decided by names, and on disks also by
where links lead.
"""

import os
import posixpath
from contextlib import suppress
from pathlib import PureWindowsPath
from typing import Final

from jobs.dataset.endings import is_hidden
from jobs.storage import reading, uris
from jobs.storage.reading import Fetched
from jobs.storage.redaction import without_secrets
from jobs.storage.uris import Uri
from nsnet.errors import FetchError, ObjectMissingError, UsageError

MAX_PATH_BYTES: Final = 1024
"""Longest path, S3's limit for keys."""


def fetch_external(path: str, table: str, source: str | None, max_bytes: int) -> Fetched:
    """Fetch the image that a row of a Parquet file names, at most `max_bytes` + 1 bytes.

    `path`: relative to the folder of the file `table`, or, if there is no such file, to the source. Raises a
    `FetchError`, without reading anything, if it leads elsewhere.
    """
    relative = _relative(path)
    *first, last = _folders(table, source)
    for folder in first:
        with suppress(ObjectMissingError):
            return reading.fetch(_below(folder, relative), 0, max_bytes + 1)
    return reading.fetch(_below(last, relative), 0, max_bytes + 1)


def _folders(table: str, source: str | None) -> list[str]:
    """The folders that paths in a Parquet file may be relative to."""
    own = table.rpartition("/")[0]
    return [own] if source is None or not own.startswith(f"{source}/") else [own, source]


def _relative(path: str) -> str:
    """The path without `.`; raises `FetchError` unless it can only lead below a folder."""
    if len(path.encode("utf-8", "replace")) > MAX_PATH_BYTES:
        raise FetchError(f"its path has more than {MAX_PATH_BYTES:,} bytes")
    reason = None
    if "://" in path:
        reason = "is an address"
    elif path.startswith("/") or PureWindowsPath(path).anchor:
        reason = "is absolute"
    elif ".." in path.split("/"):
        reason = "leads upwards"
    elif not path.strip("./"):
        reason = "names no file"
    elif is_hidden(path):
        reason = "is hidden"
    if reason is not None:
        raise _refused(path, reason)
    return posixpath.normpath(path)


def _below(folder: str, relative: str) -> str:
    """The address of a file; raises `FetchError` if a link leads out of the folder."""
    try:
        uri = Uri(f"{folder}/{relative}")
    except UsageError as error:
        raise FetchError(f"its path is not read: {error}") from error
    if not uris.is_local(uri):
        return uri
    real, root = os.path.realpath(uri), os.path.realpath(folder)
    if os.path.commonpath([real, root]) != root:
        raise _refused(relative, "is a link to a file elsewhere")
    return real


def _refused(path: str, reason: str) -> FetchError:
    name = without_secrets(path.encode("utf-8", "backslashreplace").decode())[:200]
    return FetchError(
        f"its path {name!r} {reason}: only files below the Parquet file's folder or the source are read; store the "
        "images in the Parquet file, or give paths relative to it"
    )
