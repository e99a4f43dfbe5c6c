"""Write objects atomically: a reader sees the whole object or none."""

import email.utils
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jobs.storage import errors
from jobs.storage.filesystems import filesystem
from jobs.storage.reading import read_bytes
from jobs.storage.uris import bucket_and_key, is_local, join


@contextmanager
def naming(uri: str) -> Iterator[None]:
    """Add this file's name to OS errors of the body: errors while writing, such as a full disk, name no file."""
    try:
        yield
    except OSError as error:
        if error.errno in errors.ADVICE and error.filename is None:
            error.filename = uri
        raise


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object atomically: a reader sees the whole object or none."""
    system, path = filesystem(uri)
    if not is_local(uri):
        system.pipe_file(path, data)
        return
    os.replace(_write_partial(path, data), path)


def _write_partial(path: str, data: bytes) -> str:
    """Write and fsync a temporary file beside `path`, so that it survives a power failure; returns its path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.partial-{uuid.uuid4().hex[:8]}"
    with _removed_on_error(partial), open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return partial


@contextmanager
def _removed_on_error(partial: str) -> Iterator[None]:
    """Remove the file if the body fails: on a full disk it would use the remaining space."""
    try:
        with naming(partial):
            yield
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def create(uri: str, data: bytes) -> bool:
    """Write an object only if it does not exist; False: it exists already. Exactly one of several writers succeeds.

    S3: conditional put. Disks: a hard link to a complete file, which is atomic; without hard links, exclusive create.
    """
    if not is_local(uri):
        system, path = filesystem(uri)
        try:
            bucket, key = bucket_and_key(uri)
            system.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except OSError as error:
            answer = getattr(error.__cause__, "response", None) or {}
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status not in (409, 412):
                raise
            # if an answer is lost, the client's retry finds its own object
            return status == 412 and _has_content(uri, data)
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
        file = open(path, "xb")  # noqa: SIM115 - a file that existed before must not be removed below
    except FileExistsError:
        return False
    with _removed_on_error(path), file:
        file.write(data)
    return True


def _has_content(uri: str, data: bytes) -> bool:
    try:
        return read_bytes(uri) == data
    except FileNotFoundError:
        return False


def age_seconds(uri: str) -> float:
    """Seconds since an object was written, by its store's clock. Raises `FileNotFoundError`."""
    if is_local(uri):
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(uri), prefix=".now-") as probe:
            return os.stat(probe.name).st_mtime - os.stat(uri).st_mtime
    bucket, key = bucket_and_key(uri)
    answer = filesystem(uri)[0].call_s3("head_object", Bucket=bucket, Key=key)
    now = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - answer["LastModified"]).total_seconds())


def remove_file(uri: str) -> None:
    """Remove an object that this program made for its own use; does nothing if it does not exist."""
    system, path = filesystem(uri)
    try:
        system.rm_file(path)
    except FileNotFoundError:
        return


def upload_file(path: Path, uri: str) -> None:
    """Copy a local file to a URI atomically: a reader sees the whole file or none."""
    system, target = filesystem(uri)
    if not is_local(uri):
        system.put_file(str(path), target)
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.partial-{uuid.uuid4().hex[:8]}"
    with _removed_on_error(partial):
        shutil.copyfile(path, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    os.replace(partial, target)


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(uri, encode_json(value))


def encode_json(value: Any, indent: int | None = 2) -> bytes:
    """Encode JSON as `write_json` writes it; a lone surrogate, which foreign JSON may contain, stays an escape.

    `indent`: None: on one line.
    """
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def upload_folder(folder: Path, uri: str, last: str) -> None:
    """Copy a local folder to a URI; the file named `last` is written last and marks the copy as complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == last):
        write_bytes(join(uri, path.relative_to(folder).as_posix()), path.read_bytes())
