"""The only module that opens a URI: local paths and `s3://`, through fsspec.

S3's endpoint and keys come from the usual AWS variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
"""

import asyncio
import email.utils
import errno
import hashlib
import json
import os
import queue
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

import fsspec
import fsspec.asyn
import pyarrow as pa
import pyarrow.fs
from botocore.exceptions import ClientError

from jobs.storage import errors
from jobs.storage.errors import Fault
from jobs.storage.left_out import LeftOut
from jobs.storage.redaction import REFUSED, holds_secrets, shown, without_secrets
from nsnet import bundle
from nsnet.errors import BundleError, FetchError, ImageError, StorageError, UsageError
from nsnet.files import open_regular

SCHEMES: Final = ("file", "s3")
LISTING_PAGE: Final = 1000
"""Objects asked for at a time, the most that S3 gives."""
LISTING_THREADS: Final = 16
"""Folders or prefixes that are listed at a time."""
FAN_OUT: Final = 64
"""Most sub-prefixes of an S3 prefix that are listed each by itself: one request per tiny folder would be slower than
one request per thousand keys."""
FAN_OUT_LEVELS: Final = 3
REACH_SECONDS: Final = 10.0
"""Longest wait, retries included, for the first answer of a store."""
CONNECT_SECONDS: Final = 10
READ_SECONDS: Final = 30
"""Longest silence of a store in the middle of an answer."""
SLOWEST_BYTES_PER_SECOND: Final = 256 * 1024
"""A body that comes more slowly than this, after `READ_SECONDS`, is asked for again."""
BUNDLE_PIECE_BYTES: Final = 2**26
REFRESH_SECONDS: Final = 30.0
"""Least time between two looks for new credentials."""
MAX_JSON_BYTES: Final = 64 * 2**20
"""Largest JSON file of ours: one that names the files of a billion rows."""
MAX_JSON_DEPTH: Final = 32
RESTORE: Final = "restore it from a copy, or remove it if nothing needs it"
"""What to do about a damaged file, unless its reader knows better."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a listing."""

    uri: str
    size_bytes: int
    etag: str
    """The store's version of the content: S3's ETag; on disks, size and time of change."""
    modified_at: datetime
    """The store's time of the last change."""


def absolute(uri: str) -> str:
    """`s3://…` as it is; a local path made absolute.

    Raises `UsageError` for other schemes, for no place at all, for what is not UTF-8, and for an address with a
    password or a signature: it would be printed and recorded.
    """
    if "\0" in uri or any("\ud800" <= letter <= "\udfff" for letter in uri):
        raise UsageError(f"{shown(ascii(uri))} is not UTF-8: rename it, or name a folder above it")
    return located(uri)


def located(uri: str) -> str:
    """The same for what is only read here and recorded nowhere: a local file may have any name."""
    if holds_secrets(uri):
        raise UsageError(
            f"{shown(uri)} {REFUSED}. Give keys in "
            "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by a role"
        )
    scheme, separator, rest = uri.partition("://")
    if separator and scheme not in SCHEMES:
        raise UsageError(f"{uri}: only local paths and s3:// are supported, not {scheme}://")
    if not (rest if separator else uri) or (separator and scheme == "s3" and rest.startswith("/")):
        raise UsageError(f"{uri!r} names no place: give a path, or s3:// and a bucket")
    if separator and scheme == "s3":
        return uri.rstrip("/")
    return os.path.abspath(rest if separator else os.path.expanduser(uri))


def is_local(uri: str) -> bool:
    """Whether a URI lies on a disk of this machine."""
    return "://" not in uri


def model_path(path: str | None) -> str | None:
    """The absolute path of weights given on the command line; they must be local, on every node."""
    if path is None:
        return None
    path = absolute(path)
    if not is_local(path):
        raise UsageError(f"{path}: weights must be a local path that every node has")
    return path


def join(uri: str, *parts: str) -> str:
    """A URI below another."""
    return "/".join([uri.rstrip("/"), *parts])


