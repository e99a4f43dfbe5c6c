"""Reads and writes detector bundles: folders of JSON, safetensors and a model card. Nothing in one is ever unpickled.

    detector.json            version, configuration, calibration, training record, SHA-256 of every file and of itself
    MODEL_CARD.md
    network.safetensors      mapper, head, semantic basis
    lora/                    the adapters in peft's format
    clip/                    CLIP in open_clip's format, only if it has no public source or the whole tower was trained
    text/                    the model of a separate text tower in open_clip's format, only if it has random weights
    captioner/               BLIP in transformers' format, only if it has no public source

`detector.json` is written last: a folder without it is not a bundle. A file that it does not list is refused, because a
loader might prefer it to a listed one. The card may be edited, and hidden files are ignored. `model_settings` defines
the content that the JSON files may have.

The `detector_id` covers configuration, calibration, CLIP and every file; `read` recomputes and compares it. In version
1 it covered no files but weights and word lists: such a bundle is checked by that rule, keeps its id, and `note` warns.
The seal is a hash, not a signature: it detects damage, but anyone can compute it.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from nsnet import model_files
from nsnet.card import model_card
from nsnet.digest import file_digest
from nsnet.errors import BundleError, WeightsError
from nsnet.files import read_regular
from nsnet.model_files import Content

FORMAT_VERSION: Final = 2
DESCRIPTION: Final = "detector.json"
CARD: Final = "MODEL_CARD.md"
NETWORK: Final = "network.safetensors"
LORA: Final = "lora"
CLIP: Final = "clip"
TEXT: Final = "text"
CAPTIONER: Final = "captioner"

DIGESTS: Final = "+"
"""Between the digests of image tower and separate text tower."""
MAX_FILES: Final = 100
MAX_DESCRIPTION_BYTES: Final = 2**24
_NETWORK: Final = Content(tensors=True, max_bytes=2**32)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of `detector.json`."""

    detector_id: str
    """First 16 hexadecimal digits of the SHA-256 over configuration, calibration, CLIP's digest and all files."""
    config: dict[str, Any]
    calibration: dict[str, Any]
    training: dict[str, Any]
    """Data, split, settings and validation numbers; {} for an untrained detector."""
    clip_digest: str
    """`Clip.digest` of the base weights, with that of a separate text tower as IMAGE+TEXT; others are refused."""
    files: dict[str, str]
    """Path in the bundle -> SHA-256."""
    format_version: int = FORMAT_VERSION

    @property
    def note(self) -> str:
        """A one-line warning about a bundle of an older version; "" for the current one."""
        if self.format_version == FORMAT_VERSION:
            return ""
        return (
            f"detector {self.detector_id} is a bundle of format version {self.format_version}: its id does not cover "
            f"the JSON files beside its weights; run `nsnet calibrate` to write it in version {FORMAT_VERSION}"
        )


def seal(
    folder: Path, *, config: dict[str, Any], calibration: dict[str, Any], training: dict[str, Any], clip_digest: str
) -> Description:
    """Write the model card and then `detector.json`, which lists the files of the folder.

    Raises `BundleError` for files that `read` would refuse.
    """
    members = _members(folder)
    if unknown := [name for name in members if member(name) is None]:
        raise BundleError(
            f"a bundle holds only {NETWORK} and the known files of {', '.join(model_files.FOLDERS)}; found "
            f"{', '.join(unknown[:9])}"
        )
    files = {name: _checked_digest(folder, name) for name in members}
    description = Description(
        detector_id=_identity(FORMAT_VERSION, config, calibration, clip_digest, files),
        config=config,
        calibration=calibration,
        training=training,
        clip_digest=clip_digest,
        files=files,
    )
    card = model_card(description.detector_id, config, calibration, description.training)
    (folder / CARD).write_text(card, encoding="utf-8")
    partial = folder / f".{DESCRIPTION}.partial"
    values = json.loads(json.dumps(vars(description)))  # the same types as in `read`
    partial.write_text(json.dumps({**values, "sha256": _seal_of(values)}, indent=2) + "\n")
    os.replace(partial, folder / DESCRIPTION)
    return description


