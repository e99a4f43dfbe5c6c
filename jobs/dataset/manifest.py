"""Build manifest rows (`schema.MANIFEST`): identity, address and known facts of an image before it is fetched."""

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
"""Column of a manifest with the SHA-256 that a file must have; not used for images stored in the manifest itself."""
MANIFEST_KEYS: Final = ("uri", "etag", "size_bytes", HASH, "container", "position")
"""Columns of a manifest beside labels; the last two describe images in a tar or in Parquet."""

NUMBER: Final = re.compile(
    r"(?<![^\W_])(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?=[a-f]*[0-9])[0-9a-f]{8,})(?![^\W_])|[0-9]+",
    re.IGNORECASE,
)
"""The variable parts in names of one data set's containers: a UUID, a digest, a number. The first two match as whole
words only. `a0000001` counts as a digest: merging two series may lose labels, splitting one may give wrong labels."""
SERIES: Final = "series"
"""Key of a row whose label is a number without a name: the containers in which numbers have the same meaning."""

_EMPTY_ROW: Final = dict.fromkeys((*MANIFEST.names, *Labels._fields, SERIES))


class RowError(Exception):
    """A row of a user's manifest that names no readable image; it becomes a failed row."""


def image_id(uri: str, etag: str) -> str:
    """Id of one version of an object: the first 32 hexadecimal digits of SHA-256 over URI and version."""
    return hashlib.sha256(f"{uri}\0{etag}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


def form_id(image_id: str, transform: str) -> str:
    """Id of an image under a transform, as `plan.FORM_ID` computes it in SQL."""
    return hashlib.sha256(f"{image_id}/{transform}".encode()).hexdigest()[:32]


def row(uri: str, etag: str, size_bytes: int | None, *, listed: bool = False, **values: Any) -> dict[str, Any]:
    """Build a manifest row; values not given are null."""
    own = {"image_id": image_id(uri, etag), "uri": uri, "etag": etag, "size_bytes": size_bytes, "listed": listed}
    return {**_EMPTY_ROW, **own, **values}


def series(container: str) -> str:
    """The common name of one data set's containers: a container's name without numbers and digests."""
    folder, _, name = container.rpartition("/")
    return f"{folder}/{NUMBER.sub('', name)}"


def readable(name: str) -> str:
    """A name with bytes that are not UTF-8 written as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def from_values(values: Mapping[str, Any], manifest: str, number: int, **labels: Any) -> dict[str, Any]:
    """A row from a manifest's values (`MANIFEST_KEYS`); if it names no readable image, `problem` holds the reason.

    `manifest`: its URI, the base of relative names; `number`: index of the row, from 0.
    """
    etag = text(values.get("etag")) or ""
    try:
        size, inside = _size(values.get("size_bytes"), "size_bytes"), _inside(values, manifest)
        if inside and not is_missing(values.get("uri")):
            uri = readable(str(values["uri"]))  # inside a container it is only a name
        else:
            uri = _place(values.get("uri"), manifest)
        return row(uri, etag, size, expected_hash=_hash(values.get(HASH)), **inside, **labels)
    except RowError as error:
        name = "" if is_missing(values.get("uri")) else readable(str(values["uri"]))
        # names that differ only in their secrets must stay different rows
        place = name if name and shown(name) == name else f"{manifest}#{number}"
        return row(place, etag, None, problem=f"row {number} of the manifest: {without_secrets(str(error))}", **labels)


def _place(name: Any, manifest: str) -> str:
    """The absolute URI of a name, which may be relative to the manifest's folder."""
    if is_missing(name):
        raise RowError("it has no uri")
    uri = readable(str(name))
    if holds_secrets(uri):  # tested before joining: a joined address would look like a path
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
        raise RowError(f"{uri} is a local path: a manifest in a bucket may name objects in buckets only")
    return uri


def _inside(values: Mapping[str, Any], manifest: str) -> dict[str, Any]:
    """Container and position of a row's image; empty for a plain file."""
    if is_missing(values.get("container")) or "position" not in values:
        return {}  # other tables have a column `container` too
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
    """A non-negative integer, or None if missing."""
    if is_missing(value):
        return None
    try:
        size = int(value)
    except (ValueError, OverflowError, TypeError):
        size = -1
    if not 0 <= size < 2**63:
        raise RowError(f"{name} {str(value)[:80]!r} is not a number of bytes")
    return size


def _hash(value: Any) -> str | None:
    """64 lower-case hexadecimal digits, or None if missing."""
    if is_missing(value):
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", str(value)):
        raise RowError(f"{HASH} {str(value)[:80]!r} is not a SHA-256 of 64 hexadecimal digits")
    return str(value).lower()
