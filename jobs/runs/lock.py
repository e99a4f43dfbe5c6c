"""The lock of an output: one run at a time writes there, and a dead holder's lock expires.

`<out>/locks/<number>.json` names a holder; the highest number counts. Its holder writes the file again every
`HEARTBEAT_SECONDS`; released, or older than `EXPIRY_SECONDS` by the store's own clock, it may be taken over by
creating the next number, which only one can do. Whoever created a number looks again before believing it: a slow
competitor may have gone ahead, and not every store makes conditional puts atomic.
"""

import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from jobs.console.output import say
from jobs.runs import names
from jobs.storage import errors, listing, reading, uris, writing
from jobs.storage.uris import Uri
from nsnet.errors import LockedError, StorageError

HEARTBEAT_SECONDS: Final = 15.0
MAX_NUMBER: Final = 99_999_999
"""Largest number of a lock (`names.LOCK`)."""
EXPIRY_SECONDS: Final = 120.0
"""A holder that could not write for longer than this may lose the lock; then it publishes nothing."""
SETTLE_SECONDS: Final = 1.0
"""Between creating a lock in an object store and believing it."""
POLL_SECONDS: Final = 5.0
"""Between two looks at a lock that is waited for."""
SIGNAL: Final = signal.SIGUSR2
"""Wakes the main thread when the lock is lost, whatever it waits for. Not Ctrl-C's signal: a process that a script
starts in the background, or under nohup, ignores that one."""


class LockLost(KeyboardInterrupt):
    """The lock was lost while the main thread worked: libraries let go of everything, as after Ctrl-C."""


@contextmanager
def hold(out: Uri, *, wait: bool = False) -> Iterator["Lock"]:
    """Hold the lock of an output. Raises `LockedError` while another run has it, unless `wait`.

    Where another run takes it over, whatever happens in the body ends as a `LockedError`; the body itself is
    interrupted in the main thread, elsewhere it has to `check`.
    """
    lock = Lock(out)
    with _interruptible(lock):
        lock.acquire(wait)
        try:
            yield lock
        except (Exception, KeyboardInterrupt) as error:  # whatever it is: who took the lock over removes files of ours
            lock.refuse_if_lost(error)
            raise
        finally:
            lock.release()


