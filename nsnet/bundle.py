"""A trained detector on disk: a folder of JSON, safetensors and a model card. Nothing in it is ever unpickled.

    detector.json            version, configuration, calibration, training record, SHA-256 of every file and of itself
    MODEL_CARD.md
    network.safetensors      mapper, head, semantic basis
    lora/                    the adapters in peft's format
    clip/                    CLIP in open_clip's format, only where it has no public source or was trained itself
    captioner/               BLIP in transformers' format, only where it has no public source

`detector.json` is written last: a folder without it is no bundle. A file that it does not list is refused, since a
loader might prefer it to a listed one; the card is for people to edit, and hidden files are nobody's business.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nsnet.card import model_card
from nsnet.digest import file_digest
from nsnet.errors import BundleError

FORMAT_VERSION: Final = 1
DESCRIPTION: Final = "detector.json"
CARD: Final = "MODEL_CARD.md"
NETWORK: Final = "network.safetensors"
LORA: Final = "lora"
CLIP: Final = "clip"
CAPTIONER: Final = "captioner"

SUFFIXES: Final = {".json", ".safetensors", ".md", ".txt"}
"""What a bundle may hold; pickled weights, for one, have no place in it."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of `detector.json`."""

    detector_id: str
    """First 16 hexadecimal digits of the SHA-256 over configuration, calibration and all weights."""
    config: dict[str, Any]
    calibration: dict[str, Any]
    training: dict[str, Any]
    """Data, split, settings and validation numbers; {} for an untrained detector."""
    clip_digest: str
    """`Clip.digest` of the base weights, so that others are not taken for them."""
    files: dict[str, str]
    """Path in the bundle -> SHA-256."""


def seal(
    folder: Path, *, config: dict[str, Any], calibration: dict[str, Any], training: dict[str, Any], clip_digest: str
) -> Description:
    """Write the model card and, last, `detector.json` over the files that lie in the folder."""
    files = {name: file_digest(folder / name) for name in _members(folder)}
    strange = [name for name in files if Path(name).suffix not in SUFFIXES]
    if strange:
        raise BundleError(f"a bundle holds only {', '.join(sorted(SUFFIXES))} files, found {', '.join(strange)}")
    identity = json.dumps([config, calibration, clip_digest, _weights(files)], sort_keys=True).encode()
    description = Description(
        detector_id=hashlib.sha256(identity).hexdigest()[:16],
        config=config,
        calibration=calibration,
        training=training,
        clip_digest=clip_digest,
        files=files,
    )
    card = model_card(description.detector_id, config, calibration, description.training)
    (folder / CARD).write_text(card, encoding="utf-8")
    partial = folder / f".{DESCRIPTION}.partial"
    values = json.loads(json.dumps({"format_version": FORMAT_VERSION, **vars(description)}))  # as `read` will see it
    partial.write_text(json.dumps({**values, "sha256": _seal_of(values)}, indent=2) + "\n")
    os.replace(partial, folder / DESCRIPTION)
    return description


def read(folder: Path) -> Description:
    """Read and verify a bundle. Raises `BundleError`: missing, of another version, or damaged, and in which file."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{folder} is no detector bundle: {DESCRIPTION} is missing")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BundleError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{folder} is a bundle of format version {version!r}; this release reads version {FORMAT_VERSION}: train "
            "again, or use the release that wrote it"
        )
    if values.pop("sha256", None) != _seal_of(values):
        raise BundleError(f"{path} is damaged: it was changed after it was written")
    del values["format_version"]
    try:
        description = Description(**values)
    except TypeError as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    root = folder.resolve()
    for name, expected in description.files.items():
        member = (folder / name).resolve()
        if not member.is_relative_to(root) or member.suffix not in SUFFIXES:
            raise BundleError(f"{path} names {name!r}, which does not belong in a bundle")
        if not member.is_file():
            raise BundleError(f"the bundle {folder} is damaged: {name} is missing")
        if file_digest(member) != expected:
            raise BundleError(f"the bundle {folder} is damaged: the SHA-256 of {name} is not the one that was recorded")
    if strange := [name for name in _members(folder) if name not in description.files]:
        raise BundleError(f"the bundle {folder} holds files that {DESCRIPTION} does not list: {', '.join(strange[:9])}")
    return description


def captioner_of(folder: Path) -> Path | None:
    """The captioner inside a bundle, if it holds one."""
    own = folder / CAPTIONER
    return own if own.is_dir() else None


def _weights(files: dict[str, str]) -> list[list[str]]:
    """The files that decide a verdict; peft's and transformers' JSON may carry dates and versions."""
    return [[name, digest] for name, digest in sorted(files.items()) if name.endswith((".safetensors", ".txt"))]


def _members(folder: Path) -> list[str]:
    """Paths in the bundle, sorted, of all files but the description, the card and hidden ones."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if name not in (DESCRIPTION, CARD) and not f"/{name}".count("/.")]


def _seal_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
