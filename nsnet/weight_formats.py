"""What a file that should hold weights holds instead, by its first bytes: people download the wrong thing."""

import os
from pathlib import Path
from typing import Final

from nsnet.errors import WeightsError
from nsnet.files import open_regular

HEAD_BYTES: Final = 512
TAIL_BYTES: Final = 2**20
"""The directory of a ZIP archive lies at its end."""

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
TEXT: Final = frozenset(b"\t\n\r" + bytes(range(32, 127)))
"""Bytes of texts: a file of weights holds others, in the lengths and numbers that it begins with."""
DOWNLOAD: Final = "download the file itself"
MAGIC: Final = (
    (b"version https://git-lfs", "a Git LFS pointer to weights", f"run `git lfs pull`, or {DOWNLOAD}"),
    (b"<!doctype", "an HTML page", DOWNLOAD),
    (b"<html", "an HTML page", DOWNLOAD),
    (b"<?xml", "an XML page", DOWNLOAD),
    (b"{", "JSON", "give the file of weights beside it"),
    (b"\x89hdf", "weights of Keras", "take those of PyTorch, .safetensors or .bin"),
    (b"gguf", "weights of llama.cpp (GGUF)", "take those of PyTorch, .safetensors or .bin"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
)
"""(first bytes in lower case, what the file is, what to do)."""


def check(path: Path) -> None:
    """Raises `WeightsError` for what is certainly no file of tensors, `OSError` for what is no regular file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEAD_BYTES)
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read(TAIL_BYTES)
    found = _foreign(path, head, tail)
    if found:
        raise WeightsError(f"{path} is {found[0]}: {found[1]}")


def _foreign(path: Path, head: bytes, tail: bytes) -> tuple[str, str] | None:
    if not head:
        return "empty", "download it again"
    if not head.strip(b"\0"):
        return "a file that begins with zeros", "download it again"
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip().lower() if not head.startswith(b"PK") else head
    for magic, what, advice in MAGIC:
        if start.startswith(magic):
            return what, advice
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it"
    is_safe = head[8:9] == b"{"
    if head[:1] == b"\x08" and head[2:3] == b"\x12" and not is_safe:  # version of the format, then name of the producer
        return "a model of ONNX", "take the weights of PyTorch, .safetensors or .bin"
    if all(byte in TEXT for byte in head):
        return f"a text that begins with {head[:60].decode('ascii')!r}", DOWNLOAD
    is_zip, named_safe = head.startswith(b"PK\3\4"), path.suffix == ".safetensors"
    if is_zip and b"/constants.pkl" in tail:
        return "a TorchScript archive, which holds code", (
            "where you trust it, save `torch.jit.load(…).state_dict()` as .safetensors, or take another format of the "
            "same weights (OpenAI's: timm/vit_large_patch14_clip_224.openai on the hub)"
        )
    if is_zip and b"/data.pkl" not in tail:
        return "a ZIP archive without tensors", "unpack it"
    if is_zip and named_safe:
        return "a file of PyTorch under the name of another format", "rename it to .pt"
    if not named_safe and head[8:10] == b'{"':
        return "a safetensors file under the name of another format", "rename it to .safetensors"
    return None
