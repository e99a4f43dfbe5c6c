"""Some cases of `tests.fuzz`, those that failed once among them, and that it would notice. Costs 20 s."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.fuzz import KINDS, campaign
from tests.fuzz.deeds import DEEDS

FIRST = {"images": 100, "tars": 25, "tables": 10, "products": 30, "bundles": 6}
"""Kind -> number of cases. `tests/long/test_fuzz.py` runs those that follow."""


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_runs_anything_or_ends_the_driver(kind: str, tmp_path: Path) -> None:
    check(kind, {*range(FIRST[kind]), *campaign.kept(kind)}, tmp_path)


def check(kind: str, cases: Iterable[int], tmp_path: Path) -> None:
    seeds = sorted(cases)
    summary = campaign.run(kind, seeds, tmp_path)
    print(*summary.notable, summary, sep="\n")
    assert sum(summary.outcomes.values()) == len(seeds) and summary.failures == {}


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
