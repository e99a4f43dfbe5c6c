"""What all commands share: exit codes, one-line errors, common options."""

import io
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from jobs.storage.left_out import first_named
from jobs.storage.redaction import guard_logs, traceback_text, without_secrets
from nsnet.errors import NsnetError
from nsnet.images import DecodeLimits

EXIT_TOO_MANY_FAILED = 3
"""Finished and published, but more images failed, or more of the source could not be read, than allowed."""
WAITING_SECONDS = 15.0
"""Between two lines about something that is waited for."""


def run(command: click.Command, name: str) -> NoReturn:
    """Run a command as the program: what can be expected ends as one line on stderr and an exit code.

    Expected are errors of `nsnet.errors`, wrong usage, signals, and what a store or this machine does
    (`faults.explain`): every `OSError`, errors of the store's client, memory, nesting; also where Ray carried them here
    from a task. Anything else is a bug of this program: it keeps its traceback, without secrets, and ends with 1.
    """
    _tolerant_streams()
    quiet_libraries()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(command.main(prog_name=name, standalone_mode=False) or 0)
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)  # it quotes what was typed
        say(usage.getvalue().rstrip("\n"))
        sys.exit(error.exit_code)
    except _Terminated:
        _fail("stopped", 128 + signal.SIGTERM)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped", 128 + signal.SIGINT)
    except _OutputError as error:
        _fail(str(error), 1)
    except Exception as error:  # botocore, aiohttp, Ray's and OS errors share no base
        from jobs.storage import errors  # not sooner: its imports take a while

        cause = errors.root_cause(error)
        line = errors.explain(cause)
        if line is None:
            say(traceback_text(error))
            sys.exit(1)
        _fail(line, cause.exit_code if isinstance(cause, NsnetError) else 1)


class _Terminated(SystemExit):
    """SIGTERM came."""


class _OutputError(Exception):
    """Nobody takes what goes to stdout."""


def _terminated(number: int, frame: object) -> NoReturn:
    """End as after Ctrl-C, so that locks and processes are let go: schedulers end a job by SIGTERM."""
    raise _Terminated(128 + number)


def _fail(message: str, code: int) -> NoReturn:
    say(f"error: {' '.join(message.split())}")
    sys.exit(code)


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
        raise _OutputError(f"standard output cannot be written: {error.strerror}") from error


def printable(text: str) -> str:
    """Text for people: without secrets, and without what a terminal would take for commands."""
    return "".join(letter if letter.isprintable() else "?" for letter in without_secrets(text))


def _lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _tolerant_streams() -> None:
    """A letter that a stream's encoding lacks is written as its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Keep libraries' chatter off the console: what matters is in our own lines, warnings of ours still show."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    guard_logs(None)
    for name in ("open_clip", "httpx", "huggingface_hub", "botocore", "aiobotocore", "s3fs"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # open_clip says on the root logger that a model starts from random weights: here that is a recipe's choice
    logging.getLogger().addFilter(lambda record: "No pretrained weights loaded" not in record.getMessage())
    warnings.filterwarnings("ignore", category=FutureWarning)


class ShareType(click.ParamType[float]):
    """A share as `1%` or `0.01`."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{value!r} is no share such as 1% or 0.01", param, ctx)
        if not 0.0 <= share <= 1.0:
            self.fail(f"{value!r} is not between 0 and 100%", param, ctx)
        return share


def _stack(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


address_option = click.option(
    "--address", default=None, help="Ray cluster to use; default: the one this runs in, else an embedded one."
)

weights_options = _stack(
    click.option("--clip-weights", default=None, help="Local path of the CLIP weights, instead of the hub's."),
    click.option(
        "--captioner", default=None, help="Local transformers folder of a BLIP captioner, instead of the hub's."
    ),
)

limit_options = _stack(
    click.option("--max-bytes", default=DecodeLimits.max_bytes, show_default=True, help="Largest file, in bytes."),
    click.option("--max-pixels", default=DecodeLimits.max_pixels, show_default=True, help="Largest picture, in px."),
    click.option("--max-seconds", default=DecodeLimits.max_seconds, show_default=True, help="Longest decoding, in s."),
)


column_option = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="KEY=NAME",
    help="Column of Parquet files that holds image, label, generator, uri …, where it is not called so; several.",
)

selection_options = _stack(
    click.option("--include", multiple=True, metavar="GLOB", help="Only paths below SOURCE like this; several: any."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No paths like this. `*` also matches `/`."),
    column_option,
    click.option("--limit", type=int, default=None, help="Most pictures: the first that are found, in no order."),
    click.option("--shuffle-seed", type=int, default=None, help="A random order; with --limit, a random sample."),
    click.option("--retry-failed", is_flag=True, help="Do again what failed before."),
    click.option("--rescore", is_flag=True, help="Do everything again."),
)


max_failed_option = click.option(
    "--max-failed",
    type=ShareType(),
    default="1%",
    show_default=True,
    help="Share of failed pictures above which the exit code is 3; what came out is written all the same.",
)


max_left_out_option = click.option(
    "--max-left-out",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Folders and containers of SOURCE that may be unreadable, or not readable to their end; with more the exit "
    "code is 3. What is left out by its name does not count.",
)


def left_out_code(record: dict[str, Any], allowed: int) -> int:
    """0, or 3 with a line that names them where more folders and containers could not be read than allowed."""
    unread = record["unread_count"]
    if unread <= allowed:
        return 0
    say(
        f"{unread} folders or containers of the source could not be read, more than the allowed {allowed} "
        f"(--max-left-out): {first_named(unread, record['unread'])}: exit code {EXIT_TOO_MANY_FAILED}"
    )
    return EXIT_TOO_MANY_FAILED


def exit_code(counts: dict[str, dict[str, int]], rows: int, allowed: float) -> int:
    """0, or 3 with a line that says so where more pictures failed than allowed."""
    failed = counts["status"].get("failed", 0)
    if failed <= allowed * rows:
        return 0
    say(f"{failed} of {rows} pictures failed, more than the allowed {allowed:.2%}: exit code {EXIT_TOO_MANY_FAILED}")
    return EXIT_TOO_MANY_FAILED


def limits_from(options: dict[str, Any]) -> DecodeLimits:
    """Take the limit options out of a command's keyword arguments."""
    names = ("max_bytes", "max_pixels", "max_seconds")
    return DecodeLimits(**{name: options.pop(name) for name in names})
