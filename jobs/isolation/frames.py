"""Messages between a process and its guarded child: a length, a JSON header, then a payload. Nothing is unpickled."""

import json
import struct
from typing import Any, BinaryIO, Final

MAX_HEADER_BYTES: Final = 1 << 19
LENGTH: Final = struct.Struct("<I")


def frame(header: dict[str, Any]) -> bytes:
    """Encode a header: its length, then its JSON."""
    encoded = json.dumps(header).encode()
    return LENGTH.pack(len(encoded)) + encoded


def header_length(prefix: bytes | bytearray) -> int:
    """Length of the header that follows, in bytes. Raises `ValueError` if it exceeds `MAX_HEADER_BYTES`."""
    (length,) = LENGTH.unpack(prefix)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes")
    return int(length)


def parse(encoded: bytes | bytearray) -> dict[str, Any]:
    """Decode a header. Raises `ValueError`, `TypeError` or `RecursionError` if it is not a JSON object."""
    header = json.loads(encoded)
    if not isinstance(header, dict):
        raise TypeError("the header is not an object")
    return header


def receive(pipe: BinaryIO) -> dict[str, Any] | None:
    """In the child: read the next request; None at the end of the input."""
    prefix = pipe.read(LENGTH.size)
    return parse(pipe.read(header_length(prefix))) if len(prefix) == LENGTH.size else None


def send(pipe: BinaryIO, header: dict[str, Any], *payload: memoryview | bytes) -> None:
    """In the child: write an answer."""
    pipe.write(frame(header))
    for part in payload:
        pipe.write(part)
    pipe.flush()
