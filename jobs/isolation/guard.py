"""Guarded children: processes that parse untrusted files. If one crashes or hangs, one file is lost, not the job.

A child is forked from a `zygote`, which has already imported the modules that the child needs. It is confined
(`sandbox`): no files, no network, no other processes, an empty environment, bounded memory. It answers on a pipe
(`jobs.isolation.frames`). Its timeout counts CPU time, not time spent waiting for a busy CPU (`Clock`).
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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jobs.isolation import frames
from jobs.isolation.frames import header_length, parse

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

START_SECONDS: Final = 120.0
"""Timeout for starting a zygote, imports included, and for starting a child."""
CLOSE_SECONDS: Final = 1.0
"""A zygote that has not exited after this time is killed."""
WALL_FACTOR: Final = 20.0
"""Wall-clock limit of a child as a multiple of its CPU limit: on a busy machine it waits for a CPU."""
FIRST_CHECK_SECONDS: Final = 0.25
"""Time until a child's CPU time is checked first, unless its limit is shorter."""
IDLE_SECONDS: Final = 0.01
"""A child that used less CPU time than this between two checks counts as idle if it sleeps at the second."""
CPUCLOCK_SCHED: Final = 2
"""Linux's number for the precise CPU time of a process."""
MAX_WAIT_SECONDS: Final = 86_400.0
"""Upper limit of one poll(), which counts milliseconds in 31 bits."""
PIPE_BYTES: Final = 1 << 20
"""Size of the pipes: at the default of 64 KiB the two processes wait for each other many times per image."""
ENVIRONMENT: Final = {
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Environment of a zygote, with `INHERITED`. The C library keeps its memory between images: allocating the same pages
again for each image took a quarter of a child's time. One thread, because a fork copies no other threads."""
INHERITED: Final = ("LD_LIBRARY_PATH", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""The parent's variables that a zygote inherits: they control how libraries are found and run."""

logger = logging.getLogger(__name__)


class ChildTimeoutError(Exception):
    """A child exceeded a time limit; the message names the limit."""


class Zygote:
    """The process that forks the children of one service. It starts on first use and ends with this process."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._warned = False

    def fork(self, settings: dict[str, Any], memory_bytes: int) -> "Child":
        """Fork a child that serves with these settings. Raises `RuntimeError` if no child can be started."""
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
        """Kill a child, which may have ended already. Returns its exit code, -n for signal n."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                return -signal.SIGKILL  # the kernel killed all children when the zygote ended
            return int(self._ask(json.dumps({"end": pid}).encode(), [])["status"])

    def close(self) -> None:
        """End the zygote and its children."""
        with self._lock:
            self._close()

    def _ask(self, command: bytes, descriptors: list[int]) -> dict[str, Any]:
        for is_last in (False, True):
            try:
                control = self._running()
                socket.send_fds(control, [command], descriptors)
                return parse(control.recv(1 << 16))
            except (OSError, ValueError) as error:  # the zygote was killed: start another one
                self._close()
                if is_last or b'"end"' in command:
                    raise RuntimeError(f"the parent of the guarded processes has ended: {error}") from error
        raise AssertionError("unreachable: the second attempt returns or raises")

    def _running(self) -> socket.socket:
        if self._process is not None and self._control is not None:
            return self._control
        own_socket, zygote_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = {"path": _import_path(), "service": self._service, "control": zygote_socket.fileno()}
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        self._process = subprocess.Popen(
            # -I: import nothing from the current folder, which may hold untrusted files
            [sys.executable, "-I", str(Path(__file__).with_name("zygote.py")), json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # C decoders write many lines about damaged files; errors arrive as answers
            env=ENVIRONMENT | environment,
            cwd="/",
            pass_fds=[zygote_socket.fileno()],
        )
        zygote_socket.close()
        self._control = own_socket
        own_socket.settimeout(START_SECONDS)
        try:
            if own_socket.recv(1 << 16):
                return own_socket
        except OSError:
            pass
        code = self._close()
        raise RuntimeError(f"the parent of the guarded processes could not be started (exit code {code})")

    def _close(self) -> int | None:
        """End the process. Returns its exit code; None if none was running."""
        process, control, self._process, self._control = self._process, self._control, None, None
        if control is not None:
            control.close()
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):  # the zygote exits when its control socket closes
            return process.wait(CLOSE_SECONDS)
        process.kill()
        return process.wait()


def _import_path() -> list[str]:
    """Module search path without the current folder."""
    root = str(Path(__file__).resolve().parents[2])
    here = os.getcwd()
    return [root, *(path for path in sys.path if os.path.isabs(path) and path not in (root, here))]


class Clock:
    """Time limit of a child for one answer: CPU time plus time asleep without using CPU.

    Time spent waiting for a CPU or a disk does not count, up to a much larger wall-clock limit.
    """

    def __init__(self, pid: int, seconds: float, wall_seconds: float | None = None) -> None:
        self._pid, self.seconds = pid, seconds
        self.wall_seconds = WALL_FACTOR * seconds if wall_seconds is None else wall_seconds
        self._started_at = self._checked_at = time.monotonic()
        self._computed_before = self._computed = _computed(pid)
        self._idle = 0.0

    @property
    def computed(self) -> float:
        """CPU seconds of the child since the clock started."""
        return max(_computed(self._pid), self._computed) - self._computed_before

    def wait(self, pipe: int, event: int) -> None:
        """Wait until a pipe can be read or written, or is broken. Raises `ChildTimeoutError`."""
        pause = min(self.seconds, FIRST_CHECK_SECONDS)
        if time.monotonic() - self._checked_at >= pause and not _ready(pipe, 0.0, event):
            pause = max(0.01, self._left())  # a child may send a byte now and then, so that no wait ends without one
        while not _ready(pipe, pause, event):
            pause = max(0.01, self._left())

    def _left(self) -> float:
        """Seconds until the next check. Raises `ChildTimeoutError` if a limit is reached."""
        now, computed = time.monotonic(), _computed(self._pid)
        if computed - self._computed < IDLE_SECONDS and _is_asleep(self._pid):
            self._idle += now - self._checked_at
        self._checked_at, self._computed = now, computed
        computing = computed - self._computed_before
        if computing + self._idle >= self.seconds:
            kind = "of CPU time" if self._idle < computing else "without activity"
            raise ChildTimeoutError(f"{self.seconds:g} s {kind}")
        if now - self._started_at >= self.wall_seconds:
            raise ChildTimeoutError(f"{self.wall_seconds:g} s, of which it had a CPU for {computing:.1f} s")
        return min(self.seconds - computing - self._idle, self._started_at + self.wall_seconds - now)


def _computed(pid: int) -> float:
    """CPU seconds of a process, by its clock in the kernel: a fiftieth of the cost of reading /proc."""
    try:
        return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)  # as clock_getcpuclockid(3), which Python lacks
    except OSError:  # the process has ended: the caller sees its pipe break
        return 0.0


def _is_asleep(pid: int) -> bool:
    """Whether a process waits for something other than a CPU or a disk."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]  # a name may hold any character
    except OSError:
        return True
    return state not in "RD"


class Child:
    """One guarded child, from `Zygote.fork`."""

    def __init__(self, zygote: Zygote, pid: int, requests: int, answers: int) -> None:
        self.pid = pid
        self._zygote, self._requests, self._answers = zygote, requests, answers
        for pipe in (requests, answers):
            os.set_blocking(pipe, False)
            with contextlib.suppress(OSError):  # the user's pipe memory quota is used up: slower, still correct
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def send(self, clock: Clock, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send a request. Raises `BrokenPipeError` if the child has ended, or `ChildTimeoutError`."""
        parts = frames.views(frames.frame(header), payload)
        while parts:
            try:
                parts = frames.rest(parts, os.writev(self._requests, parts))
            except BlockingIOError:
                clock.wait(self._requests, select.POLLOUT)

    def receive(self, clock: Clock) -> dict[str, Any]:
        """Read the header of an answer. Raises what `read_into` and `frames.parse` raise."""
        return parse(self.read(header_length(self.read(frames.LENGTH.size, clock)), clock))

    def read(self, length: int, clock: Clock) -> bytearray:
        """Read `length` bytes of an answer. Raises what `read_into` raises."""
        answer = bytearray(length)
        self.read_into([answer], clock)
        return answer

    def read_into(self, buffers: Sequence["WriteableBuffer"], clock: Clock) -> None:
        """Fill buffers with an answer's bytes. Raises `EOFError` if the child has ended, or `ChildTimeoutError`."""
        parts = frames.views(*buffers)
        while parts:
            try:
                read = os.readv(self._answers, parts)
            except BlockingIOError:
                clock.wait(self._answers, select.POLLIN)
                continue
            if not read:
                raise EOFError
            parts = frames.rest(parts, read)

    def is_quiet(self) -> bool:
        """Whether the answer pipe is open and holds no unexpected bytes."""
        return not _ready(self._answers, 0.0, select.POLLIN)

    def end(self) -> int:
        """Kill the child, which may have ended already. Returns its exit code, -n for signal n."""
        os.close(self._requests)
        os.close(self._answers)
        return self._zygote.end(self.pid)


def exit_reason(code: int) -> str:
    """An exit code as text: the signal's name, or the code."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _ready(pipe: int, seconds: float, event: int) -> bool:
    """Wait until a pipe can be read or written, or is broken. False: timeout."""
    poll = select.poll()  # unlike select(), it accepts descriptors above 1023
    poll.register(pipe, event)
    return bool(poll.poll(math.ceil(1000 * min(max(0.0, seconds), MAX_WAIT_SECONDS))))
