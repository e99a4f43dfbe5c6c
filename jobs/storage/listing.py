"""List the objects below a folder or prefix with many threads; describe one object as an entry."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from jobs.storage.filesystems import LISTING_THREADS, filesystem, list_page
from jobs.storage.left_out import LeftOut
from jobs.storage.uris import bucket_and_key, is_local, prefix_below

LISTING_PAGE: Final = 1000
"""Objects per request, S3's maximum."""
FAN_OUT: Final = 64
"""Maximum sub-prefixes of an S3 prefix that are listed separately: one request per tiny folder would be slower than
one request per thousand keys."""
FAN_OUT_LEVELS: Final = 3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a listing."""

    uri: str
    size_bytes: int
    etag: str
    """Version of the content: S3's ETag; on disks, size and modification time."""
    modified_at: datetime
    """Modification time by the store's clock."""


def exists(uri: str) -> bool:
    """Whether an object or folder exists."""
    system, path = filesystem(uri)
    return bool(system.exists(path))


def is_folder(uri: str) -> bool:
    """Whether a URI is a local folder, or a prefix with at least one object."""
    if is_local(uri):
        return os.path.isdir(uri)
    return bool(list_page(uri, prefix_below(uri), 1).get("Contents"))


def list_files(uri: str, left_out: LeftOut | None = None) -> Iterator[Entry]:
    """All objects below a folder or prefix, recursively, in no order; many folders are listed in parallel.

    What cannot be listed is counted in `left_out` by reason. Without `left_out` it is an error: an unreadable folder
    must not look like an empty one. Links to folders are not followed: they may form circles.
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
            elif error is not None and not isinstance(error, FileNotFoundError):  # missing: removed since the listing
                raise error

        yield from _walk(uri, lambda folder: _list_disk(folder, leave_out))
    else:
        yield from _walk((prefix_below(uri), 0), lambda item: _list_s3(uri, *item))


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names directly below a folder or prefix; each list is sorted."""

    folders: list[str]
    files: list[str]
    others: list[str]
    """Links and special files on disks."""


def names_below(uri: str) -> Names:
    """Names directly below a folder or prefix; empty if it does not exist."""
    result = Names(folders=[], files=[], others=[])
    if is_local(uri):
        with os.scandir(uri) if os.path.isdir(uri) else nullcontext(()) as items:
            for item in items:
                is_folder, is_file = item.is_dir(follow_symlinks=False), item.is_file(follow_symlinks=False)
                (result.folders if is_folder else result.files if is_file else result.others).append(item.name)
    else:
        prefix = prefix_below(uri)
        for page in _pages(uri, prefix, Delimiter="/"):
            result.folders.extend(item["Prefix"][len(prefix) : -1] for item in page.get("CommonPrefixes", []))
            result.files.extend(item["Key"][len(prefix) :] for item in page.get("Contents", []))
    for names in (result.folders, result.files, result.others):
        names[:] = sorted(filter(None, names))  # an S3 prefix may be an object itself: a marker without a name
    return result


def versions_below(uri: str) -> dict[str, str]:
    """Name -> version of its content (as `Entry.etag`) of each file directly below a folder or prefix, sorted; "" for
    a link on a disk that leads nowhere. One request per thousand names.
    """
    found: dict[str, str] = {}
    if is_local(uri):
        with os.scandir(uri) if os.path.isdir(uri) else nullcontext(()) as items:
            for item in items:
                if not item.is_dir(follow_symlinks=False):
                    try:
                        found[item.name] = describe_local(item.path, item.stat()).etag
                    except OSError:
                        found[item.name] = ""
    else:
        prefix = prefix_below(uri)
        for page in _pages(uri, prefix, Delimiter="/"):
            found |= {info["Key"][len(prefix) :]: etag_of(info) for info in page.get("Contents", [])}
    return {name: found[name] for name in sorted(filter(None, found))}


def subfolders(uri: str) -> list[str]:
    """Names of the folders directly below a folder or prefix, sorted, without links to folders."""
    return names_below(uri).folders


def _walk(root: Any, listing: Callable[[Any], Iterator[tuple[list[Entry], list[Any]]]]) -> Iterator[Entry]:
    """Entries below `root`. `listing(folder)` yields pages: entries, and further folders to list.

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
                put((entries, len(further)))  # before they are submitted: the count must not fall to 0 early
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
    bucket, _ = bucket_and_key(uri)

    def entries(page: dict[str, Any]) -> list[Entry]:
        return [
            Entry(
                uri=f"s3://{bucket}/{info['Key']}",
                size_bytes=int(info["Size"]),
                etag=etag_of(info),
                modified_at=info["LastModified"],
            )
            for info in page.get("Contents", [])
        ]

    if level < FAN_OUT_LEVELS:
        page = list_page(uri, prefix, LISTING_PAGE, Delimiter="/")
        below = [item["Prefix"] for item in page.get("CommonPrefixes", [])]
        if "NextContinuationToken" not in page and len(below) <= FAN_OUT:
            yield entries(page), [(item, level + 1) for item in below]
            return
    for page in _pages(uri, prefix):
        yield entries(page), []


def _pages(uri: str, prefix: str, **settings: Any) -> Iterator[dict[str, Any]]:
    """All pages of S3's listing of a prefix."""
    page = list_page(uri, prefix, LISTING_PAGE, **settings)
    yield page
    while "NextContinuationToken" in page:
        page = list_page(uri, prefix, LISTING_PAGE, ContinuationToken=page["NextContinuationToken"], **settings)
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
    """Describe a file on disk as an entry."""
    changed = datetime.fromtimestamp(stat.st_mtime, UTC)
    return Entry(uri=path, size_bytes=stat.st_size, etag=f"{stat.st_size:x}-{stat.st_mtime_ns:x}", modified_at=changed)


def describe(uri: str) -> Entry:
    """Describe one object as an entry. Raises `FileNotFoundError`."""
    if is_local(uri):
        return describe_local(uri, os.stat(uri))
    system, path = filesystem(uri)
    info = system.info(path)
    return Entry(uri=uri, size_bytes=int(info["size"]), etag=etag_of(info), modified_at=info["LastModified"])


def etag_of(info: dict[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or "").strip('"')
