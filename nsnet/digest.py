"""Computes digests of files and of weights; equal weights have equal digests in every file format."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nsnet.errors import WeightsError
from nsnet.files import open_regular, read_regular

if TYPE_CHECKING:  # bundles are read without importing torch
    from torch import Tensor

ORIGIN: Final = "origin.json"
"""File of a model folder that was made from other files, which are the folder's identity.

`{"origin": [[name, SHA-256], …], "files": {name: SHA-256, …}}`: the other files, and those of the folder itself. It
counts only while the folder holds exactly these files.
"""
MAX_ORIGIN_BYTES: Final = 2**20


def file_digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of a regular file; `OSError` for anything else."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path) -> str:
    """As `file_digest`, but computed only once per process for a file whose size, times and inode stay the same."""
    found = path.stat()
    return _known_digest(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@lru_cache(maxsize=4096)
def _known_digest(path: Path, size: int, mtime_ns: int, ctime_ns: int, inode: int) -> str:
    return file_digest(path)


def weights_digest(state: Mapping[str, "Tensor"]) -> str:
    """SHA-256 (hexadecimal) over names, shapes and values (as fp32) of a model's state; takes about 1 s per GB."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return sha.hexdigest()


def identity(folder: Path, names: Iterable[str]) -> list[list[str]]:
    """Name and SHA-256 of each file that a model folder was made from: `names`, unless `ORIGIN` states others.

    `names`: its files that count, without `ORIGIN`. Raises `WeightsError` if `ORIGIN` is damaged.
    """
    files = [[name, known_digest(folder / name)] for name in sorted(names)]
    stated = _stated(folder / ORIGIN)
    return stated["origin"] if stated is not None and stated["files"] == dict(files) else files


def origin_file(origin: list[list[str]], files: Mapping[str, str]) -> bytes:
    """The content of `ORIGIN` for a folder with these files (name -> SHA-256)."""
    return json.dumps({"origin": origin, "files": files}, sort_keys=True).encode()


def _stated(path: Path) -> dict[str, Any] | None:
    """What `ORIGIN` says; None: there is none, or one of an earlier release, which does not name the folder's files."""
    try:
        stated = json.loads(read_regular(path, MAX_ORIGIN_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path} cannot be read ({type(error).__name__}): remove it, or fetch the model again"
        ) from error
    if is_origin(stated):
        return None
    if not isinstance(stated, dict) or not is_origin(stated.get("origin")) or not isinstance(stated.get("files"), dict):
        raise WeightsError(
            f"{path} is damaged: it must hold the names and SHA-256 of the published files and of the folder's own; "
            "remove it, or fetch the model again"
        )
    return stated


def is_origin(value: Any) -> bool:
    """Whether a value of JSON is a list of names and SHA-256."""
    return isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and is_digest(item[1]) for item in value
    )


def is_digest(value: Any) -> bool:
    """Whether a value is a SHA-256 in 64 hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
