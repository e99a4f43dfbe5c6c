"""Addresses of files and objects: local paths and `s3://`; nothing is opened here."""

import os
from typing import Final, Self

from jobs.storage.redaction import REFUSED, holds_secrets, shown
from nsnet.errors import UsageError

SCHEMES: Final = ("file", "s3")


class Uri(str):
    """An absolute address: `s3://bucket/key`, or the absolute path of a local file.

    Made where a command or a row of a manifest gives an address; from there on it travels as this value, and nothing
    resolves it again. It is the text that is recorded and hashed into ids. Raises `UsageError` for other schemes, for
    no place at all, for what is not UTF-8, and for an address with a password or a signature: it would be printed and
    recorded.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if isinstance(text, cls):
            return text
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"{shown(ascii(text))} is not UTF-8: rename it, or name a folder above it")
        return super().__new__(cls, located(text))


def located(uri: str) -> str:
    """The absolute address of what is only read here and recorded nowhere: a local file may have any name."""
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


def model_path(path: str) -> Uri:
    """The absolute path of weights given on the command line; they must be local, on every node."""
    uri = Uri(path)
    if not is_local(uri):
        raise UsageError(f"{uri}: weights must be a local path that every node has")
    return uri


def join(uri: str, *parts: str) -> Uri:
    """A URI below another, which must be absolute."""
    return str.__new__(Uri, "/".join([uri.rstrip("/"), *parts]))


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
