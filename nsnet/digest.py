"""Computes digests of files and of weights; equal weights have equal digests in every file format."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nsnet.files import open_regular

if TYPE_CHECKING:  # bundles are read without importing torch
    from torch import Tensor


def file_digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of a regular file; `OSError` for anything else."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(state: Mapping[str, "Tensor"]) -> str:
    """SHA-256 (hexadecimal) over names, shapes and values (as fp32) of a model's state; takes about 1 s per GB."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return sha.hexdigest()
