"""Detector bundles in object stores: fetched once to a cache on this machine."""

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
    """A detector bundle as a local folder: a local one as it is, a remote one through a cache named by its content.

    `description` is the bundle's file that lists all others, each with its SHA-256. Nothing is written that has no
    place in a bundle, and nothing larger than it may be there.
    """
    if is_local(uri):
        return Path(uri)
    try:
        described = read_bytes(join(uri, description), 0, bundle.MAX_DESCRIPTION_BYTES)
    except FileNotFoundError as error:
        raise BundleError(f"{uri} is no detector bundle: {description} is missing") from error
    try:
        files = dict(json.loads(described)["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{uri}/{description} is damaged: {type(error).__name__}") from error
    if strange := [name for name in files if bundle.member(name) is None]:
        raise BundleError(f"{uri}/{description} names {strange[0]!r}, which does not belong in a bundle")
    if len(files) > bundle.MAX_FILES:
        raise BundleError(f"{uri}/{description} names {len(files)} files; a bundle holds at most {bundle.MAX_FILES}")
    cache = Path(os.environ.get("NSNET_CACHE") or Path.home() / ".cache" / "nsnet") / "detectors"
    folder = cache / hashlib.sha256(described).hexdigest()[:32]
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
        (partial / description).write_bytes(described)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _fetch_member(uri: str, name: str, path: Path) -> str:
    """Write a file of a remote bundle; its SHA-256. In pieces: neither its size nor the store's word is believed."""
    content = bundle.member(name)
    left, sha = content.max_bytes if content is not None else 0, hashlib.sha256()
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        while True:
            try:
                piece = read_bytes(join(uri, name), file.tell(), BUNDLE_PIECE_BYTES)
            except FileNotFoundError as error:
                raise BundleError(f"the bundle {uri} is damaged: {name} is missing") from error
            left -= len(piece)
            if left < 0:
                raise BundleError(f"{name} of the bundle {uri} is larger than it may be")
            file.write(piece)
            sha.update(piece)
            if len(piece) < BUNDLE_PIECE_BYTES:
                return sha.hexdigest()
