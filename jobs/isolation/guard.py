"""Guarded children: processes that read what strangers wrote. If one crashes or hangs, one file is lost, not the job.

A child is forked from a `zygote`, which has imported what it needs, and is confined (`sandbox`): no files, no
network, no other processes, an empty environment, bounded memory. It answers on a pipe, as `jobs.isolation.frames`
says. Its time is what it computes, not what a busy machine lets it wait for (`Clock`).
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from jobs.isolation import frames
from jobs.isolation.frames import header_length, parse

START_SECONDS: Final = 120.0
"""Longest start of a zygote, imports included, and of a child."""
CLOSE_SECONDS: Final = 1.0
"""After which a zygote that does not end by itself is killed."""
WALL_FACTOR: Final = 20.0
"""The wall clock may show so many times the seconds that a child may compute: a busy machine lets it wait."""
FIRST_LOOK_SECONDS: Final = 0.25
"""After which a child's clock is looked at for the first time, where it may compute longer."""
MAX_WAIT_SECONDS: Final = 86_400.0
"""What an endless wait is cut to: poll() counts milliseconds in 31 bits."""
PIPE_BYTES: Final = 1 << 20
"""Size of the pipes: at the usual 64 KiB the two processes wait for each other many times per image."""
ENVIRONMENT: Final = {
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All that a zygote starts with. The C library keeps its memory between images: to be given the same pages again for
each of them took a quarter of a child's time. One thread: a fork copies no others."""
INHERITED: Final = ("LD_LIBRARY_PATH", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Variables of the parent that say how libraries are found and used; no others reach a child."""

logger = logging.getLogger(__name__)


class ChildTimeoutError(Exception):
    """A child took longer than it may; the message says what it took."""


class Zygote:
    """The process that children of one service are forked from; started on first use, ended with this one."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._warned = False

    def fork(self, settings: dict[str, Any], memory_bytes: int) -> "Child":
        """A child that serves with these settings. Raises `RuntimeError` where none can be started."""
        pipes = [os.pipe(), os.pipe()]
        (reading, requests), (answers, writing) = pipes
        try:
            with self._lock:
                command = json.dumps({"fork": settings, "memory_bytes": memory_bytes}).encode()
                pid = int(self._ask(command, [reading, writing])["pid"])
        except BaseException:
            os.close(requests)
            os.close(answers)
            raise
        finally:
            os.close(reading)
            os.close(writing)
        child = Child(self, pid, requests, answers)
        try:
            ready = child.receive(Clock(pid, START_SECONDS, START_SECONDS))
        except (EOFError, ChildTimeoutError, ValueError, TypeError) as error:
            raise RuntimeError(f"a guarded process could not be started (exit code {child.end()})") from error
        except BaseException:
            child.end()
            raise
        if ready.get("unconfined") and not self._warned:
            self._warned = True
            logger.warning("guarded processes are not confined on this machine (%s)", ready["unconfined"])
        return child

    def end(self, pid: int) -> int:
        """Kill a child; returns its exit code, -n for signal n. It may have ended before."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                return -signal.SIGKILL  # the kernel has ended all its children with it
            return int(self._ask(json.dumps({"end": pid}).encode(), [])["status"])

    def close(self) -> None:
        """End the zygote, and its children with it."""
        with self._lock:
            self._close()

    def _ask(self, command: bytes, descriptors: list[int]) -> dict[str, Any]:
        for last in (False, True):
            try:
                control = self._running()
                socket.send_fds(control, [command], descriptors)
                return parse(control.recv(1 << 16))
            except (OSError, ValueError) as error:  # it was killed: another one takes its place
                self._close()
                if last or b'"end"' in command:
                    raise RuntimeError(f"the process that guarded ones come from has ended: {error}") from error
        raise AssertionError("the loop above only ends by itself")

    def _running(self) -> socket.socket:
        if self._process is not None and self._control is not None:
            return self._control
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = {"path": _import_path(), "service": self._service, "control": theirs.fileno()}
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        self._process = subprocess.Popen(
            # -I: nothing is imported from the current folder, which may be the one with the images
            [sys.executable, "-I", str(Path(__file__).with_name("zygote.py")), json.dumps(given)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # C decoders write pages about damaged files; errors come as answers
            env=ENVIRONMENT | environment,
            cwd="/",
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._control = ours
        ours.settimeout(START_SECONDS)
        try:
            if ours.recv(1 << 16):
                return ours
        except OSError:
            pass
        code = self._close()
        raise RuntimeError(f"the process that guarded ones come from could not be started (exit code {code})")

    def _close(self) -> int | None:
        """End the process; returns its exit code, where it had ended by itself."""
        process, control, self._process, self._control = self._process, self._control, None, None
        if control is not None:
            control.close()
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):  # without its control socket it ends
            return process.wait(CLOSE_SECONDS)
        process.kill()
        return process.wait()


def _import_path() -> list[str]:
    """Where modules are found, without the current folder."""
    root = str(Path(__file__).resolve().parents[2])
    here = os.getcwd()
    return [root, *(path for path in sys.path if os.path.isabs(path) and path not in (root, here))]


class Clock:
    """How long a child may take for one answer: seconds that it computes, or does nothing though nothing holds it up.

    Waiting for a processor does not count, up to a far later end by the wall clock.
    """

    def __init__(self, pid: int, seconds: float, wall_seconds: float | None = None) -> None:
        self._pid, self.seconds = pid, seconds
        self.wall_seconds = WALL_FACTOR * seconds if wall_seconds is None else wall_seconds
        self._begun = self._looked = time.monotonic()
        self._computed_before, _ = self._computed = _computed(pid)
        self._idle = 0.0

    @property
    def computed(self) -> float:
        """Seconds that the child has computed since the clock was started, as far as they were looked at."""
        return max(_computed(self._pid)[0], self._computed[0]) - self._computed_before

    def wait(self, pipe: int, event: int) -> None:
        """Wait until a pipe can be read or written, or is broken. Raises `ChildTimeoutError`."""
        pause = min(self.seconds, FIRST_LOOK_SECONDS)
        while not _ready(pipe, pause, event):
            pause = max(0.01, self._left())

    def _left(self) -> float:
        """Seconds until the next look. Raises `ChildTimeoutError` where none are left."""
        now, (computed, asleep) = time.monotonic(), _computed(self._pid)
        if asleep and computed == self._computed[0]:
            self._idle += now - self._looked
        self._looked, self._computed = now, (computed, asleep)
        computing = computed - self._computed_before
        if computing + self._idle >= self.seconds:
            kind = "of computing" if self._idle < computing else "without doing anything"
            raise ChildTimeoutError(f"{self.seconds:g} s {kind}")
        if now - self._begun >= self.wall_seconds:
            raise ChildTimeoutError(f"{self.wall_seconds:g} s, of which it could compute for {computing:.1f} s")
        return min(self.seconds - computing - self._idle, self._begun + self.wall_seconds - now)


def _computed(pid: int) -> tuple[float, bool]:
    """Seconds that a process has computed, and whether it waits for anything else than a processor or a disk."""
    try:
        # after the name, which may hold anything: state is the 3rd field, user and system time the 14th and 15th
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended: the pipe says so
        return 0.0, True
    return (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK"), state not in "RD"


class Child:
    """One guarded child, from `Zygote.fork`."""

    def __init__(self, zygote: Zygote, pid: int, requests: int, answers: int) -> None:
        self.pid = pid
        self._zygote, self._requests, self._answers = zygote, requests, answers
        os.set_blocking(requests, False)
        for pipe in (requests, answers):
            with contextlib.suppress(OSError):  # the user's share of pipe memory is used up: slower, not wrong
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def send(self, clock: Clock, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send a request. Raises `BrokenPipeError` where the child is gone, `ChildTimeoutError`."""
        for data in (frames.frame(header), payload):
            view = memoryview(data)
            while view:
                clock.wait(self._requests, select.POLLOUT)
                view = view[os.write(self._requests, view) :]

    def receive(self, clock: Clock) -> dict[str, Any]:
        """The header of an answer. Raises what `read` and `frames.parse` raise."""
        return parse(self.read(header_length(self.read(frames.LENGTH.size, clock)), clock))

    def read(self, length: int, clock: Clock) -> bytes:
        """Bytes of an answer. Raises `EOFError` where the child is gone, `ChildTimeoutError`."""
        parts = bytearray()
        while len(parts) < length:
            clock.wait(self._answers, select.POLLIN)
            part = os.read(self._answers, length - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def is_quiet(self) -> bool:
        """Whether it lives, as far as is known, and says nothing that it was not asked."""
        return not _ready(self._answers, 0.0, select.POLLIN)

    def end(self) -> int:
        """Kill it; returns its exit code, -n for signal n. It may have ended before."""
        os.close(self._requests)
        os.close(self._answers)
        return self._zygote.end(self.pid)


def exit_reason(code: int) -> str:
    """What an exit code means, for people."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _ready(pipe: int, seconds: float, event: int) -> bool:
    """Wait until a pipe can be read or written, or is broken; False: it took longer than that."""
    poll = select.poll()  # unlike select(), it takes descriptors above 1023
    poll.register(pipe, event)
    return bool(poll.poll(math.ceil(1000 * min(max(0.0, seconds), MAX_WAIT_SECONDS))))
