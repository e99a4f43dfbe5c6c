"""The lock of an output: one run writes there at a time, and a dead holder's lock expires.

`<out>/locks/<number>.json` names a holder; the highest number is the current lock. Its holder rewrites the file every
`HEARTBEAT_SECONDS`. A lock that is released, or older than `EXPIRY_SECONDS` by the store's clock, is taken over by
creating the next number, which only one process can do. The creator checks again before it relies on the lock: a slow
competitor may have created a higher number, and not every store makes conditional puts atomic.
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
from jobs.telemetry import export, series
from nsnet.errors import LockedError, StorageError

HEARTBEAT_SECONDS: Final = 15.0
MAX_NUMBER: Final = 99_999_999
"""Largest lock number (`names.LOCK`)."""
EXPIRY_SECONDS: Final = 120.0
"""A holder whose heartbeat fails for longer than this may lose the lock; it then publishes nothing."""
SETTLE_SECONDS: Final = 1.0
"""Delay between creating a lock in an object store and checking it."""
POLL_SECONDS: Final = 5.0
"""Poll interval while waiting for a lock."""
SIGNAL: Final = signal.SIGUSR2
"""Interrupts the main thread when the lock is lost. Not SIGINT: a process that a script starts in the background, or
under nohup, ignores it."""
_renewals: dict[str, float] = {}
"""Time of the last heartbeat of each lock that this process holds, by token."""


class LockLost(KeyboardInterrupt):
    """The lock was lost while the main thread worked. A `KeyboardInterrupt`: libraries clean up as after Ctrl-C."""


@contextmanager
def hold(out: Uri, *, wait: bool = False) -> Iterator["Lock"]:
    """Hold the lock of an output. Raises `LockedError` while another run holds it, unless `wait`.

    After a takeover by another run, any error in the body becomes a `LockedError`. In the main thread the takeover
    interrupts the body; in another thread the body must call `check`.
    """
    lock = Lock(out)
    with _interruptible(lock):
        lock.acquire(wait)
        try:
            yield lock
        except (Exception, KeyboardInterrupt) as error:  # any error: the new holder removes our files
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
        """Number of the lock file; grows from holder to holder."""
        self._stop = threading.Event()
        self._lost: str | None = None
        self.interrupt: Callable[[], None] = lambda: None
        """Interrupts the main thread if that holds the lock; does nothing for other threads."""
        self._thread: threading.Thread | None = None

    def acquire(self, wait: bool = False) -> None:
        """Take the lock and start its heartbeat."""
        announced = False
        while not self._try_acquire():
            holder = self._read(self._highest())
            described = f"process {str(holder.get('pid', '?'))[:20]} on {str(holder.get('host', '?'))[:80]}"
            if not wait:
                raise LockedError(
                    f"another run writes to {self.folder.removesuffix('/locks')} ({described}); wait for it with "
                    f"--wait. The lock of a run that died expires after {EXPIRY_SECONDS:g} s"
                )
            if not announced:
                say(f"waiting for another run ({described})")
                announced = True
            time.sleep(POLL_SECONDS)
        self._renewed()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether the heartbeat found that another run took the lock over before its release."""
        return self._lost is not None and not self._stop.is_set()

    def check(self) -> None:
        """Raise `LockedError` if another run has taken the lock over; this run must then publish nothing."""
        if self._lost is None and not self._is_ours():
            self._lost = "it was taken over by another run"
        if self._lost is not None:
            raise LockedError(f"the lock {self._uri(self.number)} was lost: {self._lost}; nothing was published")

    def refuse_if_lost(self, error: BaseException) -> None:
        """Raise `LockedError` from `error` if the lock is lost; if the store does not answer, only add a note."""
        try:
            self.check()
        except LockedError as lost:
            raise lost from error
        except Exception as store_error:  # botocore, aiohttp and OS errors share no base
            error.add_note(f"could not check whether the lock is lost: {type(store_error).__name__}")

    def release(self) -> None:
        """Release the lock. The file stays, so that numbers only grow."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        _renewals.pop(self._holder["token"], None)
        export_leases()
        try:
            if self._is_ours():
                writing.write_bytes(self._uri(self.number), _encoded({"released": True}))
        except Exception as error:  # an outage: the lock expires without a release
            say(f"warning: the lock was not released and expires in {EXPIRY_SECONDS:g} s ({errors.reason(error)})")

    def _try_acquire(self) -> bool:
        highest = self._highest()
        if highest and not self._is_free(highest):
            return False
        number = highest + 1
        if number > MAX_NUMBER:
            raise StorageError(f"{self._uri(highest)} has the largest lock number: remove this file")
        if not writing.create(self._uri(number), _encoded(self._holder)):
            return False
        if not uris.is_local(self.folder):
            time.sleep(SETTLE_SECONDS)
        self.number = number
        if not self._is_ours():
            return False
        for older in self._numbers():
            if older < number and self._is_lock(older):  # files of other programs stay
                writing.remove_file(self._uri(older))
        return True

    def _is_free(self, number: int) -> bool:
        holder = self._read(number)
        if holder.get("released") or _is_dead(holder):
            return True
        try:
            return writing.age_seconds(self._uri(number)) > EXPIRY_SECONDS
        except FileNotFoundError:
            return False  # taken over in between

    def _is_ours(self) -> bool:
        return self._highest() == self.number and self._read(self.number).get("token") == self._holder["token"]

    def _beat(self) -> None:
        """Rewrite the lock file at each heartbeat. Retries through an outage; ends only when another holder appears."""
        while not self._stop.wait(HEARTBEAT_SECONDS):
            export_leases()  # also during an outage: the process may have joined the cluster meanwhile
            try:
                if not self._is_ours():
                    self._lost = "another run took it over, since this one sent no heartbeat for a while"
                    self.interrupt()
                    return
                writing.write_bytes(self._uri(self.number), _encoded(self._holder))
                self._renewed()
            except Exception:  # botocore, aiohttp and OS errors share no base
                continue

    def _renewed(self) -> None:
        """Note a successful heartbeat."""
        _renewals[self._holder["token"]] = time.time()
        export_leases()

    def _uri(self, number: int) -> str:
        return uris.join(self.folder, f"{number:08d}.json")

    def _numbers(self) -> list[int]:
        files = listing.names_below(self.folder).files
        return [int(match["number"]) for name in files if (match := names.LOCK.fullmatch(name))]

    def _highest(self) -> int:
        return max(self._numbers(), default=0)

    def _is_lock(self, number: int) -> bool:
        """Whether a file's content is that of a lock."""
        try:
            return not {"token", "released"}.isdisjoint(self._read(number))
        except OSError:  # no permission to read it
            return False

    def _read(self, number: int) -> dict[str, Any]:
        """Content of a lock file; empty if it is damaged or missing: a damaged lock holds until it expires."""
        try:
            holder: dict[str, Any] = reading.read_json(self._uri(number), {}) if number else {}
        except (FileNotFoundError, StorageError):
            return {}
        return holder


