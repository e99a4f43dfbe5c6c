"""Opens and reads files from strangers, with no wait for a FIFO or device and with a limit of bytes."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import Final

CHUNK_BYTES: Final = 1 << 20


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading. Raises `OSError` without waiting if it is a folder, FIFO, socket or device.

    Follows links; the caller must check where they lead.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)  # else opening a FIFO blocks
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
    """Read a regular file. Raises `OSError` as `open_regular` does, or if the file is larger than `max_bytes`."""
    chunks: list[bytes] = []
    left = max_bytes + 1  # read in chunks: one read would allocate the limit, and the reported size can be wrong
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= max_bytes:
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                chunks.append(chunk)
                left -= len(chunk)
            if left:
                return b"".join(chunks)
    raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", str(path))
