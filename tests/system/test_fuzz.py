"""Some cases of `tests.fuzz`, those that failed once among them. Costs 20 s."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.fuzz import campaign

FIRST = {"images": 100, "tars": 25, "tables": 10, "products": 30}
"""Kind -> number of cases. `tests/long/test_fuzz.py` runs those that follow, and bundles, which need torch."""


@pytest.mark.parametrize("kind", FIRST)
def test_no_damaged_file_runs_anything_or_ends_the_driver(kind: str, tmp_path: Path) -> None:
    check(kind, range(FIRST[kind]), tmp_path)


def check(kind: str, cases: Iterable[int], tmp_path: Path) -> None:
    """Run these cases of a kind, and those that failed once."""
    seeds = sorted({*cases, *campaign.kept(kind)})
    summary = campaign.run(kind, seeds, tmp_path)
    print(*summary.notable, summary, sep="\n")
    assert sum(summary.outcomes.values()) == len(seeds) and summary.failures == {}
