"""Run a command: signals, one-line errors, exit codes."""

import atexit
import contextlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from typing import Any, NoReturn

import click

from jobs.console.output import OutputError, begin_lines, say
from jobs.storage.left_out import first_named
from jobs.storage.redaction import guard_logs, traceback_text
from nsnet.errors import NsnetError

EXIT_TOO_MANY_FAILED = 3
"""The run was published, but more images failed, or more of the source was unreadable, than allowed."""


def program(command: click.Command, name: str) -> NoReturn:
    """Run a command as this process, and end it. See `run`."""
    try:
        run(command, name)
    except SystemExit as end:
        if "torch" in sys.modules:
            _leave(end.code)
        raise


def _leave(code: Any) -> NoReturn:
    """End the process without taking apart its modules, which takes a second or two with torch among them.

    What Python does before that is done: it waits for threads, and calls the functions that libraries registered.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def run(command: click.Command, name: str) -> NoReturn:
    """Run a command and exit; an expected error ends as one line on stderr and an exit code.

    Expected errors are those of `nsnet.errors`, wrong usage, signals, and failures of a store or of this machine
    (`errors.explain`): every `OSError`, errors of the store's client, memory, nesting; also when Ray passes them on
    from a task. Any other error is a bug of this program: its traceback is printed without secrets, exit code 1. With
    `--debug` or NSNET_DEBUG=1 the traceback of an expected error is printed as well.
    """
    begin_lines()
    _tolerant_streams()
    quiet_libraries()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(command.main(prog_name=name, standalone_mode=False) or 0)
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)  # the text quotes the arguments, which `say` redacts
        say(usage.getvalue().rstrip("\n"))
        sys.exit(error.exit_code)
    except _Terminated:
        _fail("stopped", 128 + signal.SIGTERM)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped", 128 + signal.SIGINT)
    except OutputError as error:
        _fail(str(error), 1)
    except Exception as error:  # botocore, aiohttp, Ray and OS errors have no common base
        from jobs.storage import errors  # imported late because its imports are slow

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
    """Make the traceback show the errors that `raise … from None` hides; returns the error."""
    seen: BaseException | None = error
    for _ in range(20):  # a chain of causes may be circular
        if seen is None:
            break
        seen.__suppress_context__ = seen.__cause__ is not None
        seen = seen.__cause__ or seen.__context__
    return error


class _Terminated(SystemExit):
    """SIGTERM was received."""


def _terminated(number: int, frame: object) -> NoReturn:
    """Exit as after Ctrl-C, so that locks and processes are released: schedulers end a job with SIGTERM."""
    raise _Terminated(128 + number)


def _fail(message: str, code: int) -> NoReturn:
    say(f"error: {' '.join(message.split())}")
    sys.exit(code)


def _tolerant_streams() -> None:
    """Write characters that a stream's encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Silence libraries on the console; this program's own warnings still show."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    guard_logs(None)
    for name in ("open_clip", "httpx", "huggingface_hub", "botocore", "aiobotocore", "s3fs"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # open_clip warns on the root logger about random weights, which a recipe may choose
    logging.getLogger().addFilter(lambda record: "No pretrained weights loaded" not in record.getMessage())
    warnings.filterwarnings("ignore", category=FutureWarning)


def left_out_code(record: dict[str, Any], allowed: int) -> int:
    """Return 3 and name them if more folders and containers could not be read than allowed, else 0."""
    unread = record["unread_count"]
    if unread <= allowed:
        return 0
    say(
        f"{unread} folders or containers of the source could not be read, more than the allowed {allowed} "
        f"(--max-left-out): {first_named(unread, record['unread'])}: exit code {EXIT_TOO_MANY_FAILED}"
    )
    return EXIT_TOO_MANY_FAILED


def exit_code(counts: dict[str, dict[str, int]], rows: int, allowed: float) -> int:
    """Return 3 and print the counts if more images failed than allowed, else 0."""
    failed = counts["status"].get("failed", 0)
    if failed <= allowed * rows:
        return 0
    say(f"{failed} of {rows} images failed, more than the allowed {allowed:.2%}: exit code {EXIT_TOO_MANY_FAILED}")
    return EXIT_TOO_MANY_FAILED
