"""What no file may bring about, done on purpose: `driver` and `campaign` must notice each."""

import ctypes
import os
import pickle
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.fuzz import Payload
from tests.fuzz.driver import MAX_SECONDS

HOARD: Final[list[Any]] = []


def connect() -> None:
    with socket.socket() as sock:
        sock.connect_ex(("127.0.0.1", 9))


def compute() -> None:
    end = time.process_time() + MAX_SECONDS
    while time.process_time() < end:
        pass


def unpickle() -> None:
    pickle.loads(pickle.dumps(Payload()))


DEEDS: Final[tuple[tuple[str, Callable[[], Any]], ...]] = (
    ("", lambda: None),
    ("ValueError", lambda: int("x")),
    ("the driver ended: exit code -11", lambda: ctypes.string_at(0)),
    ("ESCAPE", unpickle),
    ("socket.connect", connect),
    ("subprocess.Popen", lambda: subprocess.run(["true"], check=True)),
    ("open", lambda: Path("/tmp/bait.json").read_text()),
    ("MiB more memory", lambda: bytearray(2**29).count(1)),
    ("s of computing", compute),
    ("left behind", lambda: HOARD.append(os.dup(0))),
)
"""What the failure says, and the deed."""


def write(seed: int, folder: Path) -> None:
    """The number of the deed."""
    (folder / "deed").write_text(str(seed))


def run(folder: Path) -> str:
    """Do it."""
    DEEDS[int((folder / "deed").read_text())][1]()
    return "done"


def close() -> None:
    """Nothing."""