def filesystem(uri: str) -> tuple[Any, str]:
    """fsspec filesystem and the path in it."""
    if is_local(uri):
        return fsspec.filesystem("file"), uri
    _check_endpoint()
    # Listings are not cached: what another process wrote must be seen.
    settings = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": 4 * LISTING_THREADS,
        "retries": {"mode": "standard", "max_attempts": 4},
    }
    return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=settings), uri.partition("://")[2]


def _check_endpoint() -> None:
    """S3 signs its requests: a user in its address is a mistake, and clients quote the address in their errors."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if holds_secrets(os.environ.get(name, "")):
            raise UsageError(
                f"{name} is {shown(os.environ[name])}: it must hold no user or password, as in "
                "https://host:9000. Give keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """pyarrow filesystem and the path in it, over the same client."""
    system, path = filesystem(uri)
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system)), path


def open_file(uri: str) -> pa.NativeFile:
    """A file for pyarrow to read: its own way through fsspec takes a store that is throttling for a missing file."""
    system, path = filesystem(uri)
    return pa.PythonFile(open_regular(path) if is_local(uri) else system.open(path, "rb"), mode="r")


def arrow_path(uri: str) -> str:
    """The path of a URI in its pyarrow filesystem."""
    return uri.partition("://")[2] or uri


def make_folder(path: str) -> None:
    """Make a local folder and those above it."""
    os.makedirs(path, exist_ok=True)


def reachable(uri: str) -> None:
    """Raise `StorageError`, in one line, unless the bucket of a URI answers."""
    if is_local(uri):
        return
    bucket, prefix = _bucket_and_key(uri)
    try:
        # One object of this prefix: a bucket may be huge, and a policy may allow no more than the prefix.
        _page(uri, prefix, 1, timeout=REACH_SECONDS)
    except FileNotFoundError as error:
        raise StorageError(f"the bucket s3://{bucket} does not exist") from error
    except UsageError:
        raise
    except Exception as error:  # botocore, aiohttp and OS errors share no base
        endpoint = without_secrets(os.environ.get("AWS_ENDPOINT_URL", "AWS"))
        raise StorageError(
            f"the bucket s3://{bucket} at {endpoint} cannot be reached: {errors.reason(error)}"
        ) from error


def store_of(uri: str) -> str:
    """What may be away as a whole: the bucket of a URI; "" for this machine's disks."""
    return "" if is_local(uri) else _bucket_and_key(uri)[0]


def answers(uri: str, source: str | None) -> bool:
    """Whether the store of an object answers, whatever it says of the object itself.

    A disk answers if the source is there and holds anything: where it is no longer mounted, an empty folder may stand.
    """
    try:
        if not is_local(uri):
            _page(uri, _bucket_and_key(uri)[1], 1, timeout=REACH_SECONDS)
        elif source and os.path.isdir(source):
            with os.scandir(source) as items:
                return next(items, None) is not None
        elif source and is_local(source):
            os.stat(source)
    except Exception as error:  # botocore, aiohttp and OS errors share no base; `faults` knows them all
        fault = errors.kind(error)
        if fault is Fault.CREDENTIALS:
            _refresh(uri)
        if fault is Fault.MISSING:  # a bucket that a manifest names may be gone for ever, the source's own may not
            return not is_local(uri) and source is not None and store_of(uri) != store_of(source)
        return fault not in (Fault.TRANSIENT, Fault.CREDENTIALS)
    return True


def check_output(uri: str) -> None:
    """Raise `StorageError` or `UsageError` where nothing could be written: before the work, not after it."""
    reachable(uri)
    if is_local(uri):
        try:
            there = next(path for path in (Path(uri), *Path(uri).parents) if path.exists())
        except OSError as error:  # a name that is too long, a link to itself
            raise UsageError(f"{uri} cannot be a folder: {error.strerror}") from error
        if not there.is_dir():
            raise UsageError(f"{uri} cannot be a folder: {there} is a file")
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            raise StorageError(f"{uri} cannot be written: {there} is mounted read-only; choose another --out")
        if not os.access(there, os.W_OK):
            raise StorageError(f"{uri} cannot be written: {there} does not allow it")


