"""Start processes before those of other tests, on a machine that is busy with them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

PREFERRED: Final = -15
SESSION: Final = Path("/proc/self/autogroup")
"""Linux divides the CPUs among sessions first, where the kernel has this file, and by `nice` only within each."""


@contextmanager
def preferred() -> Iterator[None]:
    """What this thread starts in the block runs before everything else until the block ends, if this user may do that.

    For nodes of Ray: a raylet ends itself if its agent needs more than 15 s for its imports, whatever its settings.
    They must stay in the session of the tests: their priority has no effect on processes of other sessions.
    """
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, PREFERRED)
    except PermissionError:
        yield
        return
    _prefer_session(PREFERRED)
    try:
        yield
    finally:
        _prefer_session(0)  # not what it was: other tests of the session may have preferred it meanwhile
        os.setpriority(os.PRIO_PROCESS, 0, usual)
        for process in psutil.Process().children(recursive=True):
            with suppress(OSError):  # it has ended
                for thread in Path(f"/proc/{process.pid}/task").iterdir():  # each has a priority of its own
                    if os.getpriority(os.PRIO_PROCESS, int(thread.name)) == PREFERRED:
                        os.setpriority(os.PRIO_PROCESS, int(thread.name), usual)


def _prefer_session(nice: int) -> None:
    with suppress(OSError):  # no such file, or not allowed
        SESSION.write_text(str(nice))
