"""A minute of `tests.fuzz`, after the cases of `tests/system/test_fuzz.py`, and that it notices what it must."""

from pathlib import Path

import pytest

from tests.fuzz import KINDS, campaign
from tests.fuzz.deeds import DEEDS
from tests.system.test_fuzz import FIRST, check

pytestmark = pytest.mark.faults

END = {"images": 600, "tars": 150, "tables": 50, "products": 200, "bundles": 30}
"""Kind -> the first case that only `make fuzz` runs."""


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_runs_anything_or_ends_the_driver(kind: str, tmp_path: Path) -> None:
    check(kind, range(FIRST.get(kind, 0), END[kind]), tmp_path)


def test_each_deed_that_is_forbidden_is_noticed(tmp_path: Path) -> None:
    last = len(DEEDS) - 1
    seeds = [0, 1, 2, last, *range(3, last)]  # in one driver after the other; the last one's leftovers are counted
    summary = campaign.run("deeds", seeds, tmp_path)
    assert summary.outcomes.total() == len(DEEDS)
    for number, (said, _) in enumerate(DEEDS):
        name = f"deeds:{number}" if number != last else "deeds, at the end"
        assert said in summary.failures.get(name, ""), number
    assert "deeds:0" not in summary.failures and (tmp_path / "deeds-0").is_dir()
    again = summary.failures["deeds:1"].rpartition("the input is in ")[2].split(";")
    assert (Path(again[0]) / "deed").read_text() == "1" and "python -m tests.fuzz deeds:1" in again[1]