def read(folder: Path, sha256: str | None = None) -> Description:
    """Read and verify a bundle. Raises `BundleError` if it is missing, damaged or of another version; names the file.

    The digest of every file and the content of every JSON file are checked before a library opens any of them.
    `sha256`: the SHA-256 that `detector.json` must have, which so pins the bundle; it is that of the bytes that are
    parsed.
    """
    path = folder / DESCRIPTION
    try:
        data = read_regular(path, MAX_DESCRIPTION_BYTES)
        if sha256 is not None:
            check_pin(str(folder), data, sha256)
        return _verified(folder, _unsealed(path, data))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{folder} is no detector bundle: {DESCRIPTION} is missing") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def check_pin(bundle: str, description: bytes, sha256: str) -> None:
    """Raise `BundleError` unless the content of a bundle's `detector.json` has this SHA-256."""
    if (found := hashlib.sha256(description).hexdigest()) != sha256:
        raise BundleError(
            f"the bundle {bundle} is not the one that --detector-sha256 pins: the SHA-256 of its {DESCRIPTION} is "
            f"{found}, not {sha256}"
        )


def _unsealed(path: Path, data: bytes) -> dict[str, Any]:
    """Return the content of `detector.json` after checking its version and its hash."""
    values = json.loads(data)
    version = values["format_version"]
    if version not in (1, FORMAT_VERSION):
        raise BundleError(
            f"{path.parent} is a bundle of format version {repr(version)[:40]}; this release reads versions 1 and "
            f"{FORMAT_VERSION}: train again, or use the release that wrote it"
        )
    if values.pop("sha256", None) != _seal_of(values):
        raise BundleError(f"{path} is damaged: it was changed after it was written")
    return cast(dict[str, Any], values)


def _verified(folder: Path, values: dict[str, Any]) -> Description:
    """Return the description after checking its types, its id and every file of the bundle."""
    description, path = Description(**values), folder / DESCRIPTION
    kinds = {"detector_id": str, "clip_digest": str, "config": dict, "training": dict, "files": dict}
    for name, kind in {**kinds, "format_version": int}.items():
        if type(values[name]) is not kind:
            raise TypeError(f"{name} must be {kind.__name__}")
    if len(description.files) > MAX_FILES:
        raise BundleError(f"{path} names {len(description.files)} files; a bundle holds at most {MAX_FILES}")
    for name, expected in description.files.items():
        if member(name) is None:
            raise BundleError(f"{path} names {name!r}, which does not belong in a bundle")
        if not (folder / name).exists():
            raise BundleError(f"the bundle {folder} is damaged: {name} is missing")
        if _checked_digest(folder, name, expected) != expected:
            raise BundleError(f"the bundle {folder} is damaged: the SHA-256 of {name} is not the one that was recorded")
    if description.detector_id != _identity(
        description.format_version,
        description.config,
        description.calibration,
        description.clip_digest,
        description.files,
    ):
        raise BundleError(f"{path} is damaged: its detector_id is not that of its content")
    if unlisted := [name for name in _members(folder) if name not in description.files]:
        raise BundleError(
            f"the bundle {folder} holds files that {DESCRIPTION} does not list: {', '.join(unlisted[:9])}"
        )
    return description


def member(name: str) -> Content | None:
    """The content that a file of a bundle may have; None if it is not allowed (pickled weights, code, path outside)."""
    return _NETWORK if name == NETWORK else model_files.bundled(name)


def _checked_digest(folder: Path, name: str, expected: str = "") -> str:
    """SHA-256 of a file of a bundle; the content of JSON is checked if the digest is as expected. `BundleError`."""
    content = cast(Content, member(name))
    try:
        path = model_files.inside(folder, name)
        if content.rules is None:
            if path.stat().st_size > content.max_bytes:
                raise BundleError(f"{folder / name} is larger than {content.max_bytes} bytes")
            return file_digest(path)
        data = read_regular(path, content.max_bytes)
        digest = hashlib.sha256(data).hexdigest()
        if digest == expected or not expected:
            model_files.check(data, content, str(folder / name))
        return digest
    except OSError as error:
        raise BundleError(f"{folder / name} cannot be read: {error.strerror or error}") from error
    except WeightsError as error:
        raise BundleError(str(error)) from error


def captioner_of(folder: Path) -> Path | None:
    """The folder of the captioner inside a bundle; None if the bundle has none."""
    captioner = folder / CAPTIONER
    return captioner if captioner.is_dir() else None


def _identity(
    version: int, config: dict[str, Any], calibration: dict[str, Any], clip_digest: str, files: dict[str, str]
) -> str:
    """Compute the `detector_id` by the rule of a format version."""
    endings = (".safetensors", ".txt") if version == 1 else ("",)
    covered = [[name, digest] for name, digest in sorted(files.items()) if name.endswith(endings)]
    content = json.dumps([config, calibration, clip_digest, covered], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _members(folder: Path) -> list[str]:
    """Sorted paths of everything in the bundle except real folders, the description, the card and hidden files.

    A FIFO or a link to a folder is included, so that it is refused: a loader would wait for it or read another folder.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [name for name in names if name not in (DESCRIPTION, CARD) and not f"/{name}".count("/.")]


def _seal_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
