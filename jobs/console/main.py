"""What all commands share: exit codes, one-line errors, common options."""

import io
import logging
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import click

from jobs.console.output import OutputError, begin_lines, say
from jobs.storage.left_out import first_named
from jobs.storage.redaction import guard_logs, traceback_text
from nsnet.errors import NsnetError

EXIT_TOO_MANY_FAILED = 3
"""Finished and published, but more images failed, or more of the source could not be read, than allowed."""


def run(command: click.Command, name: str) -> NoReturn:
    """Run a command as the program: what can be expected ends as one line on stderr and an exit code.

    Expected are errors of `nsnet.errors`, wrong usage, signals, and what a store or this machine does
    (`faults.explain`): every `OSError`, errors of the store's client, memory, nesting; also where Ray carried them here
    from a task. Anything else is a bug of this program: it keeps its traceback, without secrets, and ends with 1. With
    `--debug` or NSNET_DEBUG=1 expected errors show theirs as well.
    """
    begin_lines()
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
    except OutputError as error:
        _fail(str(error), 1)
    except Exception as error:  # botocore, aiohttp, Ray's and OS errors share no base
        from jobs.storage import errors  # not sooner: its imports take a while

        cause = errors.root_cause(error)
        line = errors.explain(cause)
        if line is None:
            say(traceback_text(error))
            sys.exit(1)
        if debugging():
            say(traceback_text(_with_contexts(error)))
        _fail(line, cause.exit_code if isinstance(cause, NsnetError) else 1)


def debugging() -> bool:
    """Whether tracebacks of expected errors are wanted."""
    return os.environ.get("NSNET_DEBUG", "").lower() in ("1", "true", "yes")


def _with_contexts(error: BaseException) -> BaseException:
    """The error with those that it was raised `from None` over."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__suppress_context__ = seen.__cause__ is not None
        seen = seen.__cause__ or seen.__context__
    return error


class _Terminated(SystemExit):
    """SIGTERM came."""


def _terminated(number: int, frame: object) -> NoReturn:
    """End as after Ctrl-C, so that locks and processes are let go: schedulers end a job by SIGTERM."""
    raise _Terminated(128 + number)


def _fail(message: str, code: int) -> NoReturn:
    say(f"error: {' '.join(message.split())}")
    sys.exit(code)


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
    """0, or 3 with a line that says so where more images failed than allowed."""
    failed = counts["status"].get("failed", 0)
    if failed <= allowed * rows:
        return 0
    say(f"{failed} of {rows} images failed, more than the allowed {allowed:.2%}: exit code {EXIT_TOO_MANY_FAILED}")
    return EXIT_TOO_MANY_FAILED
