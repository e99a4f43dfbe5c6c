"""Lines for the person on stderr, results on stdout; nothing of them may command a terminal or hold a secret."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from jobs.storage.redaction import without_secrets

WAITING_SECONDS = 15.0
"""Between two lines about something that is waited for."""


class OutputError(Exception):
    """Nobody takes what goes to stdout."""


def say(message: str) -> None:
    """Lines for the person who runs the command, on stderr: stdout is for results."""
    _to_stderr(_lines(message))


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
