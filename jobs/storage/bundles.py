"""Fetch detector bundles from object stores, once, into a cache on this machine."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from jobs.storage.reading import read_bytes
from jobs.storage.uris import is_local, join
from nsnet import bundle
from nsnet.errors import BundleError

BUNDLE_PIECE_BYTES: Final = 2**26


def fetch_bundle(uri: str, description: str) -> Path:
    """Return a detector bundle as a local folder; a remote bundle is cached under the hash of its description.

    `description` is the bundle's file that lists all others, each with its SHA-256. A file that does not belong in a
    bundle, or exceeds its size limit, raises `BundleError`.
    """
    if is_local(uri):
        return Path(uri)
    try:
        description_bytes = read_bytes(join(uri, description), 0, bundle.MAX_DESCRIPTION_BYTES)
    except FileNotFoundError as error:
        raise BundleError(f"{uri} is no detector bundle: {description} is missing") from error
    try:
        files = dict(json.loads(description_bytes)["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{uri}/{description} is damaged: {type(error).__name__}") from error
    if unknown := [name for name in files if bundle.member(name) is None]:
        raise BundleError(f"{uri}/{description} names {unknown[0]!r}, which does not belong in a bundle")
    if len(files) > bundle.MAX_FILES:
        raise BundleError(f"{uri}/{description} names {len(files)} files; a bundle holds at most {bundle.MAX_FILES}")
    cache = Path(os.environ.get("NSNET_CACHE") or Path.home() / ".cache" / "nsnet") / "detectors"
    folder = cache / hashlib.sha256(description_bytes).hexdigest()[:32]
    if (folder / description).is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        partial = Path(scratch) / "bundle"
        partial.mkdir()
        for name, digest in files.items():
            if _fetch_member(uri, name, partial / name) != digest:  # the cache must not keep it
                raise BundleError(
                    f"the bundle {uri} is damaged: the SHA-256 of {name} is not the one that was recorded"
                )
        (partial / description).write_bytes(description_bytes)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _fetch_member(uri: str, name: str, path: Path) -> str:
    """Download a file of a remote bundle; returns its SHA-256. In pieces: the store's sizes are not trusted."""
    content = bundle.member(name)
    bytes_left, sha = content.max_bytes if content is not None else 0, hashlib.sha256()
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        while True:
            try:
                piece = read_bytes(join(uri, name), file.tell(), BUNDLE_PIECE_BYTES)
            except FileNotFoundError as error:
                raise BundleError(f"the bundle {uri} is damaged: {name} is missing") from error
            bytes_left -= len(piece)
            if bytes_left < 0:
                raise BundleError(f"{name} of the bundle {uri} exceeds its size limit")
            file.write(piece)
            sha.update(piece)
            if len(piece) < BUNDLE_PIECE_BYTES:
                return sha.hexdigest()
