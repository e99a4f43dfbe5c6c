"""Addresses of files and objects: local paths and `s3://`; nothing is opened here."""

import os
from typing import Final

from jobs.storage.redaction import REFUSED, holds_secrets, shown
from nsnet.errors import UsageError

SCHEMES: Final = ("file", "s3")


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


def arrow_path(uri: str) -> str:
    """The path of a URI in its pyarrow filesystem."""
    return uri.partition("://")[2] or uri


def failure_domain(uri: str) -> str:
    """What may be away as a whole: the bucket of a URI; "" for this machine's disks."""
    return "" if is_local(uri) else bucket_and_key(uri)[0]


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def prefix_below(uri: str) -> str:
    """The prefix of all keys below a URI."""
    key = bucket_and_key(uri)[1]
    return f"{key}/" if key else ""
