"""Print messages on stderr and results on stdout, without secrets and terminal control characters."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import click

from jobs.storage.redaction import without_secrets

WAITING_SECONDS = 15.0
"""Interval between two lines about a wait."""


class OutputError(Exception):
    """Standard output cannot be written."""


_run_id: str | None = None


def begin_lines() -> None:
    """Lines of a program that begins belong to no run."""
    global _run_id
    _run_id = None


@contextmanager
def lines_of_run(run_id: str) -> Iterator[None]:
    """Mark the lines of the body with the run's id. After an error the mark stays: the error's line gets it as well."""
    global _run_id
    _run_id = run_id
    yield
    _run_id = None


def say(message: str) -> None:
    """Print a message for the user on stderr; stdout is for results.

    If stderr is not a terminal, each line starts with the time in UTC and the id of the run, if there is one.
    """
    lines = _lines(message)
    _to_stderr(lines if _is_terminal() else _marked(lines))


def _is_terminal() -> bool:
    with suppress(AttributeError, ValueError):  # no stderr, or a closed one
        return sys.stderr.isatty()
    return False


def _marked(lines: str) -> str:
    mark = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} " + (f"{_run_id} " if _run_id else "")
    return "\n".join(mark + line for line in lines.split("\n"))


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
    redacted = {name: without_secrets(value) if isinstance(value, str) else value for name, value in values.items()}
    _to_stdout(json.dumps(redacted))


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
