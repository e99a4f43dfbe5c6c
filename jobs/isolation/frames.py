"""Messages between a process and its guarded child: a length, a JSON header, then a payload. Nothing is unpickled."""

import json
import os
import struct
from typing import TYPE_CHECKING, Any, BinaryIO, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

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
    """In the child: write an answer, by one system call if the pipe has room, so that the parent wakes once."""
    parts = views(frame(header), *payload)
    while parts:
        parts = rest(parts, os.writev(pipe.fileno(), parts))


def views(*buffers: "ReadableBuffer") -> list[memoryview]:
    """Views of the bytes of buffers, without the empty ones."""
    return [view.cast("B") for buffer in buffers if (view := memoryview(buffer)).nbytes]


def rest(parts: list[memoryview], done: int) -> list[memoryview]:
    """What remains of some parts after their first `done` bytes."""
    for i, part in enumerate(parts):
        if done < len(part):
            return [part[done:], *parts[i + 1 :]]
        done -= len(part)
    return []
