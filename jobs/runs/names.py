"""Names of this program's files and folders below an output. Files with other names are never read or removed.

<out>/locks/00000001.json
<out>/staging/<run id>/manifest.parquet, run.json, attempt-00000001/ with accepted.json, todo/, rows/, checkpoint/
<out>/<product>/run_date=2026-01-02/run_id=<run id>/part-00000-0a1b2c3d.parquet
<out>/runs/<run id>.json

A file has `.partial-` and eight hexadecimal digits after its name while it is being written (`storage`).
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.ASCII)


_RUN_ID: Final = r"\d{8}T\d{6}Z-[0-9a-f]{6}"
_ATTEMPT: Final = r"attempt-\d{8}"
_PARTIAL: Final = r"(\.partial-[0-9a-f]{8})?"
_TASK: Final = r"\w+_[0-9a-f]{32}_\d{6,}"
"""Name of a Ray Data write task: the ids of its dataset and write, and its number."""
_PART: Final = rf"part-\d{{5,}}-[0-9a-f]{{8}}\.parquet{_PARTIAL}"
_DATE: Final = r"run_date=\d{4}-\d\d-\d\d"

LOCK: Final = _pattern(r"(?P<number>\d{8})\.json")
RUN: Final = _pattern(_RUN_ID)
ATTEMPT: Final = _pattern(_ATTEMPT)
RECORD: Final = _pattern(rf"(?P<run_id>{_RUN_ID})\.json")
COMMITTED: Final = _pattern(rf"(?P<task>{_TASK})\.parquet")
"""Ray Data's checkpoint file of a finished write task."""
ROWS: Final = _pattern(rf"(?P<task>{_TASK})-\d+\.parquet")
"""A write task's file of rows."""
ACCEPTED: Final = _pattern(rf"{_ATTEMPT}/rows/{_TASK}-\d+\.parquet")
"""A file of rows, by its path below the staging of its run."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """Patterns of this program's paths below a folder."""

    files: re.Pattern[str]
    folders: re.Pattern[str]


STAGED: Final = Own(
    files=_pattern(
        rf"manifest\.parquet|run\.json{_PARTIAL}|{_ATTEMPT}/(accepted\.json{_PARTIAL}|todo/part-\d{{6,}}\.parquet"
        rf"|rows/{_TASK}-\d+\.parquet|checkpoint/{_TASK}(\.pending)?\.parquet)"
    ),
    folders=_pattern(rf"{_ATTEMPT}(/(todo|rows|checkpoint))?"),
)
"""Below the staging of a run."""
PARTS: Final = Own(files=_pattern(_PART), folders=_pattern(r"(?!)"))
"""Below the folder of a run's published files."""
PUBLISHED: Final = Own(
    files=_pattern(rf"{_DATE}/run_id=(?P<run_id>{_RUN_ID})/{_PART}"), folders=_pattern(rf"{_DATE}(/run_id={_RUN_ID})?")
)
"""Below the folder of a product."""


def is_run_id(name: object) -> bool:
    """Whether a value is a valid run id: a time and six hexadecimal digits."""
    if not isinstance(name, str) or not RUN.fullmatch(name):
        return False
    try:
        datetime.strptime(name[:8], "%Y%m%d")
    except ValueError:
        return False
    return True
