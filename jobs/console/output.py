"""Print messages on stderr and results on stdout, without secrets and terminal control characters.

Messages are lines of text, or with `--log-format json` one JSON object per event.
"""

import json
import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Final

import click

from jobs.storage.redaction import without_secrets

WAITING_SECONDS = 15.0
"""Interval between two lines about a wait."""


class OutputError(Exception):
    """Standard output cannot be written."""


FORMAT_VARIABLE: Final = "NSNET_LOG_FORMAT"
FORMATS: Final = ("text", "json")
LEVELS: Final = {"error: ": "error", "warning: ": "warning"}
"""Start of a message -> its level."""
MAX_NATIVE_BYTES: Final = 2**16
"""Most bytes of `native_lines` that are printed."""
_marks: dict[str, Any] = {}
"""What each event carries, as far as it is known: command, run_id, attempt, stage."""
_format = "text"


def begin_lines(command: str = "", log_format: str = "text") -> None:
    """Begin the lines of a program: they belong to no run."""
    global _format
    _format = log_format
    _marks.clear()
    _marks.update({"command": command} if command else {})


def is_json() -> bool:
    """Whether messages are JSON."""
    return _format == "json"


def mark(**marks: Any) -> None:
    """Add these marks to the events that follow, such as `attempt` and `stage`; None removes one."""
    _marks.update(marks)
    for name in [name for name, value in marks.items() if value is None]:
        del _marks[name]


@contextmanager
def lines_of_run(run_id: str) -> Iterator[None]:
    """Mark the lines of the body with the run's id. After an error the mark stays: the error's line gets it as well."""
    mark(run_id=run_id)
    yield
    mark(run_id=None, attempt=None, stage=None)


def say(message: str, *, level: str | None = None, **fields: Any) -> None:
    """Print a message for the user on stderr; stdout is for results. `fields`: numbers of the message, for JSON only.
    `level`: default: as the message begins (`LEVELS`).

    If stderr is not a terminal, each line of text starts with the time in UTC and the id of the run, if there is one.
    """
    lines = _lines(message)
    if is_json():
        found = next((its for start, its in LEVELS.items() if message.startswith(start)), "info")
        _to_stderr(event(lines, level=level or found, **fields))
    else:
        _to_stderr(lines if is_terminal() else _marked(lines))


def relay(text: str) -> None:
    """Print lines of another program's log on stderr, as they are: they have their own times. If messages are JSON,
    lines that are not become events.
    """
    lines = _lines(text.expandtabs())
    if is_json():
        lines = "\n".join(line if _is_event(line) else event(line, level="info") for line in lines.split("\n"))
    _to_stderr(lines)


def _is_event(line: str) -> bool:
    """Whether a line is an event of this program, as JSON."""
    with suppress(ValueError, RecursionError):
        values = json.loads(line) if line.startswith("{") else None
        return isinstance(values, dict) and {"time", "level", "message"} <= set(values)
    return False


def event(message: str, *, level: str, **fields: Any) -> str:
    """An event as one line of JSON: time, level, the marks, the message, and further fields; without secrets."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps(redacted({"time": now, "level": level, **_marks, "message": message, **fields}))


def say_summary(prefix: str, values: dict[str, Any]) -> None:
    """Print the last line: `prefix` and one JSON object, without time and run; as an event, its field `summary`."""
    shown = redacted(values)
    _to_stderr(event("summary", level="info", summary=shown) if is_json() else prefix + json.dumps(shown))


def redacted(value: Any) -> Any:
    """A JSON-ready value, with secrets and control characters removed from all its texts."""
    if isinstance(value, str):
        return _lines(value)
    if isinstance(value, Mapping):
        return {printable(str(name)): redacted(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for it
    return value if value is None or isinstance(value, bool | int | float) else redacted(str(value))


class EventFormatter(logging.Formatter):
    """Log records of libraries as events."""

    def format(self, record: logging.LogRecord) -> str:
        """The record with its traceback as one line of JSON."""
        text = super().format(record)
        return event(text, level=record.levelname.lower(), logger=record.name)


def format_logs(*names: str | None) -> None:
    """Make all handlers of these loggers write events if messages are JSON; None is the root logger."""
    for name in names if is_json() else ():
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setFormatter(EventFormatter("%(message)s"))


@contextmanager
def native_lines(name: str) -> Iterator[None]:
    """If messages are JSON, print what native code of this library writes to stderr in the body as events, after it.

    It writes to the file descriptor, past `sys.stderr`, which stays as it is meanwhile.
    """
    if not is_json() or not _is_standard(sys.stderr):
        yield
        return
    stderr, descriptor = sys.stderr, os.dup(2)
    with tempfile.TemporaryFile() as file, open(descriptor, "w", encoding=stderr.encoding, errors=stderr.errors) as own:
        stderr.flush()
        sys.stderr = own
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            own.flush()
            os.dup2(descriptor, 2)
            sys.stderr = stderr
            file.seek(0)
            for line in file.read(MAX_NATIVE_BYTES).decode(errors="replace").splitlines():
                is_own = _is_event(line)  # of a log handler that was made before
                _to_stderr(line if is_own else event(printable(line), level="info", logger=name))


def _is_standard(stream: Any) -> bool:
    with suppress(AttributeError, OSError, ValueError):
        return bool(stream.fileno() == 2)
    return False


def is_terminal() -> bool:
    """Whether messages go to a terminal as text, where lines may be redrawn."""
    if is_json():
        return False
    with suppress(AttributeError, ValueError):  # no stderr, or a closed one
        return sys.stderr.isatty()
    return False


def _marked(lines: str) -> str:
    start = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} " + (f"{_marks['run_id']} " if "run_id" in _marks else "")
    return "\n".join(start + line for line in lines.split("\n"))


def redraw(text: str, *, last: bool = False) -> None:
    """Replace the current line of a terminal; the `last` line stays."""
    _to_stderr(f"\r\033[K{printable(text)}", newline=last)


def _to_stderr(text: str, newline: bool = True) -> None:
    """Ignore write errors: a closed terminal, a broken pipe or a full log disk must not end a long run."""
    with suppress(OSError):
        click.echo(text, err=True, nl=newline)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Report every `WAITING_SECONDS` what the body waits for, and this machine's load."""
    stop, started = threading.Event(), time.monotonic()

    def report() -> None:
        while not stop.wait(WAITING_SECONDS):
            load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
            say(f"waiting for {what}: {time.monotonic() - started:.0f} s so far, {load}")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=WAITING_SECONDS)


def show(text: str) -> None:
    """Print a result on stdout."""
    _to_stdout(_lines(text))


def show_json(values: dict[str, Any]) -> None:
    """Print a result as one line of JSON on stdout."""
    _to_stdout(json.dumps(_as_result(values)))


def _as_result(value: Any) -> Any:
    """A JSON value without secrets. Unlike in `redacted`, control characters stay, which JSON escapes: names of images
    must be exact.
    """
    if isinstance(value, dict):
        return {name: _as_result(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_as_result(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


def _to_stdout(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        with suppress(OSError, ValueError):  # buffered output must not fail again when the interpreter exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def printable(text: str) -> str:
    """Remove secrets and control characters from a text."""
    return "".join(letter if letter.isprintable() else "?" for letter in without_secrets(text))


def _lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))
