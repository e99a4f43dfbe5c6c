"""Fetch detector bundles from object stores, once per node, into its cache."""

import hashlib
import json
from pathlib import Path

from jobs.storage.node_cache import Refusal, Wanted, fetch_once
from jobs.storage.reading import read_bytes
from jobs.storage.uris import is_local, join
from nsnet import bundle
from nsnet.digest import is_digest
from nsnet.errors import BundleError
from nsnet.files import read_regular

COLLECTION = "detectors"


def fetch_bundle(uri: str, description: str, sha256: str | None = None) -> Path:
    """Return a detector bundle as a local folder; a remote bundle is cached under the hash of its description.

    `description` is the bundle's file that lists all others, each with its SHA-256. `sha256`: the hash that it must
    have, which so pins the bundle; whoever reads a local bundle must compare it again (`bundle.read`), since others may
    write there. A file that does not belong in a bundle, or exceeds its size limit, raises
    `BundleError`.
    """
    if is_local(uri):
        if sha256 is not None:
            bundle.check_pin(uri, _read_description(uri, description), sha256)
        return Path(uri)
    description_bytes = _read_description(uri, description)
    if sha256 is not None:
        bundle.check_pin(uri, description_bytes, sha256)
    refusal = Refusal(what=f"the bundle {uri}", error=BundleError)
    try:
        files = dict(json.loads(description_bytes)["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{uri}/{description} is damaged: {type(error).__name__}") from error
    if len(files) > bundle.MAX_FILES:
        raise BundleError(f"{uri}/{description} names {len(files)} files; a bundle holds at most {bundle.MAX_FILES}")
    wanted = {}
    for name, digest in files.items():
        if (content := bundle.member(name)) is None:
            raise BundleError(f"{uri}/{description} names {name!r}, which does not belong in a bundle")
        if not is_digest(digest):
            raise BundleError(f"{uri}/{description} is damaged: it has no SHA-256 of {name}")
        wanted[name] = Wanted(uri=join(uri, name), sha256=digest, max_bytes=content.max_bytes)
    folder = hashlib.sha256(description_bytes).hexdigest()[:32]
    return fetch_once(COLLECTION, folder, wanted, {description: description_bytes}, refusal)


def description_digest(uri: str) -> str:
    """SHA-256 of a bundle's description, which holds the SHA-256 of every other file: it pins the bundle."""
    return hashlib.sha256(_read_description(uri, bundle.DESCRIPTION)).hexdigest()


def _read_description(uri: str, description: str) -> bytes:
    try:
        if is_local(uri):
            return read_regular(Path(uri) / description, bundle.MAX_DESCRIPTION_BYTES)
        return read_bytes(join(uri, description), 0, bundle.MAX_DESCRIPTION_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{uri} is no detector bundle: {description} is missing") from error
