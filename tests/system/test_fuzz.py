"""Some cases of `tests.fuzz`, those that failed once among them, but for bundles, which need torch. Costs 15 s."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.fuzz import campaign
from tests.fuzz.deeds import DEEDS

FIRST = {"images": 50, "tars": 12, "tables": 5, "products": 15}
"""Kind -> number of cases. `tests/long/test_fuzz.py` runs those that follow."""


@pytest.mark.parametrize("kind", FIRST)
def test_no_damaged_file_runs_anything_or_ends_the_driver(kind: str, tmp_path: Path) -> None:
    check(kind, range(FIRST[kind]), tmp_path)


def check(kind: str, cases: Iterable[int], tmp_path: Path) -> None:
    """Run these cases of a kind, and those that failed once."""
    seeds = sorted({*cases, *campaign.kept(kind)})
    summary = campaign.run(kind, seeds, tmp_path)
    print(*summary.notable, summary, sep="\n")
    assert sum(summary.outcomes.values()) == len(seeds) and summary.failures == {}


def test_deed_that_is_forbidden_is_noticed(tmp_path: Path) -> None:
    """The first one is allowed; `tests/long/test_fuzz.py` tries all."""
    failures = campaign.run("deeds", [0, 1], tmp_path).failures
    assert failures.keys() == {"deeds:1"} and DEEDS[1][0] in failures["deeds:1"]
