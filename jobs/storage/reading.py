"""Read objects with retries: bytes, ranges, JSON of this program, files for pyarrow, copies for other libraries."""

import asyncio
import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

import fsspec
import fsspec.asyn
import pyarrow as pa
import pyarrow.fs
from botocore.exceptions import ClientError

from jobs.storage import errors
from jobs.storage.errors import Fault
from jobs.storage.filesystems import READ_SECONDS, filesystem, refresh_credentials
from jobs.storage.listing import describe_local, etag_of
from jobs.storage.uris import bucket_and_key, is_local
from nsnet.errors import FetchError, ImageError, StorageError, UsageError
from nsnet.files import open_regular

MIN_BYTES_PER_SECOND: Final = 256 * 1024
"""A body that arrives more slowly than this, after `READ_SECONDS`, is requested again."""
MAX_JSON_BYTES: Final = 64 * 2**20
"""Largest JSON file of this program: one that names the files of a billion rows."""
MAX_JSON_DEPTH: Final = 32
RESTORE: Final = "restore it from a copy, or remove it if nothing needs it"
"""Default remedy for a damaged file."""


def open_file(uri: str) -> pa.NativeFile:
    """Open a file for pyarrow. pyarrow's own fsspec handler reports throttling as FileNotFoundError."""
    system, path = filesystem(uri)
    return pa.PythonFile(open_regular(path) if is_local(uri) else system.open(path, "rb"), mode="r")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Bytes of an object."""

    data: bytes
    requests: int
    """Number of requests, retries included."""


def fetch(uri: str, start: int = 0, length: int | None = None, etag: str | None = None) -> Fetched:
    """Fetch an object or a range of it; transient errors are retried with back-off.

    `etag`: the version required. Raises a `FetchError`.
    """
    return with_retries(lambda: _read(uri, start, length, etag), uri)


def with_retries(read: Callable[[], tuple[bytes, int]], uri: str) -> Fetched:
    """Call `read`, which returns bytes of a URI and the client's own number of retries; retry transient errors with
    back-off. Raises a `FetchError`; passes on an `ImageError` or `UsageError`.
    """
    requests = 0
    while True:
        requests += 1
        try:
            data, retries = read()
            return Fetched(data=data, requests=requests + retries)
        except (ImageError, UsageError):
            raise
        except Exception as error:  # botocore, aiohttp and OS errors have no common base; `errors.kind` classifies them
            fault = errors.kind(error)
            requests += _retries(getattr(error, "response", None))
            if fault is Fault.CREDENTIALS:
                refresh_credentials(uri)
            elif fault is not Fault.TRANSIENT:
                raise errors.fetch_error(error, requests) from error
            if requests >= errors.ATTEMPTS:
                raise errors.fetch_error(error, requests) from error
        time.sleep(errors.wait_seconds(requests))


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """Read an object or a range of it, with retries. Raises what the store raises."""
    try:
        return fetch(uri, start, length).data
    except FetchError as error:
        cause = error.__cause__
        assert isinstance(cause, Exception)
        if errors.kind(cause) is Fault.MISSING:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
        raise cause from None


def reader(uri: str) -> Callable[[int, int], bytes]:
    """A function (offset, length) -> bytes of an object, which raises what `read_bytes` raises."""
    return lambda offset, length: read_bytes(uri, offset, length)


def _read(uri: str, start: int, length: int | None, etag: str | None) -> tuple[bytes, int]:
    """One attempt: the bytes, and the number of botocore's own retries."""
    if length == 0:
        return b"", 0  # S3 has no empty range and would send everything
    if not is_local(uri):
        system, _ = filesystem(uri)
        return cast(tuple[bytes, int], fsspec.asyn.sync(system.loop, _get_object, system, uri, start, length, etag))
    with open_regular(uri) as file:
        if etag and describe_local(uri, os.fstat(file.fileno())).etag != etag:
            raise errors.ChangedError("it was changed since it was listed")
        file.seek(start)
        bytes_left = max(0, os.fstat(file.fileno()).st_size - start)  # of a growing file, only the bytes present now
        # `read` allocates all that it is asked for
        return file.read(bytes_left if length is None else min(length, bytes_left)), 0


