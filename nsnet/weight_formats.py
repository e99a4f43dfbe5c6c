"""Detects by its bytes a file that does not hold weights in a supported format, such as a wrong download."""

import os
from pathlib import Path
from typing import Final

from nsnet.errors import WeightsError
from nsnet.files import open_regular

HEAD_BYTES: Final = 512
TAIL_BYTES: Final = 2**20
"""Bytes read from the end, where a ZIP archive has its directory."""

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
TEXT: Final = frozenset(b"\t\n\r" + bytes(range(32, 127)))
"""Bytes that occur in text; a weight file begins with lengths and numbers, which contain others."""
DOWNLOAD: Final = "download the file itself"
MAGIC: Final = (
    (b"version https://git-lfs", "a Git LFS pointer to weights", f"run `git lfs pull`, or {DOWNLOAD}"),
    (b"<!doctype", "an HTML page", DOWNLOAD),
    (b"<html", "an HTML page", DOWNLOAD),
    (b"<?xml", "an XML page", DOWNLOAD),
    (b"{", "JSON", "give the weight file next to it"),
    (b"\x89hdf", "a Keras weight file", "use PyTorch weights, .safetensors or .bin"),
    (b"gguf", "a llama.cpp weight file (GGUF)", "use PyTorch weights, .safetensors or .bin"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
)
"""(first bytes in lower case, content of the file, advice)."""


def check(path: Path) -> None:
    """Raise `WeightsError` if a file certainly holds no tensors, `OSError` if it is not a regular file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEAD_BYTES)
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read(TAIL_BYTES)
    problem = _foreign(path, head, tail)
    if problem:
        raise WeightsError(f"{path} is {problem[0]}: {problem[1]}")


def _foreign(path: Path, head: bytes, tail: bytes) -> tuple[str, str] | None:
    """Content of a file that holds no weights, and advice; None if it may hold weights."""
    if not head:
        return "empty", "download it again"
    if not head.strip(b"\0"):
        return "a file that begins with zeros", "download it again"
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip().lower() if not head.startswith(b"PK") else head
    for magic, content, advice in MAGIC:
        if start.startswith(magic):
            return content, advice
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it"
    is_safetensors = head[8:9] == b"{"
    if head[:1] == b"\x08" and head[2:3] == b"\x12" and not is_safetensors:  # format version, then producer's name
        return "an ONNX model", "use PyTorch weights, .safetensors or .bin"
    if all(byte in TEXT for byte in head):
        return f"a text file that begins with {head[:60].decode('ascii')!r}", DOWNLOAD
    is_zip, is_named_safetensors = head.startswith(b"PK\3\4"), path.suffix == ".safetensors"
    if is_zip and b"/constants.pkl" in tail:
        return "a TorchScript archive, which holds code", (
            "if you trust it, save `torch.jit.load(…).state_dict()` as .safetensors, or use another format of the "
            "same weights (OpenAI's: timm/vit_large_patch14_clip_224.openai on the hub)"
        )
    if is_zip and b"/data.pkl" not in tail:
        return "a ZIP archive without tensors", "unpack it"
    if is_zip and is_named_safetensors:
        return "a PyTorch file with the suffix .safetensors", "rename it to .pt"
    if not is_named_safetensors and head[8:10] == b'{"':
        return "a safetensors file with another suffix", "rename it to .safetensors"
    return None