def exists(uri: str) -> bool:
    """Whether an object or folder is there."""
    system, path = filesystem(uri)
    return bool(system.exists(path))


def is_folder(uri: str) -> bool:
    """Whether a URI is a folder or prefix with something below it."""
    if is_local(uri):
        return os.path.isdir(uri)
    return bool(_page(uri, _below(uri), 1).get("Contents"))


def list_files(uri: str, left_out: LeftOut | None = None) -> Iterator[Entry]:
    """All objects below a folder or prefix, recursively, as they come, in no order; many folders are listed at a time.

    What cannot be listed is counted in `left_out` by reason, else an error: to take an unreadable folder for an empty
    one would be worse. Links to folders are not followed: they may form circles.
    """
    if is_local(uri):
        counting = threading.Lock()

        def leave_out(reason: str, path: str, error: OSError | None = None) -> None:
            if left_out is not None:
                with counting:
                    if error is None:
                        left_out[reason] += 1
                    else:
                        left_out.add_unread(reason, f"{path}: {error.strerror}")
            elif error is not None and not isinstance(error, FileNotFoundError):  # gone since it was listed
                raise error

        yield from _walk(uri, lambda folder: _list_disk(folder, leave_out))
    else:
        yield from _walk((_below(uri), 0), lambda item: _list_s3(uri, *item))


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names directly below a folder or prefix, each kind sorted."""

    folders: list[str]
    files: list[str]
    others: list[str]
    """Links and special files of disks."""


def names_below(uri: str) -> Names:
    """What lies directly below a folder or prefix; nothing where there is none."""
    found = Names(folders=[], files=[], others=[])
    if is_local(uri):
        with os.scandir(uri) if os.path.isdir(uri) else nullcontext(()) as items:
            for item in items:
                is_folder, is_file = item.is_dir(follow_symlinks=False), item.is_file(follow_symlinks=False)
                (found.folders if is_folder else found.files if is_file else found.others).append(item.name)
    else:
        prefix = _below(uri)
        for page in _pages(uri, prefix, Delimiter="/"):
            found.folders.extend(item["Prefix"][len(prefix) : -1] for item in page.get("CommonPrefixes", []))
            found.files.extend(item["Key"][len(prefix) :] for item in page.get("Contents", []))
    for names in (found.folders, found.files, found.others):
        names[:] = sorted(filter(None, names))  # an S3 prefix may be an object itself: a marker without a name
    return found


def subfolders(uri: str) -> list[str]:
    """Names of the folders directly below a folder or prefix, sorted; links to folders are none."""
    return names_below(uri).folders


def _walk(root: Any, listing: Callable[[Any], Iterator[tuple[list[Entry], list[Any]]]]) -> Iterator[Entry]:
    """Entries below `root`. `listing(folder)` gives pages: entries, and further folders to list.

    Threads run ahead of the consumer by a bounded number of pages.
    """
    pages: queue.Queue[tuple[list[Entry], int] | BaseException] = queue.Queue(maxsize=4 * LISTING_THREADS)
    stop = threading.Event()

    def put(item: tuple[list[Entry], int] | BaseException) -> None:
        while not stop.is_set():
            try:
                pages.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work(folder: Any) -> None:
        try:
            for entries, further in listing(folder):
                if stop.is_set():
                    return
                put((entries, len(further)))  # before they are begun: the count must not fall to 0 meanwhile
                for item in further:
                    pool.submit(work, item)
            put(([], -1))
        except BaseException as error:
            put(error)

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        pool.submit(work, root)
        open_folders = 1
        try:
            while open_folders:
                page = pages.get()
                if isinstance(page, BaseException):
                    raise page
                open_folders += page[1]
                yield from page[0]
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _list_s3(uri: str, prefix: str, level: int) -> Iterator[tuple[list[Entry], list[tuple[str, int]]]]:
    bucket, _ = _bucket_and_key(uri)

    def entries(page: dict[str, Any]) -> list[Entry]:
        return [
            Entry(
                uri=f"s3://{bucket}/{info['Key']}",
                size_bytes=int(info["Size"]),
                etag=_etag(info),
                modified_at=info["LastModified"],
            )
            for info in page.get("Contents", [])
        ]

    if level < FAN_OUT_LEVELS:
        page = _page(uri, prefix, LISTING_PAGE, Delimiter="/")
        below = [item["Prefix"] for item in page.get("CommonPrefixes", [])]
        if "NextContinuationToken" not in page and len(below) <= FAN_OUT:
            yield entries(page), [(item, level + 1) for item in below]
            return
    for page in _pages(uri, prefix):
        yield entries(page), []


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def _below(uri: str) -> str:
    """The prefix of all keys below a URI."""
    key = _bucket_and_key(uri)[1]
    return f"{key}/" if key else ""


def _page(uri: str, prefix: str, size: int, timeout: float | None = None, **following: Any) -> dict[str, Any]:
    """One answer of S3's listing. fsspec's own walk loses keys with an empty part, such as `a//b`."""
    system, _ = filesystem(uri)
    return cast(
        dict[str, Any],
        system.call_s3(
            "list_objects_v2", Bucket=_bucket_and_key(uri)[0], Prefix=prefix, MaxKeys=size, timeout=timeout, **following
        ),
    )


def _pages(uri: str, prefix: str, **settings: Any) -> Iterator[dict[str, Any]]:
    """All answers of S3's listing of a prefix."""
    page = _page(uri, prefix, LISTING_PAGE, **settings)
    yield page
    while "NextContinuationToken" in page:
        page = _page(uri, prefix, LISTING_PAGE, ContinuationToken=page["NextContinuationToken"], **settings)
        yield page


