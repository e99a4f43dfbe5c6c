"""Rows of a manifest (`schema.MANIFEST`): identity, place and facts of an image before it is fetched."""

import hashlib
import posixpath
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from jobs.dataset.labels import is_missing, text
from jobs.dataset.path_labels import Labels
from jobs.dataset.schema import MANIFEST
from jobs.storage import uris
from jobs.storage.redaction import REFUSED, holds_secrets, shown, without_secrets
from jobs.storage.uris import Uri
from nsnet.errors import UsageError

CONTAINERS: Final = (".tar", ".parquet")
"""Endings of files that hold images."""
HASH: Final = "content_hash"
"""Column of a manifest with the SHA-256 that a file must have; a stored image comes with its own bytes."""
FACTS: Final = ("uri", "etag", "size_bytes", HASH, "container", "position")
"""Columns of a manifest beside labels; the last two are of images that lie in a tar or in Parquet."""

NUMBER: Final = re.compile(
    r"(?<![^\W_])(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?=[a-f]*[0-9])[0-9a-f]{8,})(?![^\W_])|[0-9]+",
    re.IGNORECASE,
)
"""What differs between the names of containers of one data set: a UUID, a digest, a number. The first two stand alone.
`a0000001` counts as a digest: series that are taken for one may lose labels, one that is parted may get wrong ones.
"""
SERIES: Final = "series"
"""Of a row whose label is a number without a name: the containers whose numbers mean the same."""

_EMPTY_ROW: Final = dict.fromkeys((*MANIFEST.names, *Labels._fields, SERIES))


class RowError(Exception):
    """A row of somebody's manifest that names no image which can be read; it becomes a failed row."""


def image_id(uri: str, etag: str) -> str:
    """Identity of a version of an object: 32 hexadecimal digits of SHA-256 over URI and version."""
    return hashlib.sha256(f"{uri}\0{etag}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


def row(uri: str, etag: str, size_bytes: int | None, *, listed: bool = False, **values: Any) -> dict[str, Any]:
    """A manifest row; what is not given is null."""
    own = {"image_id": image_id(uri, etag), "uri": uri, "etag": etag, "size_bytes": size_bytes, "listed": listed}
    return {**_EMPTY_ROW, **own, **values}


def series(container: str) -> str:
    """What the containers that one data set was divided into have in common: the name without numbers and digests."""
    folder, _, name = container.rpartition("/")
    return f"{folder}/{NUMBER.sub('', name)}"


def readable(name: str) -> str:
    """A name with bytes that are no UTF-8 written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def from_values(values: Mapping[str, Any], manifest: str, number: int, **labels: Any) -> dict[str, Any]:
    """The row that a manifest's values (`FACTS`) make; one that names no readable image says why in `problem`.

    `manifest`: its URI, which relative names are relative to; `number`: of the row, from 0.
    """
    etag = text(values.get("etag")) or ""
    try:
        size, inside = _size(values.get("size_bytes"), "size_bytes"), _inside(values, manifest)
        if inside and not is_missing(values.get("uri")):
            uri = readable(str(values["uri"]))  # inside a container it is a name, which a data set may have chosen
        else:
            uri = _place(values.get("uri"), manifest)
        return row(uri, etag, size, expected_hash=_hash(values.get(HASH)), **inside, **labels)
    except RowError as error:
        name = "" if is_missing(values.get("uri")) else readable(str(values["uri"]))
        # two names that differ in their secrets alone are two rows
        place = name if name and shown(name) == name else f"{manifest}#{number}"
        return row(place, etag, None, problem=f"row {number} of the manifest: {without_secrets(str(error))}", **labels)


def _place(name: Any, manifest: str) -> str:
    """The URI that a manifest names: absolute, or relative to its own folder."""
    if is_missing(name):
        raise RowError("it has no uri")
    uri = readable(str(name))
    if holds_secrets(uri):  # joined to a folder it would be a path
        raise RowError(f"{shown(uri)} {REFUSED}")
    if "://" not in uri and not uri.startswith("/"):
        folder = manifest.rpartition("/")[0]
        scheme, separator, path = folder.partition("://")
        uri = f"{scheme}{separator}{posixpath.normpath(f'{path}/{uri}')}" if separator else f"{folder}/{uri}"
        if separator and not uri.startswith(f"{scheme}://{path.partition('/')[0]}/"):
            raise RowError(f"{without_secrets(str(name))} leaves the bucket of the manifest")
    try:
        uri = Uri(uri)
    except UsageError as error:
        raise RowError(str(error)) from error
    if uris.is_local(uri) and not uris.is_local(manifest):
        raise RowError(f"{uri} lies on this machine's disk: a manifest in a bucket may name buckets only")
    return uri


def _inside(values: Mapping[str, Any], manifest: str) -> dict[str, Any]:
    """The file that holds the image of a row, and where in it, or nothing."""
    if is_missing(values.get("container")) or "position" not in values:
        return {}  # other tables have such columns, too
    position = _size(values["position"], "position")
    container = _place(values["container"], manifest)
    ending = PurePosixPath(container).suffix.lower()
    if ending not in CONTAINERS or position is None or (is_missing(values.get("size_bytes")) and ending == ".tar"):
        raise RowError(
            f"an image in {container[:200]!r} needs a container that ends in {' or '.join(CONTAINERS)}, a position, "
            "and in a tar its size_bytes"
        )
    return {"container": container, "position": position}


def _size(value: Any, name: str) -> int | None:
    """A number of bytes, or nothing."""
    if is_missing(value):
        return None
    try:
        size = int(value)
    except (ValueError, OverflowError, TypeError):
        size = -1
    if not 0 <= size < 2**63:
        raise RowError(f"{name} {str(value)[:80]!r} is no number of bytes")
    return size


def _hash(value: Any) -> str | None:
    """64 hexadecimal digits, small, or nothing."""
    if is_missing(value):
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", str(value)):
        raise RowError(f"{HASH} {str(value)[:80]!r} is no SHA-256 of 64 hexadecimal digits")
    return str(value).lower()
