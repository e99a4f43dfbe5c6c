"""Probe whether a store answers and whether an output can be written, before the work and during an outage."""

import os
from pathlib import Path
from typing import Final

from jobs.storage import errors
from jobs.storage.errors import Fault
from jobs.storage.filesystems import list_page, refresh_credentials
from jobs.storage.redaction import without_secrets
from jobs.storage.uris import bucket_and_key, failure_domain, is_local
from nsnet.errors import StorageError, UsageError

PROBE_TIMEOUT_SECONDS: Final = 10.0
"""Timeout for the first answer of a store, retries included."""


def reachable(uri: str) -> None:
    """Raise a one-line `StorageError` unless the bucket of a URI answers."""
    if is_local(uri):
        return
    bucket, prefix = bucket_and_key(uri)
    try:
        # List one object of this prefix: a bucket may be huge, and a policy may allow access to this prefix only.
        list_page(uri, prefix, 1, timeout=PROBE_TIMEOUT_SECONDS)
    except FileNotFoundError as error:
        raise StorageError(f"the bucket s3://{bucket} does not exist") from error
    except UsageError:
        raise
    except Exception as error:  # botocore, aiohttp and OS errors have no common base
        endpoint = without_secrets(os.environ.get("AWS_ENDPOINT_URL", "AWS"))
        raise StorageError(
            f"the bucket s3://{bucket} at {endpoint} cannot be reached: {errors.reason(error)}"
        ) from error


def store_is_up(uri: str, source: str | None) -> bool:
    """Whether the store of an object answers, with any result for the object itself.

    A disk is up if the source exists and is not empty: an unmounted disk may leave an empty folder.
    """
    try:
        if not is_local(uri):
            list_page(uri, bucket_and_key(uri)[1], 1, timeout=PROBE_TIMEOUT_SECONDS)
        elif source and os.path.isdir(source):
            with os.scandir(source) as items:
                return next(items, None) is not None
        elif source and is_local(source):
            os.stat(source)
    except Exception as error:  # botocore, aiohttp and OS errors have no common base; `errors.kind` classifies them
        fault = errors.kind(error)
        if fault is Fault.CREDENTIALS:
            refresh_credentials(uri)
        if fault is Fault.MISSING:  # a manifest may name a bucket that was removed; the source's own bucket must exist
            return not is_local(uri) and source is not None and failure_domain(uri) != failure_domain(source)
        return fault not in (Fault.TRANSIENT, Fault.CREDENTIALS)
    return True


def check_output(uri: str) -> None:
    """Raise `StorageError` or `UsageError` if the output cannot be written, before any work is done."""
    reachable(uri)
    if is_local(uri):
        try:
            existing = next(path for path in (Path(uri), *Path(uri).parents) if path.exists())
        except OSError as error:  # a name that is too long, a link to itself
            raise UsageError(f"{uri} cannot be a folder: {error.strerror}") from error
        if not existing.is_dir():
            raise UsageError(f"{uri} cannot be a folder: {existing} is a file")
        if os.statvfs(existing).f_flag & os.ST_RDONLY:
            raise StorageError(f"{uri} cannot be written: {existing} is mounted read-only; choose another --out")
        if not os.access(existing, os.W_OK):
            raise StorageError(f"{uri} cannot be written: {existing} is not writable; choose another --out")
