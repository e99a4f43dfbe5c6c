"""Format text tables for a terminal."""

from typing import Final

from jobs.console import output

UNDEFINED: Final = "–"
MAX_NAME_LETTERS: Final = 40


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table; the first row is the heading, the first column is left-aligned text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def short_name(name: str) -> str:
    shown = output.printable(name)
    return shown if len(shown) <= MAX_NAME_LETTERS else shown[: MAX_NAME_LETTERS - 1] + "…"
