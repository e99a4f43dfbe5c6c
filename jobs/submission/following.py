"""Follow a submitted job: its log as it is written, and at its end its own exit code."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import aiohttp

from jobs.console.output import relay, say
from jobs.submission.client import JobServer, last_line
from nsnet.errors import StorageError, UsageError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

OWN_CODES: Final = (0, 1, 2, 3, 4, 130, 143)
"""What commands end with. Any other code is that of a shell or a signal, and becomes 1."""
STOPPED_CODE: Final = 143
INTERRUPTED_CODE: Final = 130
SILENCE_SECONDS: Final = 60.0
"""After so long without a line the log is requested again: a connection may be lost without a notice."""
SILENCE_AFTER_END_SECONDS: Final = 10.0
"""The same once the job has ended, when the log does not grow any more."""
RETRY_SECONDS: Final = 2.0
LOG_TRIES: Final = 5
"""A proxy may refuse the kind of connection that sends the log, or the node of the driver may be gone."""
OUTAGE_SECONDS: Final = 600.0
"""How long the job server may be out of reach."""
STOP_SECONDS: Final = 90.0
"""How long the job may take to release its lock after it was asked to stop."""
LOG_ERRORS: Final = (RuntimeError, OSError, aiohttp.ClientError)
"""What Ray's client raises when the connection that sends the log cannot be made, or breaks."""
SILENT: Final = "no line"
"""Why a connection was closed that sent nothing."""
LAST_LINES: Final = 20
MISSING: Final = "No module named "


class Log:
    """Prints the log of a job, each line once, although every connection sends it from its beginning."""

    def __init__(self) -> None:
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._printed = 0
        self._read = 0
        self._begun = ""

    def begin(self) -> None:
        """A new connection begins to send the log."""
        self._read = 0

    def add(self, text: str) -> None:
        """A piece of the log, in the order of the connection."""
        start = max(0, self._printed - self._read)
        self._read += len(text)
        self._printed = max(self._printed, self._read)
        *lines, self._begun = (self._begun + text[start:]).split("\n")
        if lines:
            self.last.extend(lines)
            relay("\n".join(lines))

    def end(self) -> None:
        """Print a last line that has no end."""
        if self._begun:
            self.add("\n")


def follow(server: JobServer, name: str, ask_to_stop: Callable[[], bool] | None) -> int:
    """Print the job's log until it ends; returns its exit code. A lost connection is made again.

    At Ctrl-C `ask_to_stop` decides whether the job is stopped; without it, or at SIGTERM, the job goes on.
    Raises `StorageError` if the server is out of reach for `OUTAGE_SECONDS`.
    """
    try:
        return _exit_code(_watch(server, name, log := Log()), log)
    except KeyboardInterrupt:
        stop = False
        with suppress(KeyboardInterrupt, EOFError):
            stop = ask_to_stop is not None and ask_to_stop()
        if stop:
            _stop(server, name)
        else:
            say(how_to_go_on(server, name))
        return INTERRUPTED_CODE
    except SystemExit:  # SIGTERM
        say(how_to_go_on(server, name))
        raise


def how_to_go_on(server: JobServer, name: str) -> str:
    """What to do with a job that nobody follows."""
    address = f"--address {server.address}"
    return (
        f"{name} goes on: `nsnet submit --follow {name} {address}` shows its log and ends with its exit code, "
        f"`ray job stop {name} {address}` stops it"
    )


def _watch(server: JobServer, name: str, log: Log) -> "JobDetails":
    """Print the log until the job has ended."""
    answered = time.monotonic()
    is_lost = has_ended = False
    failures = 0
    while True:
        silence = SILENCE_AFTER_END_SECONDS if has_ended else SILENCE_SECONDS
        problem = asyncio.run(_print(server, name, log, silence))
        is_failure = problem is not None and (has_ended or problem != SILENT)
        failures = failures + 1 if is_failure else 0
        if failures == LOG_TRIES:
            say(f"the log of {name} cannot be read for now ({problem}): waiting for the end of the job")
        try:
            info = server.info(name)
            answered, is_lost = time.monotonic(), False
            if info is None:
                raise UsageError(
                    f"{server.address} knows no job {name}: the cluster was restarted since, or the id is wrong"
                )
            has_ended = info.status.is_terminal()
            if has_ended and (problem is None or failures >= LOG_TRIES):
                log.end()
                return info
        except StorageError as error:
            if time.monotonic() - answered > OUTAGE_SECONDS:
                raise StorageError(f"{error}; {how_to_go_on(server, name)}") from error
            if not is_lost:
                say(f"{error}: trying again for {OUTAGE_SECONDS:g} s; the job goes on")
            is_lost = True
        time.sleep(RETRY_SECONDS)


async def _print(server: JobServer, name: str, log: Log, silence_seconds: float) -> str | None:
    """Print what one connection sends; returns why it broke, `SILENT`, or None if the log has ended."""
    log.begin()
    stream = server.tail(name)
    try:
        while True:
            log.add(await asyncio.wait_for(anext(stream), silence_seconds))
    except StopAsyncIteration:
        return None
    except LOG_ERRORS as error:
        if type(error) is TimeoutError:  # of `wait_for`; the client's own timeouts are subclasses
            return SILENT
        return last_line(str(error) or type(error).__name__)
    finally:
        with suppress(*LOG_ERRORS):
            await stream.aclose()


def _exit_code(info: "JobDetails", log: Log) -> int:
    """The code of a job that has ended; says why, unless the job's own log does."""
    status, code = str(info.status), info.driver_exit_code
    if status == "STOPPED":
        say(f"{info.submission_id} was stopped")
        return STOPPED_CODE
    if code == 1 and any(MISSING in line and "jobs" in line.partition(MISSING)[2][:6] for line in log.last):
        raise UsageError("the cluster's image has no nsnet, or an older one: build the image, or give --code upload")
    if code in OWN_CODES:
        return int(code)
    if code is None:
        reason = last_line((info.message or "").partition("\n")[0])
    else:
        reason = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with code {code}"
    raise StorageError(f"{info.submission_id} {status.lower()}: {reason}")


def _stop(server: JobServer, name: str) -> None:
    """Stop a job and wait until it has released its lock."""
    server.stop(name)
    say(f"stopping {name}")
    end = time.monotonic() + STOP_SECONDS
    while time.monotonic() < end:
        info = server.info(name)
        if info is None or info.status.is_terminal():
            say(f"{name} has ended")
            return
        time.sleep(0.5)
    say(f"{name} has not ended within {STOP_SECONDS:g} s: look at it with `ray job status {name}`")