def _list_disk(folder: str, leave_out: Callable[..., None]) -> Iterator[tuple[list[Entry], list[str]]]:
    entries: list[Entry] = []
    below: list[str] = []
    try:
        with os.scandir(folder) as items:
            for item in items:
                try:
                    if item.is_dir(follow_symlinks=False):
                        below.append(item.path)
                    elif item.is_file():
                        entries.append(describe_local(item.path, item.stat()))
                    else:
                        leave_out("link to a folder" if item.is_dir() else "broken link or special file", item.path)
                except OSError as error:
                    leave_out(f"file that cannot be read ({error.strerror})", item.path, error)
                if len(entries) == LISTING_PAGE:
                    yield entries, below
                    entries, below = [], []
    except OSError as error:
        leave_out(f"folder that cannot be read ({error.strerror})", folder, error)
    yield entries, below


def describe_local(path: str, stat: os.stat_result) -> Entry:
    """A file on disk as an entry."""
    changed = datetime.fromtimestamp(stat.st_mtime, UTC)
    return Entry(uri=path, size_bytes=stat.st_size, etag=f"{stat.st_size:x}-{stat.st_mtime_ns:x}", modified_at=changed)


def describe(uri: str) -> Entry:
    """One object as an entry; `FileNotFoundError` if it is not there."""
    if is_local(uri):
        return describe_local(uri, os.stat(uri))
    system, path = filesystem(uri)
    info = system.info(path)
    return Entry(uri=uri, size_bytes=int(info["size"]), etag=_etag(info), modified_at=info["LastModified"])


