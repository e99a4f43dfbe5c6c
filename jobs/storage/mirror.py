"""A mirror of published weights in a bucket or folder, from which workers without internet load them.

    <mirror>/models/<kind>--<model>--<version>.json   describes a model: its files, each with size and SHA-256
    <mirror>/files/<sha256>                           the content of a file, shared by all models that have it

A model's description is written last, and only if there is none: a model in a mirror never changes. A mirror is as
untrusted as any bucket: files are allowed by name as in a bundle (`nsnet.model_files`), no path in the mirror comes
from a description, and content is taken only with the recorded hash.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jobs.storage import listing, reading, writing
from jobs.storage.node_cache import PIECE_BYTES, Refusal, Wanted, fetch_once
from jobs.storage.uris import Uri, is_local, join
from nsnet import model_files
from nsnet.clip_weights import CONFIG_FILE
from nsnet.digest import ORIGIN, is_digest, is_origin, origin_file
from nsnet.errors import StorageError, WeightsError
from nsnet.published import CLIP, PublishedModel

FORMAT_VERSION: Final = 1
MODELS: Final = "models"
FILES: Final = "files"
COLLECTION: Final = "weights"
"""Of `node_cache`."""
MAX_DESCRIPTION_BYTES: Final = 2**20
MAX_FILES: Final = 100
REMEDY: Final = "remove this file from the mirror and run `nsnet weights mirror` again"


@dataclass(frozen=True, kw_only=True)
class MirroredFile:
    """Size and hash of a file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The description of a model in a mirror."""

    model: PublishedModel
    revision: str
    """Commit of the hub's repository that the files are of; "": they were given as local files."""
    files: Mapping[str, MirroredFile]
    """Name -> size and hash."""
    origin: list[list[str]] | None
    """Published files from which these were made; see `nsnet.published`."""

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size_bytes for file in self.files.values())

    def as_json(self) -> dict[str, Any]:
        """The content of the description."""
        return {
            "format_version": FORMAT_VERSION,
            **vars(self.model),
            "revision": self.revision,
            "files": {name: vars(file) for name, file in sorted(self.files.items())},
            "origin": self.origin,
        }


def description_uri(mirror: Uri, model: PublishedModel) -> Uri:
    """Where a model is described."""
    name = "--".join((model.kind, *model.model.split("/"), model.version))
    return join(mirror, MODELS, f"{name}.json")


def file_uri(mirror: Uri, file: MirroredFile) -> Uri:
    """Where the content of a file lies."""
    return join(mirror, FILES, file.sha256)


def read_entry(uri: Uri, model: PublishedModel | None = None) -> Entry:
    """Read and check a description; it must be of `model`, if given.

    Raises `FileNotFoundError`, and `WeightsError` if it is damaged or names what is not allowed.
    """
    _refuse_link(uri)
    fields = {"format_version": int, "kind": str, "model": str, "version": str, "revision": str, "files": dict}
    try:
        values = reading.read_json(uri, fields, REMEDY, MAX_DESCRIPTION_BYTES)
    except StorageError as error:  # a damaged mirror is wrong usage, as a damaged bundle is
        raise WeightsError(str(error)) from error
    if values["format_version"] != FORMAT_VERSION:
        raise WeightsError(
            f"{uri} is of format version {values['format_version']}; this release reads {FORMAT_VERSION}: use the "
            "release that wrote it"
        )
    named = PublishedModel(kind=values["kind"], model=values["model"], version=values["version"])
    if values["kind"] not in (CLIP, "captioner") or (model is not None and named != model):
        raise _damaged(uri, f"it describes {str(named)[:200]!r}{f', not {model}' if model is not None else ''}")
    if len(values["files"]) > MAX_FILES:
        raise _damaged(uri, f"it names {len(values['files'])} files, more than {MAX_FILES}")
    files = {name: _checked(uri, named, name, value) for name, value in values["files"].items()}
    if named.kind == CLIP and CONFIG_FILE not in files and len(files) != 1:
        raise _damaged(uri, f"it names {len(files)} files without {CONFIG_FILE}")
    origin = values.get("origin")
    if origin is not None and (
        not is_origin(origin) or any(name in files and files[name].sha256 != digest for name, digest in origin)
    ):
        raise _damaged(uri, "its origin is not that of its files")
    return Entry(model=named, revision=values["revision"], files=files, origin=origin)


def _checked(uri: Uri, model: PublishedModel, name: str, value: Any) -> MirroredFile:
    """A file of a description, if it is allowed."""
    content = model_files.content_of(model.kind, name)
    if content is None or not content.in_bundle:
        raise _damaged(uri, f"it names {name[:200]!r}, which does not belong to a {model.kind}")
    size, digest = (value.get(key) if isinstance(value, dict) else None for key in ("size_bytes", "sha256"))
    if type(size) is not int or not 0 < size <= content.max_bytes or not is_digest(digest):
        raise _damaged(uri, f"{name} has no size from 1 to {content.max_bytes} bytes, or no SHA-256")
    assert isinstance(digest, str)
    return MirroredFile(size_bytes=size, sha256=digest)


