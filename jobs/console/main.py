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

from jobs.console import output, summary
from jobs.console.output import OutputError, say
from jobs.storage.left_out import first_named
from jobs.storage.redaction import guard_logs, traceback_text
from nsnet.errors import NsnetError

EXIT_USAGE = 2
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
    arguments = sys.argv[1:]
    command_name = _command_name(name, arguments)
    output.begin_lines(command_name, _log_format(arguments))
    summary.begin()
    _tolerant_streams()
    quiet_libraries()
    signal.signal(signal.SIGTERM, _terminated)
    code, error = _run(command, name)
    if code or "--help" not in arguments:
        summary.finish(command_name, code, error)
    sys.exit(code)


def _run(command: click.Command, name: str) -> tuple[int, str | None]:
    """Run a command; returns its exit code, and the line of the error that ended it."""
    try:
        return command.main(prog_name=name, standalone_mode=False) or 0, None
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)  # the text quotes the arguments, which `say` redacts
        message = f"error: {error.format_message()}" if output.is_json() else usage.getvalue().rstrip("\n")
        say(message)
        return error.exit_code, error.format_message()
    except _Terminated:
        return _failed("stopped", 128 + signal.SIGTERM)
    except SystemExit as end:  # click's own, after --help
        return end.code if isinstance(end.code, int) else int(end.code is not None), None
    except (click.Abort, KeyboardInterrupt):
        return _failed("stopped", 128 + signal.SIGINT)
    except OutputError as error:
        return _failed(str(error), 1)
    except Exception as error:  # botocore, aiohttp, Ray and OS errors have no common base
        from jobs.storage import errors  # imported late because its imports are slow

        cause = errors.root_cause(error)
        line = errors.explain(cause)
        if line is None:
            say(traceback_text(error), level="error")
            return 1, f"{type(cause).__name__}: {cause}"
        if debugging():
            say(traceback_text(_with_contexts(error)))
        return _failed(line, cause.exit_code if isinstance(cause, NsnetError) else 1)


def end_early(error: NsnetError, arguments: list[str]) -> NoReturn:
    """End before the command `arguments[0]` is run, as if it had ended with this error."""
    name, *own = arguments
    output.begin_lines(name, _log_format(own))
    summary.begin()
    code, line = _failed(str(error), error.exit_code)
    summary.finish(name, code, line)
    sys.exit(code)


def _command_name(program_name: str, arguments: list[str]) -> str:
    """Name of the command, which is an argument of the command group; empty if there is none."""
    words = [*program_name.split()[1:], *(argument for argument in arguments if not argument.startswith("-"))]
    return words[0] if words else ""


def _log_format(arguments: list[str]) -> str:
    """Format of messages, found before click reads the arguments: it may refuse them, and that is a message as well."""
    given = os.environ.get(output.FORMAT_VARIABLE, output.FORMATS[0])
    for option, value in zip(arguments, [*arguments, ""][1:], strict=True):
        name, _, attached = option.partition("=")
        if name == "--log-format":
            given = attached or value
    return given if given in output.FORMATS else output.FORMATS[0]


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


def _failed(message: str, code: int) -> tuple[int, str]:
    """Print the line of an error; returns what `_run` does."""
    line = " ".join(message.split())
    say(f"error: {line}", exit_code=code)
    return code, line


def _tolerant_streams() -> None:
    """Write characters that a stream's encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Silence libraries on the console; this program's own warnings still show."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    guard_logs(None)
    output.format_logs(None)
    if output.is_json():
        logging.captureWarnings(True)
        threading.excepthook = _thread_ended
        sys.unraisablehook = lambda problem: say(f"warning: {problem.err_msg or 'ignored'}: {problem.exc_value!r}")
    for name in ("open_clip", "httpx", "huggingface_hub", "botocore", "aiobotocore", "s3fs"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # open_clip warns on the root logger about random weights, which a recipe may choose
    logging.getLogger().addFilter(lambda record: "No pretrained weights loaded" not in record.getMessage())
    warnings.filterwarnings("ignore", category=FutureWarning)


def _thread_ended(thread: threading.ExceptHookArgs) -> None:
    """Print the error that ended a thread."""
    if thread.exc_value is not None and thread.exc_type is not SystemExit:
        say(traceback_text(thread.exc_value), level="error")


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
    summary.note_failures(failed, rows, allowed)
    if failed <= allowed * rows:
        return 0
    say(f"{failed} of {rows} images failed, more than the allowed {allowed:.2%}: exit code {EXIT_TOO_MANY_FAILED}")
    return EXIT_TOO_MANY_FAILED
