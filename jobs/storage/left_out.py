"""Counts of what a listing leaves out, by reason, with the names of what could not be read."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

MAX_NAMED: Final = 100
"""Maximum folders and containers that are named; all are counted."""
MAX_NAME: Final = 1000
"""Maximum characters of a name with its reason."""
MAX_IN_LINE: Final = 3
"""Maximum names in one line."""


class LeftOut(Counter[str]):
    """Reason -> number of objects that a listing leaves out.

    Objects left out because of their name or kind are only counted. A folder or container that could not be read may
    hold any number of images: it is also named, and beyond `--max-left-out` the exit code is 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unread = 0
        """Number of folders and containers that could not be read completely."""
        self.named: list[str] = []
        """The first of them, each with its reason."""

    def add_unread(self, reason: str, what: str) -> None:
        """Count a folder or container that could not be read; `what` is its name and the error."""
        self[reason] += 1
        self.unread += 1
        if len(self.named) < MAX_NAMED:  # records store the names as UTF-8
            text = what.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            self.named.append(text[:MAX_NAME])


def first_named(count: int, named: Sequence[str]) -> str:
    """The first few of `count` folders and containers that could not be read, each with its reason, in one line."""
    more = count - min(len(named), MAX_IN_LINE)
    return "; ".join(named[:MAX_IN_LINE]) + (f"; and {more:,} more" if more else "")
