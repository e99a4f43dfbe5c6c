"""Removal of what this program made below an output: only files with names of its own, and folders that are empty then.

On disks no link is followed, not even one that takes a folder's place at that moment: each folder is opened below the
one before it.
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
"""Files that a line names."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A removal below `uri`, and what it did."""

    uri: str
    own: Own
    keep: Callable[[str], bool] = lambda path: False
    """Own files that stay, by their path below `uri`."""
    dry: bool = False
    """Nothing is removed."""
    removed: list[str] = field(default_factory=list)
    """URIs of files that were removed."""
    foreign: list[str] = field(default_factory=list)
    """URIs of what lies there besides; a folder ends with `/`."""

    def in_bucket(self) -> None:
        """Object by object: fsspec's own removal takes `*`, `?` and `[` in a name for a pattern, and loses errors."""
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
        """File by file below open folders."""
        if os.path.lexists(self.uri) and (os.path.islink(self.uri) or not os.path.isdir(self.uri)):
            self.foreign.append(self.uri)
        elif (folder := _opened(self.uri)) is not None:
            self._sweep(folder, "")
            if not self.dry:
                with suppress(OSError):  # it is not empty
                    os.rmdir(self.uri)

    def _sweep(self, folder: int, path: str) -> None:
        """Go through an open folder, `path` below `uri`, and close it. It goes as deep as `own.folders` does."""
        try:
            with os.scandir(folder) as items:
                found = list(items)
            for item in found:
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
    """Remove the files below a folder that are `own` and not to `keep`, by their path below it; all else stays.

    `dry`: only look. Raises `StorageError` on a disk that does not allow it, and what an object store raises.
    """
    removal = Removal(uri=uri, own=own, keep=keep, dry=dry)
    try:
        removal.on_disk() if uris.is_local(uri) else removal.in_bucket()
    except PermissionError as error:
        raise StorageError(f"{uri} cannot be cleaned up: {error}; allow it, or remove it by hand") from error
    return removal


def left_alone(places: Sequence[str]) -> str:
    """The line for the person who runs the command."""
    more = f" and {len(places) - MAX_NAMED:,} more" if len(places) > MAX_NAMED else ""
    return f"left alone, since no run of this program made it: {', '.join(sorted(places)[:MAX_NAMED])}{more}"


def _opened(name: str, within: int | None = None) -> int | None:
    """Descriptor of a folder; None: it is gone, or a link has taken its place."""
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
