"""Reading objects, with retries: bytes, ranges, JSON of ours, files for pyarrow and for libraries that want a path."""

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
"""A body that comes more slowly than this, after `READ_SECONDS`, is asked for again."""
MAX_JSON_BYTES: Final = 64 * 2**20
"""Largest JSON file of ours: one that names the files of a billion rows."""
MAX_JSON_DEPTH: Final = 32
RESTORE: Final = "restore it from a copy, or remove it if nothing needs it"
"""What to do about a damaged file, unless its reader knows better."""


def open_file(uri: str) -> pa.NativeFile:
    """A file for pyarrow to read: its own way through fsspec takes a store that is throttling for a missing file."""
    system, path = filesystem(uri)
    return pa.PythonFile(open_regular(path) if is_local(uri) else system.open(path, "rb"), mode="r")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Bytes of an object."""

    data: bytes
    requests: int
    """How many requests it took."""


def fetch(uri: str, start: int = 0, length: int | None = None, etag: str | None = None) -> Fetched:
    """The bytes of an object, or a range of them, asked for again with back-off where that helps.

    `etag`: the version that must come. Raises a `FetchError`.
    """
    return with_retries(lambda: _read(uri, start, length, etag), uri)


def with_retries(read: Callable[[], tuple[bytes, int]], uri: str) -> Fetched:
    """What `read` gives of a URI: bytes, and how often the client asked again by itself. Repeated with back-off where
    that helps; raises a `FetchError`, or an error of the image as it is.
    """
    requests = 0
    while True:
        requests += 1
        try:
            data, retries = read()
            return Fetched(data=data, requests=requests + retries)
        except (ImageError, UsageError):
            raise
        except Exception as error:  # botocore, aiohttp and OS errors share no base; `faults` knows them all
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
    """The bytes of an object, or a range of them, with retries. Raises what the store raises."""
    try:
        return fetch(uri, start, length).data
    except FetchError as error:
        cause = error.__cause__
        assert isinstance(cause, Exception)
        if errors.kind(cause) is Fault.MISSING:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
        raise cause from None


def reader(uri: str) -> Callable[[int, int], bytes]:
    """A function of (offset, length) that gives bytes of an object; raises what `read_bytes` raises."""
    return lambda offset, length: read_bytes(uri, offset, length)


def _read(uri: str, start: int, length: int | None, etag: str | None) -> tuple[bytes, int]:
    """One attempt: the bytes, and how often botocore asked again by itself."""
    if length == 0:
        return b"", 0  # S3 knows no empty range, and would send everything
    if not is_local(uri):
        system, _ = filesystem(uri)
        return cast(tuple[bytes, int], fsspec.asyn.sync(system.loop, _get_object, system, uri, start, length, etag))
    with open_regular(uri) as file:
        if etag and describe_local(uri, os.fstat(file.fileno())).etag != etag:
            raise errors.ChangedError("it was changed since it was listed")
        file.seek(start)
        left = max(0, os.fstat(file.fileno()).st_size - start)  # of a file that grows meanwhile, what it had
        return file.read(left if length is None else length), 0


async def _get_object(system: Any, uri: str, start: int, length: int | None, etag: str | None) -> tuple[bytes, int]:
    bucket, key = bucket_and_key(uri)
    await system.set_session()
    client = await system.get_s3(bucket)
    last = "" if length is None else start + length - 1
    part = {"Range": f"bytes={start}-{last}"} if start or length is not None else {}
    patience = READ_SECONDS + (length or 0) / MIN_BYTES_PER_SECOND
    try:
        async with asyncio.timeout(patience if length is not None else None):
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
        return b"", _retries(error.response)  # as on a disk: there is nothing from there on
    if len(data) != answer["ContentLength"]:
        raise errors.CutError(f"{len(data)} of {answer['ContentLength']} bytes came")
    return data, _retries(answer)


def _retries(answer: Any) -> int:
    """How often botocore asked again before this answer."""
    return int(((answer or {}).get("ResponseMetadata") or {}).get("RetryAttempts", 0))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A file as one of this machine, for libraries that want a path."""
    if is_local(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PurePosixPath(uri).name
        path.write_bytes(read_bytes(uri))
        yield path


def read_json(uri: str, fields: Mapping[str, type] | None = None, remedy: str = RESTORE) -> Any:
    """The value of a JSON file; with `fields`, an object that has these, each of its type.

    Raises `FileNotFoundError`, and `StorageError` with the file, the reason and the `remedy` where it is damaged.
    """
    try:
        data = read_bytes(uri, 0, MAX_JSON_BYTES + 1)
    except IsADirectoryError as error:
        raise damaged(uri, "it is a folder", remedy) from error
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES:,} bytes")
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
        raise damaged(uri, f"it is nested deeper than {MAX_JSON_DEPTH}", remedy) from error
    except ValueError as error:
        raise damaged(uri, str(error), remedy) from error
    return value


def damaged(uri: str, reason: str, remedy: str = RESTORE) -> StorageError:
    """The error of a file of ours that is not as this program wrote it."""
    return StorageError(f"{uri} is damaged ({reason[:200]}): {remedy}")


def _check_depth(value: Any) -> None:
    """Raise `RecursionError` where lists and objects lie deeper in each other than this program writes any."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        below = [item.values() if type(item) is dict else item for item in level if type(item) in (dict, list)]
        if not below:
            return
        level = [item for items in below for item in items]
    raise RecursionError
