"""Format text tables for a terminal."""

from collections.abc import Sequence
from typing import Final

from jobs.console import output

UNDEFINED: Final = "–"
MAX_NAME_LETTERS: Final = 40


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table; the first row is the heading, the first `left` columns are left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]]


def short_name(name: str) -> str:
    """A name that is printable and not too long for a column."""
    shown = output.printable(name)
    return shown if len(shown) <= MAX_NAME_LETTERS else shown[: MAX_NAME_LETTERS - 1] + "…"
