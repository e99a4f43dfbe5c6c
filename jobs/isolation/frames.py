"""Messages between a process and its guarded child: a length, a JSON header, bytes behind it. Nothing is unpickled."""

import json
import struct
from typing import Any, BinaryIO, Final

MAX_HEADER_BYTES: Final = 1 << 19
LENGTH: Final = struct.Struct("<I")


def frame(header: dict[str, Any]) -> bytes:
    """A header as it is sent."""
    encoded = json.dumps(header).encode()
    return LENGTH.pack(len(encoded)) + encoded


def header_length(prefix: bytes) -> int:
    """Bytes of the header that follows. Raises `ValueError` for more than `MAX_HEADER_BYTES`."""
    (length,) = LENGTH.unpack(prefix)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes")
    return int(length)


def parse(encoded: bytes) -> dict[str, Any]:
    """A header. Raises `ValueError`, `TypeError` or `RecursionError` for anything else."""
    header = json.loads(encoded)
    if not isinstance(header, dict):
        raise TypeError("the header is no object")
    return header


def receive(pipe: BinaryIO) -> dict[str, Any] | None:
    """The child's side: the next request, None at the end of the input."""
    prefix = pipe.read(LENGTH.size)
    return parse(pipe.read(header_length(prefix))) if len(prefix) == LENGTH.size else None


def send(pipe: BinaryIO, header: dict[str, Any], *payload: memoryview | bytes) -> None:
    """The child's side: an answer."""
    pipe.write(frame(header))
    for part in payload:
        pipe.write(part)
    pipe.flush()
