"""The only module that opens a URI: local paths and `s3://`, through fsspec.

S3's endpoint and keys come from the usual AWS variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import fsspec
import pyarrow.fs

from nsnet.errors import StorageError, UsageError

SCHEMES: Final = ("file", "s3")
LISTING_PAGE: Final = 1000


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a listing."""

    uri: str
    size_bytes: int
    etag: str
    """The store's version of the content: S3's ETag; on disks, size and time of change."""


def absolute(uri: str) -> str:
    """`s3://…` as it is; a local path made absolute. Raises `UsageError` for other schemes."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return os.path.abspath(os.path.expanduser(uri))
    if scheme not in SCHEMES:
        raise UsageError(f"{uri}: only local paths and s3:// are supported, not {scheme}://")
    return rest if scheme == "file" else uri.rstrip("/")


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
    system, path = filesystem(uri)
    bucket = path.partition("/")[0]
    try:
        system.ls(bucket, detail=False, refresh=True)
    except FileNotFoundError as error:
        raise StorageError(f"the bucket s3://{bucket} does not exist") from error
    except Exception as error:  # botocore, aiohttp and OS errors share no base
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "AWS")
        raise StorageError(f"the bucket s3://{bucket} at {endpoint} cannot be reached: {_reason(error)}") from error


def exists(uri: str) -> bool:
    """Whether an object or folder is there."""
    system, path = filesystem(uri)
    return bool(system.exists(path))


def is_folder(uri: str) -> bool:
    """Whether a URI is a folder or prefix with something below it."""
    system, path = filesystem(uri)
    return bool(system.isdir(path))


def list_files(uri: str) -> Iterator[Entry]:
    """All objects below a folder or prefix, recursively, as they come; order is the store's."""
    if is_local(uri):
        yield from _list_disk(uri)
        return
    system, path = filesystem(uri)
    for _, _, files in system.walk(path, detail=True):
        for name, info in files.items():
            if name and not info["name"].endswith("/"):
                yield Entry(uri=f"s3://{info['name']}", size_bytes=int(info["size"]), etag=_etag(info))


def _list_disk(folder: str) -> Iterator[Entry]:
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as items:
            for item in items:
                if item.is_dir(follow_symlinks=False):
                    pending.append(item.path)
                elif item.is_file():
                    yield describe_local(item.path, item.stat())


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
    end = None if length is None else start + length
    return cast(bytes, system.cat_file(path, start=start or None, end=end))


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

    `description` is the bundle's file that lists all others.
    """
    if is_local(uri):
        return Path(uri)
    try:
        described = read_bytes(join(uri, description))
    except FileNotFoundError as error:
        raise UsageError(f"{uri} is no detector bundle: {description} is missing") from error
    try:
        files = list(json.loads(described)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{uri}/{description} is damaged: {type(error).__name__}") from error
    cache = Path(os.environ.get("NSNET_CACHE", Path.home() / ".cache" / "nsnet")) / "detectors"
    folder = cache / hashlib.sha256(described).hexdigest()[:32]
    if (folder / description).is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        partial = Path(scratch) / "bundle"
        for name in files:
            target = (partial / name).resolve()
            if not target.is_relative_to(partial.resolve()):
                raise UsageError(f"{uri}/{description} names {name!r}, which does not belong in a bundle")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_bytes(join(uri, name)))
        (partial / description).write_bytes(described)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
