"""Remove this program's files below an output, by their names, and the folders that are then empty.

On disks no link is followed, not even one that replaces a folder during the removal: each folder is opened relative to
its parent's descriptor.
"""

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from jobs.runs.names import Own
from jobs.storage import filesystems, listing, uris, writing
from nsnet.errors import StorageError

MAX_NAMED: Final = 3
"""Maximum number of files that a message names."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A removal below `uri`, and its result."""

    uri: str
    own: Own
    keep: Callable[[str], bool] = lambda path: False
    """Whether an own file stays, given its path below `uri`."""
    dry: bool = False
    """Only look, remove nothing."""
    removed: list[str] = field(default_factory=list)
    """URIs of removed files."""
    foreign: list[str] = field(default_factory=list)
    """URIs of other files and folders there; a folder ends with `/`."""

    def in_bucket(self) -> None:
        """Remove object by object: fsspec's recursive removal treats `*`, `?` and `[` as patterns, and loses errors."""
        for entry in listing.list_files(self.uri):
            path = entry.uri.removeprefix(f"{self.uri.rstrip('/')}/")
            if not self.own.files.fullmatch(path):
                self.foreign.append(entry.uri)
            elif not self.dry and not self.keep(path):
                self.removed.append(entry.uri)
        with ThreadPoolExecutor(filesystems.LISTING_THREADS) as pool:
            for done in [pool.submit(writing.remove_file, uri) for uri in self.removed]:
                done.result()

    def on_disk(self) -> None:
        """Remove file by file, relative to descriptors of open folders."""
        if os.path.lexists(self.uri) and (os.path.islink(self.uri) or not os.path.isdir(self.uri)):
            self.foreign.append(self.uri)
        elif (folder := _opened(self.uri)) is not None:
            self._sweep(folder, "")
            if not self.dry:
                with suppress(OSError):  # it is not empty
                    os.rmdir(self.uri)

    def _sweep(self, folder: int, path: str) -> None:
        """Clean an open folder, `path` below `uri`, and close it. Enters only folders that match `own.folders`."""
        try:
            with os.scandir(folder) as items:
                entries = list(items)
            for item in entries:
                name = f"{path}{item.name}"
                is_folder = item.is_dir(follow_symlinks=False)
                if is_folder and self.own.folders.fullmatch(name):
                    if (below := _opened(item.name, folder)) is not None:
                        self._sweep(below, f"{name}/")
                        if not self.dry:
                            with suppress(OSError):  # it is not empty
                                os.rmdir(item.name, dir_fd=folder)
                elif is_folder or not item.is_file(follow_symlinks=False) or not self.own.files.fullmatch(name):
                    self.foreign.append(uris.join(self.uri, name) + "/" * is_folder)
                elif not self.dry and not self.keep(name):
                    with suppress(FileNotFoundError):
                        os.unlink(item.name, dir_fd=folder)
                        self.removed.append(uris.join(self.uri, name))
        finally:
            os.close(folder)


def remove(uri: str, own: Own, keep: Callable[[str], bool] = lambda path: False, dry: bool = False) -> Removal:
    """Remove the files below a folder whose path below it is `own` and not to `keep`; all else stays.

    `dry`: only look. Raises `StorageError` if a disk denies permission, and what an object store raises.
    """
    removal = Removal(uri=uri, own=own, keep=keep, dry=dry)
    try:
        removal.on_disk() if uris.is_local(uri) else removal.in_bucket()
    except PermissionError as error:
        raise StorageError(
            f"{uri} cannot be cleaned up: {error}; grant write permission, or remove it by hand"
        ) from error
    return removal


def left_alone(places: Sequence[str]) -> str:
    """The message that names files which were not removed."""
    more = f" and {len(places) - MAX_NAMED:,} more" if len(places) > MAX_NAMED else ""
    return f"left alone, since no run of this program made it: {', '.join(sorted(places)[:MAX_NAMED])}{more}"


def _opened(name: str, within: int | None = None) -> int | None:
    """Descriptor of a folder; None: it does not exist, or is a link."""
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
