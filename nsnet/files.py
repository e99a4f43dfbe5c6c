"""Files of others, opened so that none of them can hang the reader, and read to an end."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import Final

CHUNK_BYTES: Final = 1 << 20


def open_regular(path: str | Path) -> io.BufferedReader:
    """A regular file for reading. Raises `OSError`, at once, for a folder, FIFO, socket or device in its place.

    Links are followed: where they may not lead is for the caller to say.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)  # a FIFO's open would wait
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file but a FIFO, socket or device", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises `OSError`, as `open_regular` does, or because it is over `max_bytes`."""
    chunks: list[bytes] = []
    left = max_bytes + 1  # in pieces: a read of the whole bound would allocate it, and a size can grow or lie
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= max_bytes:
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                chunks.append(chunk)
                left -= len(chunk)
            if left:
                return b"".join(chunks)
    raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", str(path))