class Lock:
    """The lock of an output; use `hold`."""

    def __init__(self, out: Uri) -> None:
        self.folder = uris.join(out, "locks")
        self._holder = {"token": secrets.token_hex(8), "host": socket.gethostname(), **_process(os.getpid())}
        self.number = 0
        """Grows from holder to holder."""
        self._stop = threading.Event()
        self._lost: str | None = None
        self.interrupt: Callable[[], None] = lambda: None
        """Stops the work of the main thread, where that holds the lock; elsewhere only `check` tells."""
        self._thread: threading.Thread | None = None

    def acquire(self, wait: bool = False) -> None:
        """Take the lock and keep it by a heartbeat."""
        announced = False
        while not self._try():
            holder = self._read(self._highest())
            who = f"process {str(holder.get('pid', '?'))[:20]} on {str(holder.get('host', '?'))[:80]}"
            if not wait:
                raise LockedError(
                    f"another run writes to {self.folder.removesuffix('/locks')} ({who}); wait for it with --wait. "
                    f"The lock of a run that died expires after {EXPIRY_SECONDS:g} s"
                )
            if not announced:
                say(f"waiting for another run ({who})")
                announced = True
            time.sleep(POLL_SECONDS)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether the heartbeat noticed that another run has taken the lock over, before it was let go."""
        return self._lost is not None and not self._stop.is_set()

    def check(self) -> None:
        """Raise `LockedError` if another run has taken the lock over: then nothing may be published any more."""
        if self._lost is None and not self._is_ours():
            self._lost = "it was taken over by another run"
        if self._lost is not None:
            raise LockedError(f"the lock {self._uri(self.number)} was lost: {self._lost}; nothing was published")

    def refuse_if_lost(self, error: BaseException) -> None:
        """Raise `LockedError` if the lock is lost, which explains this error; a store that does not tell decides
        nothing.
        """
        try:
            self.check()
        except LockedError as lost:
            raise lost from error
        except Exception as failed:  # botocore, aiohttp and OS errors share no base
            error.add_note(f"the store does not say whether the lock is lost: {type(failed).__name__}")

    def release(self) -> None:
        """Let the lock go. The file stays, so that numbers only grow."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._is_ours():
                writing.write_bytes(self._uri(self.number), _encoded({"released": True}))
        except Exception as error:  # the store is away: the lock expires by itself
            say(f"warning: the lock was not released and expires in {EXPIRY_SECONDS:g} s ({errors.reason(error)})")

    def _try(self) -> bool:
        highest = self._highest()
        if highest and not self._is_free(highest):
            return False
        number = highest + 1
        if number > MAX_NUMBER:
            raise StorageError(f"{self._uri(highest)} has the last number that a lock can have: remove this file")
        if not writing.create(self._uri(number), _encoded(self._holder)):
            return False
        if not uris.is_local(self.folder):
            time.sleep(SETTLE_SECONDS)
        self.number = number
        if not self._is_ours():
            return False
        for older in self._numbers():
            if older < number and self._is_lock(older):  # what another program put there stays
                writing.remove_file(self._uri(older))
        return True

    def _is_free(self, number: int) -> bool:
        holder = self._read(number)
        if holder.get("released") or _is_dead(holder):
            return True
        try:
            return writing.age_seconds(self._uri(number)) > EXPIRY_SECONDS
        except FileNotFoundError:
            return False  # taken over at this moment

    def _is_ours(self) -> bool:
        return self._highest() == self.number and self._read(self.number).get("token") == self._holder["token"]

    def _beat(self) -> None:
        """Write the lock again and again. An outage of the store is waited for; only another holder ends it."""
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self._is_ours():
                    self._lost = "another run took it over, since this one was not heard of for a while"
                    self.interrupt()
                    return
                writing.write_bytes(self._uri(self.number), _encoded(self._holder))
            except Exception:  # botocore, aiohttp and OS errors share no base
                continue

    def _uri(self, number: int) -> str:
        return uris.join(self.folder, f"{number:08d}.json")

    def _numbers(self) -> list[int]:
        files = listing.names_below(self.folder).files
        return [int(match["number"]) for name in files if (match := names.LOCK.fullmatch(name))]

    def _highest(self) -> int:
        return max(self._numbers(), default=0)

    def _is_lock(self, number: int) -> bool:
        """Whether a file says what a lock says."""
        try:
            return not {"token", "released"}.isdisjoint(self._read(number))
        except OSError:  # it may not be read
            return False

    def _read(self, number: int) -> dict[str, Any]:
        """What a lock file says; nothing where it is damaged: then it holds until it expires."""
        try:
            holder: dict[str, Any] = reading.read_json(self._uri(number), {}) if number else {}
        except (FileNotFoundError, StorageError):
            return {}
        return holder


@contextmanager
def _interruptible(lock: Lock) -> Iterator[None]:
    """While a lock is held by the main thread, its loss raises `LockLost` there."""
    main = threading.main_thread().ident
    if threading.get_ident() != main or main is None:
        yield  # signals are handled by the main thread alone, which does not work for this lock
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if lock.is_lost:
            raise LockLost
        if callable(before):  # the signal was for somebody else, such as the lock of another output
            before(number, frame)

    before = signal.signal(SIGNAL, handle)
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
    lock.interrupt = lambda: signal.pthread_kill(main, SIGNAL)
    try:
        yield
    except LockLost:
        lock.check()  # it may come while another error is looked at
        raise
    finally:
        signal.signal(SIGNAL, before)
        if SIGNAL in blocked:
            signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})


def _encoded(holder: dict[str, Any]) -> bytes:
    return json.dumps(holder).encode()


def _process(pid: int) -> dict[str, Any]:
    """What identifies a process for ever: machine since its start, pid namespace, pid, and its start where it lives."""
    try:
        # after the name, which may hold anything: state is the 3rd field of the line, starttime the 22nd
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "namespace": os.readlink("/proc/self/ns/pid"),
            "pid": pid,
            "started": None if state == "Z" else int(fields[18]),
        }
    except OSError:
        return {"pid": pid}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine and is gone, so that nobody needs to wait for the expiry."""
    here = _process(os.getpid())
    if not all(name in here and here[name] == holder.get(name) for name in ("boot", "namespace")):
        return False
    pid = holder.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    if _process(pid).get("started") == holder.get("started"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's process
    return "started" in _process(pid)  # a later process of this id, or a zombie; unless /proc does not tell