def _etag(info: dict[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or "").strip('"')


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
    that helps; raises a `FetchError`, or an error of the picture as it is.
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
                _refresh(uri)
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
    bucket, key = _bucket_and_key(uri)
    await system.set_session()
    client = await system.get_s3(bucket)
    last = "" if length is None else start + length - 1
    part = {"Range": f"bytes={start}-{last}"} if start or length is not None else {}
    patience = READ_SECONDS + (length or 0) / SLOWEST_BYTES_PER_SECOND
    try:
        async with asyncio.timeout(patience if length is not None else None):
            answer = await client.get_object(Bucket=bucket, Key=key, **part)
            if etag and _etag(answer) != etag:
                answer["Body"].close()
                raise errors.ChangedError(f"it was replaced since it was listed (ETag {_etag(answer)}, not {etag})")
            async with answer["Body"] as body:
                data: bytes = await body.read()
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != "InvalidRange":
            raise
        if etag and (now := _etag(await client.head_object(Bucket=bucket, Key=key))) != etag:
            raise errors.ChangedError(f"it was replaced since it was listed (ETag {now}, not {etag})") from None
        return b"", _retries(error.response)  # as on a disk: there is nothing from there on
    if len(data) != answer["ContentLength"]:
        raise errors.CutError(f"{len(data)} of {answer['ContentLength']} bytes came")
    return data, _retries(answer)


def _retries(answer: Any) -> int:
    """How often botocore asked again before this answer."""
    return int(((answer or {}).get("ResponseMetadata") or {}).get("RetryAttempts", 0))


_refreshing: Final = threading.Lock()
_refreshed_at = float("-inf")


def _refresh(uri: str) -> None:
    """Look for new credentials where they come from: they expire in the middle of long runs."""
    global _refreshed_at
    with _refreshing:
        if not is_local(uri) and time.monotonic() - _refreshed_at > REFRESH_SECONDS:
            filesystem(uri)[0].connect(refresh=True)
            _refreshed_at = time.monotonic()


@contextmanager
def naming(uri: str) -> Iterator[None]:
    """Errors of the system in the body name this file: what fails while writing (a full disk) names none by itself."""
    try:
        yield
    except OSError as error:
        if error.errno in errors.ADVICE and error.filename is None:
            error.filename = uri
        raise


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object whole: a reader sees all of it or nothing."""
    system, path = filesystem(uri)
    if not is_local(uri):
        system.pipe_file(path, data)
        return
    os.replace(_write_partial(path, data), path)


def _write_partial(path: str, data: bytes) -> str:
    """Write a file beside its place, down to the disk: a machine may lose its power."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.partial-{uuid.uuid4().hex[:8]}"
    with _whole(partial), open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return partial


@contextmanager
def _whole(partial: str) -> Iterator[None]:
    """What the body could not finish is removed: on a full disk it would take the room that is left."""
    try:
        with naming(partial):
            yield
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def create(uri: str, data: bytes) -> bool:
    """Write an object only where there is none; False: there is one already. Of several creators one succeeds.

    S3: conditional put. Disks: a hard link to a written file, which exists whole or not at all; where there are no
    hard links, exclusive create.
    """
    if not is_local(uri):
        system, path = filesystem(uri)
        try:
            bucket, key = _bucket_and_key(uri)
            system.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except OSError as error:
            answer = getattr(error.__cause__, "response", None) or {}
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status not in (409, 412):
                raise
            # an answer that was lost on its way makes the client ask again: then it meets its own object
            return status == 412 and _same(uri, data)
    partial = _write_partial(uri, data)
    try:
        os.link(partial, uri)
    except FileExistsError:
        return False
    except OSError:
        return _create_exclusively(uri, data)
    finally:
        os.unlink(partial)
    return True


def _create_exclusively(path: str, data: bytes) -> bool:
    try:
        file = open(path, "xb")  # noqa: SIM115 - what was there before must not be removed below
    except FileExistsError:
        return False
    with _whole(path), file:
        file.write(data)
    return True


def _same(uri: str, data: bytes) -> bool:
    try:
        return read_bytes(uri) == data
    except FileNotFoundError:
        return False


def age_seconds(uri: str) -> float:
    """Seconds since an object was written, by the clock of its store. Raises `FileNotFoundError`."""
    if is_local(uri):
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(uri), prefix=".now-") as probe:
            return os.stat(probe.name).st_mtime - os.stat(uri).st_mtime
    bucket, key = _bucket_and_key(uri)
    answer = filesystem(uri)[0].call_s3("head_object", Bucket=bucket, Key=key)
    now = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - answer["LastModified"]).total_seconds())


