"""A decoder that lies: it answers with the bytes of the image that it is sent."""

from typing import Any, BinaryIO

from jobs.isolation import frames


def preload() -> None:
    """Nothing is needed."""


def serve(requests: BinaryIO, answers: BinaryIO, settings: dict[str, Any]) -> None:
    """Until the end of the input."""
    while (request := frames.receive(requests)) is not None:
        answers.write(requests.read(request["size_bytes"]))
        answers.flush()
