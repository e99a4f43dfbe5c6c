"""Parse and check addresses of files and objects: local paths and `s3://`. Opens nothing."""

import os
from typing import Final, Self

from jobs.storage.redaction import REFUSED, holds_secrets, shown
from nsnet.errors import UsageError

SCHEMES: Final = ("file", "s3")


class Uri(str):
    """An absolute address: `s3://bucket/key`, or the absolute path of a local file.

    An address becomes a `Uri` where it enters the program: on the command line or in a manifest row. A `Uri` of a `Uri`
    is the same. The text is recorded and hashed into ids.

    Raises `UsageError` for other schemes, an empty address, text that is not UTF-8, and an address
    with a password or a signature, which would be printed and recorded.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if isinstance(text, cls):
            return text
        if "\0" in text or (not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)):
            raise UsageError(f"{shown(ascii(text))} is not UTF-8: rename it, or name a folder above it")
        return super().__new__(cls, located(text))


def located(uri: str) -> str:
    """The absolute address of a file that is only read, not recorded, so that a local name need not be UTF-8."""
    if holds_secrets(uri):
        raise UsageError(f"{shown(uri)} {REFUSED}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role")
    scheme, separator, rest = uri.partition("://")
    if separator and scheme not in SCHEMES:
        raise UsageError(f"{uri}: only local paths and s3:// are supported, not {scheme}://")
    if not (rest if separator else uri) or (separator and scheme == "s3" and rest.startswith("/")):
        raise UsageError(f"{uri!r} names no file or bucket: give a path, or s3:// and a bucket")
    if separator and scheme == "s3":
        return uri.rstrip("/")
    return os.path.abspath(rest if separator else os.path.expanduser(uri))


def is_local(uri: str) -> bool:
    """Whether a URI is a local path."""
    return "://" not in uri


def model_path(path: str) -> Uri:
    """The absolute path of model weights from the command line; every node must have them locally."""
    uri = Uri(path)
    if not is_local(uri):
        raise UsageError(
            f"{uri}: weights must be a local path that every node has; from a bucket they load with --weights"
        )
    return uri


def join(uri: str, *parts: str) -> Uri:
    """Append path parts to an absolute URI."""
    return str.__new__(Uri, "/".join([uri.rstrip("/"), *parts]))


def arrow_path(uri: str) -> str:
    """The path of a URI in its pyarrow filesystem."""
    return uri.partition("://")[2] or uri


def failure_domain(uri: str) -> str:
    """Failure domain of a URI: its bucket, or "" for local disks."""
    return "" if is_local(uri) else bucket_and_key(uri)[0]


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def prefix_below(uri: str) -> str:
    """The prefix of all keys below a URI."""
    key = bucket_and_key(uri)[1]
    return f"{key}/" if key else ""
