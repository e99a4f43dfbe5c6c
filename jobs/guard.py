"""Decoding in a child process: a picture that crashes, hangs or floods its decoder costs itself and nothing else.

The child (`python -m jobs.guard`) imports no torch. It reads pictures from its standard input and answers with raw
arrays behind a JSON header: nothing is unpickled on either side, since the child handles what strangers wrote.

    request   4-byte length, JSON header (bytes of the picture, transform, seed), picture bytes
    answer    4-byte length, JSON header, patches (K·N·N·3 bytes), thumbnail (S·S·3 bytes); only the header on failure
"""

import contextlib
import ctypes
import fcntl
import json
import math
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from nsnet import errors
from nsnet.config import from_dict, to_dict
from nsnet.errors import DecoderCrashError, ImageCorruptError, ImageError, ImageTimeoutError
from nsnet.preparation import PreparationConfig, Prepared, prepare, shapes

START_SECONDS: Final = 60.0
"""Longest start of a child, imports included."""
MAX_HEADER_BYTES: Final = 64 * 1024
LONGEST_WAIT_SECONDS: Final = 86_400.0
"""What an endless wait is cut to: poll() counts milliseconds in 31 bits."""
PIPE_BYTES: Final = 1 << 20
"""Size of the pipes: at the usual 64 KiB the two processes wait for each other many times per picture."""
KEEPING_MEMORY: Final = {"MALLOC_TRIM_THRESHOLD_": str(128 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""Environment in which the C library does not give memory back between pictures: to be given the same pages again for
each of them took a quarter of the child's time."""
FACTS: Final = ("width", "height", "format", "frames", "quality", "perceptual_hash")
"""What an answer's header says of a picture."""
POISON_VARIABLE: Final = "NSNET_TEST_POISON"
"""Environment variable that only tests set: pictures that begin with a marker then do to the decoder what it says."""
PR_SET_PDEATHSIG: Final = 1


class GuardedDecoder:
    """Prepares pictures in one child process, which is started on first use and again after a crash or a hang."""

    def __init__(self, config: PreparationConfig) -> None:
        self.config = config
        self._shapes = shapes(config)
        self._child: subprocess.Popen[bytes] | None = None

    def prepare(self, picture: bytes, transform: str = "", seed: int = 0) -> Prepared:
        """Like `preparation.prepare`; also raises `ImageTimeoutError` and `DecoderCrashError`."""
        if not picture or len(picture) > self.config.limits.max_bytes:
            return prepare(picture, self.config)  # raises, at no cost
        child = self._running()
        deadline = time.monotonic() + self.config.limits.max_seconds
        told = {"size_bytes": len(picture), "transform": transform, "seed": seed}
        try:
            return self._ask(child, told, picture, deadline)
        except ImageError:  # a whole answer
            raise
        except (EOFError, BrokenPipeError) as error:
            code = self._end()
            reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise DecoderCrashError(f"the decoder ended with {reason} on this picture") from error
        except TimeoutError as error:
            self._end()
            raise ImageTimeoutError(
                f"decoding took longer than {self.config.limits.max_seconds:g} s (--max-seconds)"
            ) from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            self._end()
            raise DecoderCrashError(f"the decoder's answer makes no sense ({type(error).__name__})") from error
        except BaseException:  # the rest of this answer must not be taken for the next one
            self._end()
            raise

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._end()

    def _ask(self, child: subprocess.Popen[bytes], told: dict[str, Any], picture: bytes, deadline: float) -> Prepared:
        assert child.stdin is not None and child.stdout is not None
        _write(child.stdin, _framed(told), deadline)
        _write(child.stdin, picture, deadline)
        header = _read_header(child.stdout, deadline)
        if "error_class" in header:
            kind = getattr(errors, str(header["error_class"]), ImageCorruptError)
            known = isinstance(kind, type) and issubclass(kind, ImageError)
            raise (kind if known else ImageCorruptError)(_text(header["error_message"]))
        patches, thumbnail = (
            np.frombuffer(_read(child.stdout, int(np.prod(shape)), deadline), dtype=np.uint8).reshape(shape)
            for shape in self._shapes
        )
        return Prepared(
            patches=patches,
            thumbnail=thumbnail,
            width=_count(header["width"]),
            height=_count(header["height"]),
            format=_text(header["format"]),
            frames=_count(header["frames"]),
            quality=None if header["quality"] is None else _count(header["quality"]),
            perceptual_hash=_hash(header["perceptual_hash"]),
        )

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and _ready(self._child.stdout, 0.0, select.POLLIN):
            self._end()  # it is dead, or says what it was not asked
        if self._child is None:
            root = str(Path(__file__).resolve().parent.parent)
            environment = {**KEEPING_MEMORY, **os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
            child = subprocess.Popen(
                # -P: nothing is imported from the current folder, which may be the one with the pictures
                [sys.executable, "-P", "-m", "jobs.guard", str(os.getpid()), json.dumps(to_dict(self.config))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # C decoders write pages about damaged files; errors come as answers
                bufsize=0,
                env=environment,
            )
            assert child.stdout is not None and child.stdin is not None
            os.set_blocking(child.stdin.fileno(), False)
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # the user's share of pipe memory is used up: slower, not wrong
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self._child = child
            try:
                _read_header(child.stdout, time.monotonic() + START_SECONDS)
            except (EOFError, TimeoutError, ValueError, TypeError) as error:
                code = self._end()
                raise RuntimeError(f"the decoding process could not be started (exit code {code})") from error
            except BaseException:
                self._end()
                raise
        return self._child

    def _end(self) -> int:
        assert self._child is not None
        child, self._child = self._child, None
        child.kill()
        code = child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return code


def _text(value: Any) -> str:
    """What the child says, without lone surrogates, which no table can hold."""
    return str(value).encode("utf-8", "replace").decode()


def _count(value: Any) -> int:
    number = int(value)
    if not 0 < number < 2**31:
        raise ValueError(f"{number} is no number of pixels or frames")
    return number


def _hash(value: Any) -> str | None:
    if value is not None and not re.fullmatch("[0-9a-f]{16}", str(value)):
        raise ValueError("no perceptual hash")
    return value if value is None else str(value)


def _ready(pipe: Any, seconds: float, event: int) -> bool:
    """Wait until a pipe can be read or written, or is broken; False: it took longer than that."""
    poll = select.poll()  # unlike select(), it takes descriptors above 1023
    poll.register(pipe, event)
    return bool(poll.poll(math.ceil(1000 * min(max(0.0, seconds), LONGEST_WAIT_SECONDS))))


def _wait(pipe: Any, deadline: float, event: int) -> None:
    if not _ready(pipe, deadline - time.monotonic(), event):
        raise TimeoutError


def _write(pipe: Any, data: bytes, deadline: float) -> None:
    view = memoryview(data)
    while view:
        _wait(pipe, deadline, select.POLLOUT)
        view = view[os.write(pipe.fileno(), view) :]


def _read(pipe: Any, length: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        _wait(pipe, deadline, select.POLLIN)
        part = os.read(pipe.fileno(), length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _read_header(pipe: Any, deadline: float) -> dict[str, Any]:
    (length,) = struct.unpack("<I", _read(pipe, 4, deadline))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(_read(pipe, length, deadline))
    if not isinstance(header, dict):
        raise TypeError("the header is no object")
    return header


def serve(requests: BinaryIO, answers: BinaryIO, config: PreparationConfig) -> None:
    """The child's loop: until the end of the input."""
    _answer(answers, {"ready": True})
    while length := requests.read(4):
        told = json.loads(requests.read(struct.unpack("<I", length)[0]))
        picture = requests.read(told["size_bytes"])
        if POISON_VARIABLE in os.environ:
            _poison(picture)
        try:
            done = prepare(picture, config, told["transform"], told["seed"])
        except ImageError as error:
            _answer(answers, {"error_class": type(error).__name__, "error_message": str(error)})
            continue
        header = {name: getattr(done, name) for name in FACTS}
        _answer(answers, header, done.patches.data, done.thumbnail.data)


def _poison(picture: bytes) -> None:
    """Do what a broken decoder might do. No picture format begins like this."""
    if picture.startswith(b"POISON segfault"):
        ctypes.string_at(0)
    elif picture.startswith(b"POISON sleep"):
        signal.pause()
    elif picture.startswith(b"POISON memory"):
        hoard = []
        while True:
            hoard.append(bytearray(1 << 24))


def _framed(header: dict[str, Any]) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<I", len(encoded)) + encoded


def _answer(answers: BinaryIO, header: dict[str, Any], *payload: memoryview) -> None:
    answers.write(_framed(header))
    for part in payload:
        answers.write(part)
    answers.flush()


def _main() -> None:
    parent, described = int(sys.argv[1]), sys.argv[2]
    # The child must not outlive a parent that is killed, not even inside a decoder that hangs.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = from_dict(PreparationConfig, json.loads(described))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bound = used + config.limits.max_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer, config)


if __name__ == "__main__":
    _main()