def export_leases() -> None:
    """Report the locks of this process to the metrics of its cluster, if it has joined one."""
    renewals = list(_renewals.values())  # heartbeats of other locks change it meanwhile
    export.put(series.LOCKS_HELD, len(renewals))
    if renewals:
        export.put(series.LOCK_RENEWED, min(renewals))


@contextmanager
def _interruptible(lock: Lock) -> Iterator[None]:
    """Make the loss of a lock that the main thread holds raise `LockLost` there."""
    main = threading.main_thread().ident
    if threading.get_ident() != main or main is None:
        yield  # only the main thread handles signals, and it does not hold this lock
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if lock.is_lost:
            raise LockLost
        if callable(before):  # the signal is for another handler, such as the lock of another output
            before(number, frame)

    before = signal.signal(SIGNAL, handle)
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
    lock.interrupt = lambda: signal.pthread_kill(main, SIGNAL)
    try:
        yield
    except LockLost:
        lock.check()  # the signal may arrive while another error is handled
        raise
    finally:
        signal.signal(SIGNAL, before)
        if SIGNAL in blocked:
            signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})


def _encoded(holder: dict[str, Any]) -> bytes:
    return json.dumps(holder).encode()


def _process(pid: int) -> dict[str, Any]:
    """Permanent identity of a process: boot id, pid namespace, pid, and start time (None for a zombie)."""
    try:
        # split after the name, which may contain any character: state is field 3 of the line, starttime field 22
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
    """Whether the holder was a process of this machine that has ended, so that its lock need not expire first."""
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
    return "started" in _process(pid)  # True: a later process with this id, or a zombie; False: /proc is unreadable