async def _get_object(system: Any, uri: str, start: int, length: int | None, etag: str | None) -> tuple[bytes, int]:
    bucket, key = bucket_and_key(uri)
    await system.set_session()
    client = await system.get_s3(bucket)
    last = "" if length is None else start + length - 1
    part = {"Range": f"bytes={start}-{last}"} if start or length is not None else {}
    timeout_seconds = READ_SECONDS + (length or 0) / MIN_BYTES_PER_SECOND
    try:
        async with asyncio.timeout(timeout_seconds if length is not None else None):
            answer = await client.get_object(Bucket=bucket, Key=key, **part)
            if etag and etag_of(answer) != etag:
                answer["Body"].close()
                raise errors.ChangedError(f"it was replaced since it was listed (ETag {etag_of(answer)}, not {etag})")
            async with answer["Body"] as body:
                data: bytes = await body.read()
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != "InvalidRange":
            raise
        if etag and (now := etag_of(await client.head_object(Bucket=bucket, Key=key))) != etag:
            raise errors.ChangedError(f"it was replaced since it was listed (ETag {now}, not {etag})") from None
        return b"", _retries(error.response)  # as on a disk: no bytes beyond the end
    if len(data) != answer["ContentLength"]:
        raise errors.CutError(f"received {len(data)} of {answer['ContentLength']} bytes")
    return data, _retries(answer)


def _retries(answer: Any) -> int:
    """Number of botocore's retries before this answer."""
    return int(((answer or {}).get("ResponseMetadata") or {}).get("RetryAttempts", 0))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path of a file, for libraries that need a path; a remote file is copied."""
    if is_local(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PurePosixPath(uri).name
        path.write_bytes(read_bytes(uri))
        yield path


def read_json(
    uri: str, fields: Mapping[str, type] | None = None, remedy: str = RESTORE, max_bytes: int | None = None
) -> Any:
    """Read a JSON file; with `fields`, it must be an object with these fields of these types.

    Raises `FileNotFoundError`; if the file is damaged, `StorageError` with the file, the reason and the `remedy`.
    """
    max_bytes = MAX_JSON_BYTES if max_bytes is None else max_bytes
    try:
        data = read_bytes(uri, 0, max_bytes + 1)
    except IsADirectoryError as error:
        raise damaged(uri, "it is a folder", remedy) from error
    try:
        if len(data) > max_bytes:
            raise ValueError(f"it is larger than {max_bytes:,} bytes")
        value = json.loads(data)
        _check_depth(value)
        if fields is not None and type(value) is not dict:
            raise ValueError(f"it holds a {type(value).__name__} instead of an object")
        for name, kind in (fields or {}).items():
            if name not in value:
                raise ValueError(f"it has no {name}")
            if type(value[name]) is not kind:
                raise ValueError(f"its {name} is a {type(value[name]).__name__} instead of a {kind.__name__}")
    except RecursionError as error:
        raise damaged(uri, f"it is nested deeper than {MAX_JSON_DEPTH} levels", remedy) from error
    except ValueError as error:
        raise damaged(uri, str(error), remedy) from error
    return value


def damaged(uri: str, reason: str, remedy: str = RESTORE) -> StorageError:
    """The error for a file of this program whose content is not valid."""
    return StorageError(f"{uri} is damaged ({reason[:200]}): {remedy}")


def _check_depth(value: Any) -> None:
    """Raise `RecursionError` if lists and objects are nested deeper than `MAX_JSON_DEPTH`."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        below = [item.values() if type(item) is dict else item for item in level if type(item) in (dict, list)]
        if not below:
            return
        level = [item for items in below for item in items]
    raise RecursionError
