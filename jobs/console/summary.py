"""The last line of a command: `summary {...}`, one JSON object with what came out of it, also after an error.

A script reads it instead of the text: exit code, seconds, runs with their counts and records, or the error.
"""

import json
import time
from typing import Any, Final

from jobs.console import output
from jobs.telemetry import export, series

COMMANDS: Final = ("audit", "caption", "train", "ablate", "score", "evaluate")
"""Commands that end with a summary."""
PREFIX: Final = "summary "
MAX_BYTES: Final = 8192
"""Longest summary; a longer one leaves its lists out."""
MAX_LETTERS: Final = 500
"""Longest text in it."""
MAX_ITEMS: Final = 16
"""Longest list in it."""
_started = 0.0
_values: dict[str, Any] = {}


def begin() -> None:
    """Begin the summary of a program."""
    global _started
    _started = time.monotonic()
    _values.clear()


def note(**values: Any) -> None:
    """Add values to the summary."""
    _values.update(values)


def note_item(name: str, **values: Any) -> None:
    """Add an item to a list of the summary; of a long list the first `MAX_ITEMS` are shown."""
    _values.setdefault(name, []).append(values)


def note_failures(failed: int, rows: int, allowed: float) -> None:
    """Add the share of failed images and the allowed one; of several calls the worst share counts."""
    share = failed / rows if rows else 0.0
    _values.update(failed_share=max(share, _values.get("failed_share", 0.0)), max_failed=allowed)


def finish(command: str, exit_code: int, error: str | None = None) -> None:
    """Report the end to the metrics of the cluster, and print the summary of `COMMANDS` unless it is a terminal."""
    export.put(series.EXIT_CODE, exit_code, command=command)
    if "failed_share" in _values:
        export.put(series.FAILED_SHARE, _values["failed_share"])
        export.put(series.FAILED_SHARE_ALLOWED, _values["max_failed"])
    if command not in COMMANDS or output.is_terminal():
        return  # on a terminal, where a person reads, it would hide the line before it
    values = {"command": command, "exit_code": exit_code, "seconds": round(time.monotonic() - _started, 1), **_values}
    output.say_summary(PREFIX, _bounded(values | ({"error": error} if error else {})))


def _bounded(values: dict[str, Any]) -> dict[str, Any]:
    """The values without secrets, and short enough for one line of any log."""
    short: dict[str, Any] = _short(output.redacted(values))
    if len(json.dumps(short)) > MAX_BYTES:
        short = {name: value for name, value in short.items() if not isinstance(value, list | dict)}
        short["shortened"] = True
    return short


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MAX_LETTERS else value[: MAX_LETTERS - 1] + "…"
    if isinstance(value, dict):
        return {name: _short(one) for name, one in value.items()}
    return [_short(one) for one in value[:MAX_ITEMS]] if isinstance(value, list) else value
