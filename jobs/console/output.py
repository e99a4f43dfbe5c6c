"""Lines for the person on stderr, results on stdout; nothing of them may command a terminal or hold a secret."""

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
"""Between two lines about something that is waited for."""


class OutputError(Exception):
    """Nobody takes what goes to stdout."""


_run_id: str | None = None


def begin_lines() -> None:
    """Lines of a program that begins belong to no run."""
    global _run_id
    _run_id = None


@contextmanager
def lines_of_run(run_id: str) -> Iterator[None]:
    """Mark the body's lines in a log with its run; after an error also those that follow: they say what ended it."""
    global _run_id
    _run_id = run_id
    yield
    _run_id = None


def say(message: str) -> None:
    """Lines for the person who runs the command, on stderr: stdout is for results.

    In a log, which is no terminal, each carries the time in UTC, and the id of the run if there is one.
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
    """A line in the place of the one before, on a terminal; the last one stays."""
    _to_stderr(f"\r\033[K{printable(text)}", newline=last)


def _to_stderr(text: str, newline: bool = True) -> None:
    """A night must not end because a terminal was closed, the reader of a pipe went, or a log's disk is full."""
    with suppress(OSError):
        click.echo(text, err=True, nl=newline)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say every `WAITING_SECONDS` what the body waits for, and how busy this machine is."""
    stop, started = threading.Event(), time.monotonic()

    def speak() -> None:
        while not stop.wait(WAITING_SECONDS):
            load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
            say(f"waiting for {what}: {time.monotonic() - started:.0f} s so far, {load}")

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=WAITING_SECONDS)


def show(text: str) -> None:
    """Results, on stdout."""
    _to_stdout(_lines(text))


def show_json(values: dict[str, Any]) -> None:
    """A result as one line of JSON, on stdout."""
    hidden = {name: without_secrets(value) if isinstance(value, str) else value for name, value in values.items()}
    _to_stdout(json.dumps(hidden))


def _to_stdout(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        with suppress(OSError, ValueError):  # what is buffered must not fail again when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def printable(text: str) -> str:
    """Text for people: without secrets, and without what a terminal would take for commands."""
    return "".join(letter if letter.isprintable() else "?" for letter in without_secrets(text))


def _lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))
