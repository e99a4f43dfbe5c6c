"""Decoding in a child process: a picture that crashes, hangs or floods its decoder costs itself and nothing else.

The child (`python -m jobs.guard`) imports no torch. It reads pictures from its standard input and answers with raw
arrays behind a JSON header: nothing is unpickled on either side, since the child handles what strangers wrote.

    request   8-byte length, picture bytes
    answer    4-byte length, JSON header, patches (K·N·N·3 bytes), thumbnail (S·S·3 bytes); only the header on failure
"""

import contextlib
import ctypes
import json
import os
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
from nsnet.preparation import PreparationConfig, Prepared, prepare

START_SECONDS: Final = 60.0
"""Longest start of a child, imports included."""
MAX_HEADER_BYTES: Final = 64 * 1024
PR_SET_PDEATHSIG: Final = 1


class GuardedDecoder:
    """Prepares pictures in one child process, which is started on first use and again after a crash or a hang."""

    def __init__(self, config: PreparationConfig) -> None:
        self.config = config
        slots, side = config.patches.slots, config.patches.patch_px
        self._patches_shape = (slots, side, side, 3)
        self._thumbnail_shape = (config.thumbnail_px, config.thumbnail_px, 3)
        self._child: subprocess.Popen[bytes] | None = None

    def prepare(self, picture: bytes) -> Prepared:
        """Like `preparation.prepare`; also raises `ImageTimeoutError` and `DecoderCrashError`."""
        if not picture or len(picture) > self.config.limits.max_bytes:
            return prepare(picture, self.config)  # raises, at no cost
        child = self._running()
        deadline = time.monotonic() + self.config.limits.max_seconds
        try:
            return self._ask(child, picture, deadline)
        except (EOFError, BrokenPipeError) as error:
            code = self._end()
            reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise DecoderCrashError(f"the decoder ended with {reason} on this picture") from error
        except TimeoutError as error:
            self._end()
            raise ImageTimeoutError(
                f"decoding took longer than {self.config.limits.max_seconds:g} s (--max-seconds)"
            ) from error

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._end()

    def _ask(self, child: subprocess.Popen[bytes], picture: bytes, deadline: float) -> Prepared:
        assert child.stdin is not None and child.stdout is not None
        _write(child.stdin, struct.pack("<Q", len(picture)), deadline)
        _write(child.stdin, picture, deadline)
        header = _read_header(child.stdout, deadline)
        if "error_class" in header:
            kind = getattr(errors, str(header["error_class"]), ImageCorruptError)
            known = isinstance(kind, type) and issubclass(kind, ImageError)
            raise (kind if known else ImageCorruptError)(str(header["error_message"]))
        patches, thumbnail = (
            np.frombuffer(_read(child.stdout, int(np.prod(shape)), deadline), dtype=np.uint8).reshape(shape)
            for shape in (self._patches_shape, self._thumbnail_shape)
        )
        return Prepared(
            patches=patches,
            thumbnail=thumbnail,
            width=int(header["width"]),
            height=int(header["height"]),
            format=str(header["format"]),
            frames=int(header["frames"]),
        )

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            root = str(Path(__file__).resolve().parent.parent)
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
            child = subprocess.Popen(
                [sys.executable, "-m", "jobs.guard", str(os.getpid()), json.dumps(to_dict(self.config))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # C decoders write pages about damaged files; errors come as answers
                bufsize=0,
                env=environment,
            )
            assert child.stdout is not None and child.stdin is not None
            os.set_blocking(child.stdin.fileno(), False)
            self._child = child
            try:
                _read_header(child.stdout, time.monotonic() + START_SECONDS)
            except (EOFError, TimeoutError) as error:
                code = self._end()
                raise RuntimeError(f"the decoding process could not be started (exit code {code})") from error
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


def _wait(pipe: Any, deadline: float, *, write: bool) -> None:
    left = deadline - time.monotonic()
    ready = select.select([] if write else [pipe], [pipe] if write else [], [], max(0.0, left))
    if not (ready[0] or ready[1]):
        raise TimeoutError


def _write(pipe: Any, data: bytes, deadline: float) -> None:
    view = memoryview(data)
    while view:
        _wait(pipe, deadline, write=True)
        view = view[os.write(pipe.fileno(), view) :]


def _read(pipe: Any, length: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        _wait(pipe, deadline, write=False)
        part = os.read(pipe.fileno(), length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _read_header(pipe: Any, deadline: float) -> dict[str, Any]:
    (length,) = struct.unpack("<I", _read(pipe, 4, deadline))
    if length > MAX_HEADER_BYTES:
        raise EOFError
    header = json.loads(_read(pipe, length, deadline))
    if not isinstance(header, dict):
        raise EOFError
    return header


def serve(requests: BinaryIO, answers: BinaryIO, config: PreparationConfig) -> None:
    """The child's loop: until the end of the input."""
    _answer(answers, {"ready": True})
    while length := requests.read(8):
        picture = requests.read(struct.unpack("<Q", length)[0])
        try:
            done = prepare(picture, config)
        except ImageError as error:
            _answer(answers, {"error_class": type(error).__name__, "error_message": str(error)})
            continue
        header = {"width": done.width, "height": done.height, "format": done.format, "frames": done.frames}
        _answer(answers, header, done.patches.data, done.thumbnail.data)


def _answer(answers: BinaryIO, header: dict[str, Any], *payload: memoryview) -> None:
    encoded = json.dumps(header).encode()
    answers.write(struct.pack("<I", len(encoded)) + encoded)
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
