"""What a listing leaves out: counted by reason, and named where it could not be read."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

MAX_NAMED: Final = 100
"""Folders and containers that are named; all are counted."""
MAX_NAME: Final = 1000
"""Characters of a name and its reason."""
MAX_IN_LINE: Final = 3
"""Of them in one line."""


class LeftOut(Counter[str]):
    """Reason -> number of objects that a listing leaves out.

    What is left out by its name or its kind is only counted. A folder or container that could not be read may hold any
    number of images: it is named as well, and a run that meets one is not a success (`--max-left-out`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.unread = 0
        """Folders and containers that could not be read, or not to their end."""
        self.named: list[str] = []
        """The first of them, each with its reason."""

    def add_unread(self, reason: str, what: str) -> None:
        """Count a folder or container that could not be read; `what` names it and says why."""
        self[reason] += 1
        self.unread += 1
        if len(self.named) < MAX_NAMED:  # records hold the names, as UTF-8
            text = what.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            self.named.append(text[:MAX_NAME])


def first_named(count: int, named: Sequence[str]) -> str:
    """The first few of `count` folders and containers that could not be read, each with its reason, in one line."""
    more = count - min(len(named), MAX_IN_LINE)
    return "; ".join(named[:MAX_IN_LINE]) + (f"; and {more:,} more" if more else "")
