"""Fetch verified files once per node: the first process downloads them into a cache, the others wait for it.

The cache is `NSNET_CACHE`, else `~/.cache/nsnet`. A folder in it is complete or absent: files are downloaded into a
folder beside it, hashed on the way, and renamed together. A lock (`flock`) that the kernel releases with its process
lets one process download; where a file system has no locks, several may, and the folder of the last rename stays. Each
process hashes a cached file before it first uses it, and compares the names in the folder with those that it asked for,
so that a folder that was changed is fetched again. The cache must be local to the node: locks of other nodes are not
seen on every shared file system.
"""

import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from jobs.storage.reading import read_bytes
from jobs.storage.uris import Uri
from nsnet.digest import known_digest
from nsnet.errors import NsnetError, StorageError
from nsnet.files import read_regular

PIECE_BYTES: Final = 2**26
PARTIAL: Final = ".partial-"
"""Between the name of a folder and eight hexadecimal digits, in the name of a folder that is being filled."""
FOLDER_MODE: Final = 0o555
FILE_MODE: Final = 0o444
WITHOUT_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file to fetch."""

    uri: Uri
    sha256: str
    max_bytes: int
    """Size limit: sizes that a store reports are not trusted."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """How an error names what was fetched."""

    what: str
    """Such as `the bundle s3://…`."""
    error: type[NsnetError]
    remedy: str = ""
    """Follows the reason, after a colon."""

    def __call__(self, reason: str) -> NsnetError:
        return self.error(f"{self.what} is damaged: {reason}{f': {self.remedy}' if self.remedy else ''}")


def fetch_once(
    collection: str, name: str, files: Mapping[str, Wanted], added: Mapping[str, bytes], refusal: Refusal
) -> Path:
    """Return the folder `name` of a collection in the cache, with `files` as they were asked for, and `added`.

    `name` must be a function of the hashes of all files. File names are relative paths, which the caller has checked.
    """
    folder = _root() / collection / name
    if _is_whole(folder, files, added):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_root() / "locks" / f"{collection}-{name}") as alone:
        if _is_whole(folder, files, added):  # by the process that this one waited for
            return folder
        if alone:
            for stale in _partials(folder):  # of a process that was killed
                _remove(stale)
        partial = _new_partial(folder, [*files, *added])
        try:
            for file, wanted in files.items():
                _download(wanted, partial / file, file, refusal)
            for file, content in added.items():
                _write(partial / file, content)
            _make_read_only(partial)
            if _entries(partial) != _expected([*files, *added]):
                raise _not_local(partial)
            if folder.exists():  # damaged on this disk; processes that have its files open keep them
                damaged = _new_name(folder)
                with suppress(FileNotFoundError):
                    folder.rename(damaged)
                _remove(damaged)
            try:
                partial.rename(folder)
            except OSError:  # without locks, another process may have been faster
                if not _is_whole(folder, files, added):
                    raise
            _sync_folder(folder.parent)
        except FileNotFoundError as error:
            if partial.exists():
                raise
            raise _not_local(partial) from error
        finally:
            _remove(partial)
    return folder


def _root() -> Path:
    return Path(os.environ.get("NSNET_CACHE") or Path.home() / ".cache" / "nsnet")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock of this node; yields whether no other process can hold it: some file systems have no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            yield False
            return
        yield True


def _is_whole(folder: Path, files: Mapping[str, Wanted], added: Mapping[str, bytes]) -> bool:
    """Whether a cached folder holds these files, unchanged, and nothing else.

    Hashes each file once per process, about 1 s per GB.
    """
    try:
        return (
            _entries(folder) == _expected([*files, *added])
            and all(known_digest(folder / name) == wanted.sha256 for name, wanted in files.items())
            and all(read_regular(folder / name, len(content)) == content for name, content in added.items())
        )
    except OSError:  # removed or replaced meanwhile
        return False


def _entries(folder: Path) -> dict[str, int]:
    """Relative path and file type of everything below a folder. Links are not followed."""
    return {path.relative_to(folder).as_posix(): stat.S_IFMT(path.lstat().st_mode) for path in folder.rglob("*")}


def _expected(names: Iterable[str]) -> dict[str, int]:
    """What `_entries` returns for a folder that holds these files only."""
    files = dict.fromkeys(names, stat.S_IFREG)
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents} - {"."}
    return {**files, **dict.fromkeys(folders, stat.S_IFDIR)}


def _partials(folder: Path) -> list[Path]:
    """Folders beside `folder` that have the name of one that is being filled in its place."""
    pattern = re.compile(re.escape(f"{folder.name}{PARTIAL}") + "[0-9a-f]{8}")
    return [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]


def _not_local(partial: Path) -> StorageError:
    return StorageError(
        f"another process removed {partial} or a part of it while this one filled it, which the lock of the cache "
        f"prevents on one node: NSNET_CACHE ({_root()}) must be local to the node, such as a folder on its own disk"
    )


def _new_name(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{PARTIAL}{uuid.uuid4().hex[:8]}")


def _new_partial(folder: Path, names: Iterable[str]) -> Path:
    """Create the folder that is filled, with the folders of these files."""
    partial = _new_name(folder)
    partial.mkdir()
    for name in names:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
    return partial


def _make_read_only(folder: Path) -> None:
    for path, _, _ in os.walk(folder, topdown=False):
        os.chmod(path, FOLDER_MODE)


def _remove(partial: Path) -> None:
    """Remove a folder that this module made, whose folders may be read-only; a link is left alone."""
    if partial.is_symlink():
        return
    for path, _, _ in os.walk(partial):
        with suppress(OSError):
            os.chmod(path, 0o700)
    shutil.rmtree(partial, ignore_errors=True)


def _download(wanted: Wanted, path: Path, name: str, refusal: Refusal) -> None:
    """Download a file in pieces, and refuse it unless it has the wanted hash."""
    sha, left = hashlib.sha256(), wanted.max_bytes
    with path.open("wb") as file:
        while True:
            try:
                piece = read_bytes(wanted.uri, file.tell(), PIECE_BYTES)
            except FileNotFoundError as error:
                raise refusal(f"{name} is missing ({wanted.uri})") from error
            left -= len(piece)
            if left < 0:
                raise refusal(f"{name} ({wanted.uri}) exceeds its size limit of {wanted.max_bytes} bytes")
            sha.update(piece)
            file.write(piece)
            if len(piece) < PIECE_BYTES:
                break
        _finish(file)
    if (digest := sha.hexdigest()) != wanted.sha256:
        raise refusal(f"the SHA-256 of {name} ({wanted.uri}) is {digest}, but {wanted.sha256} was recorded")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _finish(file)


def _finish(file: io.BufferedWriter) -> None:
    """Make a file read-only, and durable before its folder gets its final name."""
    file.flush()
    os.fchmod(file.fileno(), FILE_MODE)
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