def _damaged(uri: Uri, reason: str) -> WeightsError:
    return WeightsError(f"{uri} is damaged ({reason}): {REMEDY}")


def _refuse_link(uri: Uri) -> None:
    if is_local(uri) and os.path.islink(uri):
        raise WeightsError(f"{uri} is a link: a mirror holds the files themselves; replace it with the file")


def fetch(mirror: Uri, model: PublishedModel, remedy: str) -> Path:
    """Return a model of a mirror as a local path that `find_weights` or `find_captioner` takes; fetched once per node.

    `remedy`: what to do about a missing model. Raises `WeightsError` if it is missing or damaged.
    """
    entry = _find(mirror, model, remedy)
    wanted = {}
    for name, file in entry.files.items():
        _refuse_link(uri := file_uri(mirror, file))
        wanted[name] = Wanted(uri=uri, sha256=file.sha256, max_bytes=file.size_bytes)
    digests = {name: file.sha256 for name, file in entry.files.items()}
    added = {} if entry.origin is None else {ORIGIN: origin_file(entry.origin, digests)}
    identity = json.dumps([model.kind, digests, added.get(ORIGIN, b"").decode() or None])
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    folder = fetch_once(COLLECTION, name, wanted, added, _refusal(mirror, model))
    if model.kind == CLIP and CONFIG_FILE not in entry.files:
        return folder / next(iter(entry.files))
    return folder


def require(mirror: Uri, model: PublishedModel, remedy: str) -> None:
    """Raise `WeightsError` if a model or a file of it is missing, or has another size. Fetches only its description."""
    for name, file in _find(mirror, model, remedy).files.items():
        uri = file_uri(mirror, file)
        if (size := size_of(uri)) != file.size_bytes:
            found = "is missing" if size is None else f"has {size:,} bytes, not {file.size_bytes:,}"
            raise _refusal(mirror, model)(f"{name} ({uri}) {found}")


def _refusal(mirror: Uri, model: PublishedModel) -> Refusal:
    remedy = f"`nsnet weights check {mirror}` names every damaged file"
    return Refusal(what=f"{model} in the mirror {mirror}", error=WeightsError, remedy=remedy)


def _find(mirror: Uri, model: PublishedModel, remedy: str) -> Entry:
    """The description of a model. Raises `WeightsError` if it is missing or damaged."""
    try:
        return read_entry(description_uri(mirror, model), model)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(f"the mirror {mirror} does not hold {model}: {remedy}") from error


def descriptions(mirror: Uri) -> list[Uri]:
    """The descriptions of all models of a mirror."""
    names = listing.names_below(join(mirror, MODELS))
    return [join(mirror, MODELS, name) for name in (*names.files, *names.others) if name.endswith(".json")]


def upload(mirror: Uri, entry: Entry, paths: Mapping[str, Path]) -> Iterator[tuple[str, bool]]:
    """Write a model to a mirror, its description last; yields each file's name and whether it had to be copied.

    `paths`: the files of the entry on this disk. Files that lie there in their size are not copied again. Raises
    `WeightsError` if the mirror describes this model with other files.
    """
    target = description_uri(mirror, entry.model)
    _refuse_others(target, entry)
    for name, file in entry.files.items():
        uri = file_uri(mirror, file)
        copied = size_of(uri) != file.size_bytes
        if copied:
            writing.upload_file(paths[name], uri)
        yield name, copied
    if not writing.create(target, writing.encode_json(entry.as_json())):
        _refuse_others(target, entry)


def _refuse_others(target: Uri, entry: Entry) -> None:
    """Raise `WeightsError` if a model is described with other files: workers may be loading them."""
    try:
        found = read_entry(target, entry.model)
    except FileNotFoundError:
        return
    if (found.files, found.origin) != (dict(entry.files), entry.origin):
        differing = sorted(
            name for name in {*found.files, *entry.files} if found.files.get(name) != entry.files.get(name)
        )
        raise WeightsError(
            f"{target} describes {entry.model} with other files ({', '.join(differing) or 'other origin'} differ); a "
            "mirror does not change: choose another --to, or remove this file if nothing loads from it"
        )


def size_of(uri: Uri) -> int | None:
    """Size of a file in a mirror; None: it is missing."""
    _refuse_link(uri)
    try:
        return listing.describe(uri).size_bytes
    except (FileNotFoundError, NotADirectoryError):
        return None


def digest_of(uri: Uri) -> str:
    """SHA-256 of a file in a mirror, read in pieces."""
    sha, offset = hashlib.sha256(), 0
    while True:
        piece = reading.read_bytes(uri, offset, PIECE_BYTES)
        sha.update(piece)
        offset += len(piece)
        if len(piece) < PIECE_BYTES:
            return sha.hexdigest()
