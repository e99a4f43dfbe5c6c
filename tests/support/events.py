"""TensorBoard's event files, read without TensorBoard."""

import struct
from collections.abc import Iterator
from typing import Any

from tensorboardX.proto.event_pb2 import Event


def events(data: bytes) -> Iterator[Any]:
    """Records of an event file: length, its checksum, an `Event`, its checksum."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event()
        event.ParseFromString(data[at + 12 : at + 12 + length])
        yield event
        at += 16 + length
