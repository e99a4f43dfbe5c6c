"""What a listing leaves out: counted by reason, and named where it could not be read."""

from collections import Counter
from typing import Final

MAX_NAMED: Final = 100
"""Folders and containers that are named; all are counted."""


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
        if len(self.named) < MAX_NAMED:
            self.named.append(what)
