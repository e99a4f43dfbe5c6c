"""A minute of `tests.fuzz`: the cases after those of `tests/system/test_fuzz.py`."""

from pathlib import Path

import pytest

from tests.fuzz import KINDS
from tests.system.test_fuzz import FIRST, check

END = {"images": 600, "tars": 150, "tables": 50, "products": 200, "bundles": 30}
"""Kind -> the first case that only `make fuzz` runs."""


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_runs_anything_or_ends_the_driver(kind: str, tmp_path: Path) -> None:
    check(kind, range(FIRST[kind], END[kind]), tmp_path)
