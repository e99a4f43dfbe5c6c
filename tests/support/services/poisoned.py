"""A decoder that does what the bytes of an image tell it; it decodes all others as ever."""

import ctypes
import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from jobs.isolation import frames
from jobs.pipeline import decoding

MARK = b"POISON "
CREDENTIALS_MARK = b"jumb c2pa POISON "
"""At the end of an image: reading its content credentials does what follows."""
F_SETSIG = 10


def preload() -> None:
    """As the decoder's."""
    decoding.preload()
    read = decoding.with_credentials

    def with_credentials(origin: Any, image: bytes, anchors: str) -> Any:
        _, found, deed = image.rpartition(CREDENTIALS_MARK)
        if found:
            DEEDS[deed.decode()]("")
        return read(origin, image, anchors)

    decoding.with_credentials = with_credentials


def serve(requests: BinaryIO, answers: BinaryIO, settings: dict[str, Any]) -> None:
    """Until the end of the input."""
    while (request := frames.receive(requests)) is not None:
        image = requests.read(request["size_bytes"])
        if image.startswith(MARK):
            what, _, argument = image[len(MARK) :].decode().partition(" ")
            done = DEEDS[what](argument)
            frames.send(answers, {"error_class": "ImageCorruptError", "error_message": str(done)})
            continue
        one = io.BytesIO(frames.frame(request) + image)
        decoding.serve(one, answers, settings)


def segfault(_: str) -> None:
    ctypes.string_at(0)


def sleep(_: str) -> None:
    time.sleep(1e6)


def memory(_: str) -> None:
    hoard = []
    while True:
        hoard.append(bytearray(1 << 24))


def compute(_: str) -> None:
    while True:
        pass


def trickle(_: str) -> None:
    """Computes for six seconds, and sends a byte of an answer now and then."""
    os.write(1, frames.LENGTH.pack(300))
    for _ in range(300):
        end = time.monotonic() + 0.02
        while time.monotonic() < end:
            pass
        os.write(1, b" ")


def attempt(deed: Callable[[], object]) -> str:
    """What comes of a deed: its result, or the error that it raised."""
    try:
        return f"done: {deed()}"
    except BaseException as error:
        return f"{type(error).__name__}: {getattr(error, 'errno', '')}"


def escape(argument: str) -> str:
    """Everything that a decoder has no business with, as JSON: name -> what came of it."""
    parent, port, folder = json.loads(argument)
    deeds: dict[str, Callable[[], object]] = {
        "read a file": lambda: Path("/etc/passwd").read_text(),
        "read the parent's environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "write a file": lambda: Path(folder, "new").write_text("x"),
        "list a folder": lambda: os.listdir(folder),
        "remove a file": lambda: os.unlink(f"{folder}/there"),
        "make a folder": lambda: os.mkdir(f"{folder}/made"),
        "open a socket": lambda: socket.create_connection(("127.0.0.1", port), timeout=5),
        "ask by HTTP": lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5),
        "run a program": lambda: subprocess.run(["/bin/true"], check=True),
        "fork": os.fork,
        "signal the parent": lambda: os.kill(parent, 0),
        "have the kernel signal the parent": lambda: fcntl.fcntl(0, fcntl.F_SETOWN, parent),
        "choose the signal of a pipe": lambda: fcntl.fcntl(0, F_SETSIG, signal.SIGKILL),
        "look at the parent": lambda: os.pidfd_open(parent),
        "raise its limits": raise_limits,
        "start a thread": start_a_thread,
    }
    found = {name: attempt(deed) for name, deed in deeds.items()}
    return json.dumps(found | {"environment": json.dumps(dict(os.environ)), "status": "no_new_privs " + privileges()})


def raise_limits() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))


def start_a_thread() -> str:
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append("it ran"))
    thread.start()
    thread.join()
    return said[0]


def privileges() -> str:
    """Of this process: prctl(PR_GET_NO_NEW_PRIVS) is not among the allowed calls, and is not needed."""
    with suppress(OSError):
        return str(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))
    return ""


DEEDS = {
    "answer": str, "segfault": segfault, "sleep": sleep, "memory": memory, "compute": compute, "escape": escape,
    "trickle": trickle,
}  # fmt: skip
