"""Clients of stores: fsspec for local disks and S3, and a pyarrow wrapper of the same client.

S3's endpoint and keys come from the usual AWS variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
"""

import os
import threading
import time
from typing import Any, Final, cast

import fsspec.asyn
import pyarrow.fs

from jobs.storage.redaction import holds_secrets, shown
from jobs.storage.uris import bucket_and_key, is_local
from nsnet.errors import UsageError

LISTING_THREADS: Final = 16
"""Folders or prefixes listed in parallel."""
CONNECT_SECONDS: Final = 10
READ_SECONDS: Final = 30
"""Maximum pause of a store within an answer."""
REFRESH_SECONDS: Final = 30.0
"""Shortest time between two reloads of credentials."""


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI, and the path in it."""
    if is_local(uri):
        return fsspec.filesystem("file"), uri
    _check_endpoint()
    # Listings are not cached: files of other processes must be visible.
    settings = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": 4 * LISTING_THREADS,
        "retries": {"mode": "standard", "max_attempts": 4},
    }
    return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=settings), uri.partition("://")[2]


def _check_endpoint() -> None:
    """Raise `UsageError` if S3's endpoint holds a user: S3 needs none, and clients quote the address in errors."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if holds_secrets(os.environ.get(name, "")):
            raise UsageError(
                f"{name} is {shown(os.environ[name])}: it must not contain a user or password (example: "
                "https://host:9000); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem of a URI, over the same client, and the path in it."""
    system, path = filesystem(uri)
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system)), path


def make_folder(path: str) -> None:
    """Create a local folder and its parents."""
    os.makedirs(path, exist_ok=True)


def list_page(uri: str, prefix: str, size: int, timeout: float | None = None, **following: Any) -> dict[str, Any]:
    """One page of S3's listing. fsspec's own walk loses keys with an empty part, such as `a//b`."""
    system, _ = filesystem(uri)
    return cast(
        dict[str, Any],
        system.call_s3(
            "list_objects_v2", Bucket=bucket_and_key(uri)[0], Prefix=prefix, MaxKeys=size, timeout=timeout, **following
        ),
    )


_refreshing: Final = threading.Lock()
_refreshed_at = float("-inf")


def refresh_credentials(uri: str) -> None:
    """Reload credentials from their source: they may expire during a long run."""
    global _refreshed_at
    with _refreshing:
        if not is_local(uri) and time.monotonic() - _refreshed_at > REFRESH_SECONDS:
            filesystem(uri)[0].connect(refresh=True)
            _refreshed_at = time.monotonic()