def remove_file(uri: str) -> None:
    """Remove an object that this program made for its own use; harmless where there is none."""
    system, path = filesystem(uri)
    try:
        system.rm_file(path)
    except FileNotFoundError:
        return


def upload_file(path: Path, uri: str) -> None:
    """Copy a local file to a URI: a reader sees all of it or nothing."""
    system, target = filesystem(uri)
    if not is_local(uri):
        system.put_file(str(path), target)
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.partial-{uuid.uuid4().hex[:8]}"
    with _whole(partial):
        shutil.copyfile(path, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    os.replace(partial, target)


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


def write_json(uri: str, value: Any) -> None:
    """Write JSON whole."""
    write_bytes(uri, encode_json(value))


def encode_json(value: Any) -> bytes:
    """JSON as `write_json` writes it; half a surrogate pair, which somebody's JSON may hold, stays an escape."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def upload_folder(folder: Path, uri: str, last: str) -> None:
    """Copy a local folder to a URI, the file named `last` after all others: it marks the copy as whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == last):
        write_bytes(join(uri, path.relative_to(folder).as_posix()), path.read_bytes())


def fetch_bundle(uri: str, description: str) -> Path:
    """A detector bundle as a local folder: a local one as it is, a remote one through a cache named by its content.

    `description` is the bundle's file that lists all others, each with its SHA-256. Nothing is written that has no
    place in a bundle, and nothing larger than it may be there.
    """
    if is_local(uri):
        return Path(uri)
    try:
        described = read_bytes(join(uri, description), 0, bundle.MAX_DESCRIPTION_BYTES)
    except FileNotFoundError as error:
        raise BundleError(f"{uri} is no detector bundle: {description} is missing") from error
    try:
        files = dict(json.loads(described)["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{uri}/{description} is damaged: {type(error).__name__}") from error
    if strange := [name for name in files if bundle.member(name) is None]:
        raise BundleError(f"{uri}/{description} names {strange[0]!r}, which does not belong in a bundle")
    if len(files) > bundle.MAX_FILES:
        raise BundleError(f"{uri}/{description} names {len(files)} files; a bundle holds at most {bundle.MAX_FILES}")
    cache = Path(os.environ.get("NSNET_CACHE") or Path.home() / ".cache" / "nsnet") / "detectors"
    folder = cache / hashlib.sha256(described).hexdigest()[:32]
    if (folder / description).is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        partial = Path(scratch) / "bundle"
        partial.mkdir()
        for name, digest in files.items():
            if _fetch_member(uri, name, partial / name) != digest:  # the cache must not keep it
                raise BundleError(
                    f"the bundle {uri} is damaged: the SHA-256 of {name} is not the one that was recorded"
                )
        (partial / description).write_bytes(described)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _fetch_member(uri: str, name: str, path: Path) -> str:
    """Write a file of a remote bundle; its SHA-256. In pieces: neither its size nor the store's word is believed."""
    content = bundle.member(name)
    left, sha = content.max_bytes if content is not None else 0, hashlib.sha256()
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        while True:
            try:
                piece = read_bytes(join(uri, name), file.tell(), BUNDLE_PIECE_BYTES)
            except FileNotFoundError as error:
                raise BundleError(f"the bundle {uri} is damaged: {name} is missing") from error
            left -= len(piece)
            if left < 0:
                raise BundleError(f"{name} of the bundle {uri} is larger than it may be")
            file.write(piece)
            sha.update(piece)
            if len(piece) < BUNDLE_PIECE_BYTES:
                return sha.hexdigest()
