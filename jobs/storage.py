"""The only module that opens a URI: local paths and `s3://`, through fsspec.

S3's endpoint and keys come from the usual AWS variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

import fsspec
import pyarrow.fs

from nsnet.errors import BundleError, StorageError, UsageError

SCHEMES: Final = ("file", "s3")
LISTING_PAGE: Final = 1000
"""Objects asked for at a time, the most that S3 gives."""
REACH_SECONDS: Final = 10.0
"""Longest wait, retries included, for the first answer of a store."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a listing."""

    uri: str
    size_bytes: int
    etag: str
    """The store's version of the content: S3's ETag; on disks, size and time of change."""


def absolute(uri: str) -> str:
    """`s3://…` as it is; a local path made absolute. Raises `UsageError` for other schemes and for no place at all."""
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
    # Listings are not cached: what another process wrote must be seen.
    return fsspec.filesystem("s3", use_listings_cache=False), uri.partition("://")[2]


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """pyarrow filesystem and the path in it, over the same client."""
    system, path = filesystem(uri)
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system)), path


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
    except Exception as error:  # botocore, aiohttp and OS errors share no base
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "AWS")
        raise StorageError(f"the bucket s3://{bucket} at {endpoint} cannot be reached: {_reason(error)}") from error


def check_output(uri: str) -> None:
    """Raise `StorageError` or `UsageError` where nothing could be written: before the work, not after it."""
    reachable(uri)
    if is_local(uri):
        there = next(path for path in (Path(uri), *Path(uri).parents) if path.exists())
        if not there.is_dir():
            raise UsageError(f"{uri} cannot be a folder: {there} is a file")
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


def list_files(uri: str, left_out: Counter[str] | None = None) -> Iterator[Entry]:
    """All objects below a folder or prefix, recursively, as they come; order is the store's.

    What cannot be listed is counted in `left_out` by reason. Links to folders are not followed: they may form circles.
    """
    if is_local(uri):
        yield from _list_disk(uri, Counter() if left_out is None else left_out)
        return
    bucket, _ = _bucket_and_key(uri)
    page: dict[str, Any] = {"NextContinuationToken": None}
    while "NextContinuationToken" in page:
        page = _page(uri, _below(uri), LISTING_PAGE, page["NextContinuationToken"])
        for info in page.get("Contents", []):
            yield Entry(uri=f"s3://{bucket}/{info['Key']}", size_bytes=int(info["Size"]), etag=_etag(info))


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def _below(uri: str) -> str:
    """The prefix of all keys below a URI."""
    key = _bucket_and_key(uri)[1]
    return f"{key}/" if key else ""


def _page(uri: str, prefix: str, size: int, token: str | None = None, timeout: float | None = None) -> dict[str, Any]:
    """One answer of S3's listing. fsspec's own walk loses keys with an empty part, such as `a//b`."""
    system, _ = filesystem(uri)
    following = {"ContinuationToken": token} if token else {}
    return cast(
        dict[str, Any],
        system.call_s3(
            "list_objects_v2", Bucket=_bucket_and_key(uri)[0], Prefix=prefix, MaxKeys=size, timeout=timeout, **following
        ),
    )


def _list_disk(folder: str, left_out: Counter[str]) -> Iterator[Entry]:
    pending = [folder]
    while pending:
        try:
            items = list(os.scandir(pending.pop()))
        except OSError as error:
            left_out[f"folder that cannot be read ({error.strerror})"] += 1
            continue
        for item in items:
            try:
                if item.is_dir(follow_symlinks=False):
                    pending.append(item.path)
                elif item.is_file():
                    yield describe_local(item.path, item.stat())
                else:
                    left_out["link to a folder" if item.is_dir() else "broken link or special file"] += 1
            except OSError as error:
                left_out[f"file that cannot be read ({error.strerror})"] += 1


def describe_local(path: str, stat: os.stat_result) -> Entry:
    """A file on disk as an entry."""
    return Entry(uri=path, size_bytes=stat.st_size, etag=f"{stat.st_size:x}-{stat.st_mtime_ns:x}")


def describe(uri: str) -> Entry:
    """One object as an entry; `FileNotFoundError` if it is not there."""
    if is_local(uri):
        return describe_local(uri, os.stat(uri))
    system, path = filesystem(uri)
    info = system.info(path)
    return Entry(uri=uri, size_bytes=int(info["size"]), etag=_etag(info))


def _etag(info: dict[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or "").strip('"')


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """The bytes of an object, or a range of them."""
    system, path = filesystem(uri)
    if length == 0:
        return b""  # S3 knows no empty range, and would send everything
    end = None if length is None else start + length
    try:
        return cast(bytes, system.cat_file(path, start=start or None, end=end))
    except OSError as error:
        if error.errno == errno.EINVAL and system.size(path) <= start:
            return b""  # as on a disk: there is nothing from there on
        raise


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object whole: a reader sees all of it or nothing."""
    system, path = filesystem(uri)
    if not is_local(uri):
        system.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.partial-{os.getpid()}"
    Path(partial).write_bytes(data)
    os.replace(partial, path)


def read_json(uri: str) -> Any:
    """A JSON object."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write JSON whole."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def upload_folder(folder: Path, uri: str, last: str) -> None:
    """Copy a local folder to a URI, the file named `last` after all others: it marks the copy as whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == last):
        write_bytes(join(uri, path.relative_to(folder).as_posix()), path.read_bytes())


def remove_folder(uri: str) -> None:
    """Remove a folder that this program made for its own use; nothing else is ever removed."""
    system, path = filesystem(uri)
    if system.exists(path):
        system.rm(path, recursive=True)


def fetch_bundle(uri: str, description: str) -> Path:
    """A detector bundle as a local folder: a local one as it is, a remote one through a cache named by its content.

    `description` is the bundle's file that lists all others, each with its SHA-256.
    """
    if is_local(uri):
        return Path(uri)
    try:
        described = read_bytes(join(uri, description))
    except FileNotFoundError as error:
        raise BundleError(f"{uri} is no detector bundle: {description} is missing") from error
    try:
        files = dict(json.loads(described)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{uri}/{description} is damaged: {type(error).__name__}") from error
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise BundleError(f"{uri}/{description} names {name!r}, which does not belong in a bundle")
    cache = Path(os.environ.get("NSNET_CACHE", Path.home() / ".cache" / "nsnet")) / "detectors"
    folder = cache / hashlib.sha256(described).hexdigest()[:32]
    if (folder / description).is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        partial = Path(scratch) / "bundle"
        partial.mkdir()
        for name, digest in files.items():
            try:
                content = read_bytes(join(uri, name))
            except FileNotFoundError as error:
                raise BundleError(f"the bundle {uri} is damaged: {name} is missing") from error
            if hashlib.sha256(content).hexdigest() != digest:  # the cache must not keep it
                raise BundleError(
                    f"the bundle {uri} is damaged: the SHA-256 of {name} is not the one that was recorded"
                )
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        (partial / description).write_bytes(described)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'no answer in time'}"
