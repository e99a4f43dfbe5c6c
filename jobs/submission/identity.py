"""Ids of submitted jobs: one per command, output and date, so that a night is not submitted twice."""

import hashlib
import re
from datetime import datetime
from typing import Final

from nsnet.errors import UsageError

NAME_LETTERS: Final = 24
VALID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Ids become parts of file names and of addresses."""


def submission_id(command: str, out: str, now: datetime) -> str:
    """The id of this command's job for this output on this date, such as `nsnet-score-incoming-1a2b3c4d-20261130`."""
    name = re.sub(r"[^a-z0-9]+", "-", out.rpartition("/")[2].lower())[:NAME_LETTERS].strip("-")
    parts = ("nsnet", command, name, hashlib.sha256(out.encode()).hexdigest()[:8], f"{now:%Y%m%d}")
    return "-".join(filter(None, parts))


def check_id(name: str) -> str:
    """Return an id that was given; raises `UsageError` if it cannot be part of a file name and an address."""
    if VALID.fullmatch(name) is None:
        raise UsageError(
            f"{name!r} is no submission id: give at most 100 letters, digits, `-`, `_` and `.`, a letter or digit first"
        )
    return name


def attempt(wanted: str, number: int) -> str:
    """The id of the nth job for a wanted id: itself, then with `-2`, `-3`, ..."""
    return wanted if number == 1 else f"{wanted}-{number}"
