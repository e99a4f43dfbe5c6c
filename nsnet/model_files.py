"""Checks model folders from strangers before a library opens any of their files.

A folder of CLIP, of LoRA adapters or of a captioner holds JSON that can tell a library to import, run, download and
open things. Files are allowed by name, and settings in them by key (`model_settings`). Libraries get a private folder
(`opened`) that holds only allowed files, as they were checked; files that are added later are not visible to them.
Python code, and pickles in a bundle, are refused by name. Weights are too large to copy: a process that can write to
the folder during loading can change the tensors, but not the code that runs.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from nsnet import model_settings as settings
from nsnet import weight_formats
from nsnet.errors import WeightsError
from nsnet.files import read_regular
from nsnet.model_settings import Rule

MAX_JSON_BYTES: Final = 2**20
MAX_VOCABULARY_BYTES: Final = 2**27
MAX_WEIGHTS_BYTES: Final = 2**36
MAX_ENTRIES: Final = 1000
"""Maximum number of entries of a model folder."""

CODE: Final = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".pkl", ".pickle"}


@dataclass(frozen=True, kw_only=True)
class Content:
    """The allowed content of a file."""

    rules: Mapping[str, Rule] | None = None
    """Rules of a JSON object; None: the file holds data, not settings (words, tensors)."""
    max_bytes: int = MAX_JSON_BYTES
    tensors: bool = False
    for_libraries: bool = True
    """False: only this package reads it."""
    in_bundle: bool = True
    """False: not allowed in a bundle (weights that may be pickled, of which libraries read only tensors)."""


_WEIGHTS: Final = Content(tensors=True, max_bytes=MAX_WEIGHTS_BYTES)
_PICKLED: Final = Content(tensors=True, max_bytes=MAX_WEIGHTS_BYTES, in_bundle=False)
_WORDS: Final = Content(max_bytes=MAX_VOCABULARY_BYTES)
_TOKENIZER: Final[dict[str, Content]] = {
    r"tokenizer\.json": Content(rules=settings.TOKENIZER, max_bytes=MAX_VOCABULARY_BYTES),
    r"tokenizer_config\.json": Content(rules=settings.TOKENIZER_CONFIG),
    r"special_tokens_map\.json": Content(rules=settings.SPECIAL_TOKENS),
    r"added_tokens\.json|vocab\.json|vocab\.txt|merges\.txt": _WORDS,
}
_OPEN_CLIP: Final[dict[str, Content]] = {
    **_TOKENIZER,
    r"open_clip_config\.json": Content(rules=settings.OPEN_CLIP),
    r"(open_clip_|open_clip_pytorch_)?model\.safetensors": _WEIGHTS,
    r"(open_clip_)?pytorch_model\.(bin|pth)|model\.pth": _PICKLED,
}
FOLDERS: Final[dict[str, dict[str, Content]]] = {
    "clip": _OPEN_CLIP,
    "text": _OPEN_CLIP,
    "lora": {
        r"adapter_config\.json": Content(rules=settings.ADAPTER, for_libraries=False),
        r"adapter_model\.safetensors": _WEIGHTS,
    },
    "captioner": {
        **_TOKENIZER,
        r"config\.json": Content(rules=settings.BLIP),
        r"generation_config\.json": Content(rules=settings.GENERATION),
        r"preprocessor_config\.json": Content(rules=settings.PREPROCESSOR, for_libraries=False),
        r"processor_config\.json": Content(rules=settings.PROCESSOR, for_libraries=False),
        r"model\.safetensors\.index\.json": Content(rules=settings.WEIGHTS_INDEX, max_bytes=2**24),
        r"model(-\d{5}-of-\d{5})?\.safetensors": _WEIGHTS,
        r"pytorch_model\.bin": _PICKLED,
    },
}
"""Kind of a folder -> its files, as patterns of their full names."""


def content_of(kind: str, name: str) -> Content | None:
    """The allowed content of a file in a folder; None: the file is not allowed."""
    return next((content for pattern, content in FOLDERS[kind].items() if re.fullmatch(pattern, name)), None)


def bundled(name: str) -> Content | None:
    """The allowed content of a path in a bundle, whose folders are named by their kinds; None: not allowed."""
    parts = PurePosixPath(name).parts
    if "/".join(parts) != name or len(parts) != 2 or parts[0] not in FOLDERS:
        return None
    content = content_of(parts[0], parts[1])
    return content if content is not None and content.in_bundle else None


def check(data: bytes, content: Content, place: str) -> Any:
    """Return the JSON of a file without settings that no library needs. `WeightsError`: damaged or not allowed."""
    rules = content.rules or {}
    try:
        value = json.loads(data)
        if reason := settings.complaint(value, rules):
            raise WeightsError(
                f"{place} is refused: {reason}; a model folder may neither run code nor fetch or open other files: "
                "remove the setting, or save the model again with the library that made it"
            )
        return settings.shown(value, rules)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{place} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def read_json(folder: Path, kind: str, name: str) -> Any:
    """Read and check a JSON file of a model folder. Raises `OSError` or `WeightsError`."""
    content = content_of(kind, name)
    assert content is not None
    return check(read_regular(inside(folder, name), content.max_bytes), content, str(folder / name))


def inside(folder: Path, name: str) -> Path:
    """Resolve the path of a file in a folder. Raises `WeightsError` if a link leads out of the folder.

    In the hub's cache, links from `snapshots` to its `blobs` are allowed.
    """
    root, path = folder.resolve(), (folder / name).resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.is_relative_to(allowed) for allowed in roots):
        raise WeightsError(f"{folder / name} is a link out of its folder: replace it with the file itself")
    return path


@contextmanager
def opened(folder: Path, kind: str) -> Iterator[Path]:
    """Yield a private folder with the allowed files of a model folder; weights are links to the original files.

    Raises `WeightsError` for a file or setting that is not allowed, or not readable.
    """
    with tempfile.TemporaryDirectory(prefix="nsnet-model-") as scratch:
        try:
            for name in _names(folder):
                content = content_of(kind, name)
                if Path(name).suffix in CODE:
                    raise WeightsError(f"{folder / name} is refused: a model folder may hold no code; remove it")
                if content is None or not content.for_libraries:
                    continue
                path = inside(folder, name)
                if content.tensors:
                    weight_formats.check(folder / name)  # a blob of the hub's cache has no suffix
                    (Path(scratch) / name).symlink_to(path)
                else:
                    data = read_regular(path, content.max_bytes)
                    if content.rules is not None:
                        data = json.dumps(check(data, content, str(folder / name))).encode()
                    (Path(scratch) / name).write_bytes(data)
        except OSError as error:
            raise WeightsError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
        yield Path(scratch)


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for _, entry in zip(range(MAX_ENTRIES + 1), entries, strict=False)]
    if len(names) > MAX_ENTRIES:
        raise WeightsError(f"{folder} holds more than {MAX_ENTRIES} files: give the folder of one model")
    return sorted(names)
