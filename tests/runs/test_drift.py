"""Drift between runs: of unchanged runs at most 5 % raise an alarm, and a changed one does."""

from typing import Any

import numpy as np
import pytest

from jobs.runs.drift import BINS, MAX_RUNS, MIN_ROWS, MIN_RUNS, Seen, drift, histogram, seen, with_earlier

WEEKS = 200


def week(rng: np.random.Generator, images: int, fakes: float, spread: float = 0.0) -> Seen:
    """A run whose share of fakes is this, give or take `spread`."""
    share = np.clip(fakes + spread * rng.standard_normal(), 0.0, 1.0)
    is_fake = rng.random(images) < share
    prob_fake = np.where(is_fake, rng.beta(8, 2, images), rng.beta(2, 8, images))
    return Seen(
        scored=images,
        flagged=int((prob_fake >= 0.5).sum()),
        distributions={"prob_fake": histogram(prob_fake), "residual_energy": histogram(rng.beta(6, 4, images))},
    )


def alarms(shift: float, spread: float, images: int = 2000) -> float:
    """Share of weeks with an alarm, of `WEEKS` that follow twelve of another size each."""
    rng = np.random.default_rng(0)
    count = 0
    for _ in range(WEEKS):
        earlier = [week(rng, int(images * rng.uniform(0.6, 1.4)), 0.2, spread) for _ in range(12)]
        found = drift(week(rng, images, 0.2 + shift, spread), earlier)
        assert found is not None and found.runs == 12
        count += bool(found.alarms)
    return count / WEEKS


@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_unchanged_weeks_raise_an_alarm_in_at_most_5_percent(spread: float) -> None:
    """Equal weeks, and weeks that differ by a point themselves; 2 s each."""
    assert alarms(0.0, spread) <= 0.05


@pytest.mark.parametrize(("shift", "least"), [(0.05, 0.9), (0.10, 1.0)])
def test_shift_of_the_flagged_share_raises_an_alarm(shift: float, least: float) -> None:
    """In points of the share of fakes; 2,000 images."""
    assert alarms(shift, 0.0) >= least


def test_change_of_the_features_alone_raises_an_alarm() -> None:
    """The same share is called fake, but the projection leaves more: other images, or another captioner."""
    rng = np.random.default_rng(1)
    earlier = [week(rng, 2000, 0.2) for _ in range(8)]
    now = week(rng, 2000, 0.2)
    changed = Seen(
        scored=now.scored,
        flagged=now.flagged,
        distributions={**now.distributions, "residual_energy": histogram(rng.beta(7, 3, 2000))},
    )
    found = drift(changed, earlier)
    assert found is not None and found.alarms == ("residual_energy",)


def test_smallest_share_is_where_the_alarm_begins() -> None:
    rng = np.random.default_rng(2)
    earlier, now = [week(rng, 5000, 0.2) for _ in range(10)], week(rng, 5000, 0.2)
    found = drift(now, earlier)
    assert found is not None
    for sign in (-1, 1):
        for factor, is_alarm in ((0.97, False), (1.03, True)):
            share = found.expected_share + sign * factor * found.smallest_share
            other = drift(Seen(scored=5000, flagged=round(5000 * share), distributions=now.distributions), earlier)
            assert other is not None and ("flagged" in other.alarms) == is_alarm


def test_runs_without_any_fake_have_an_expectation() -> None:
    empty = {"prob_fake": histogram(np.zeros(500)), "residual_energy": histogram(np.full(500, 0.5))}
    none = Seen(scored=500, flagged=0, distributions=empty)
    found = drift(none, [none] * MIN_RUNS)
    assert found is not None and found.alarms == () and found.expected_share == 0.0


def test_few_runs_are_not_compared() -> None:
    rng = np.random.default_rng(3)
    assert drift(week(rng, 500, 0.2), [week(rng, 500, 0.2)] * (MIN_RUNS - 1)) is None


def test_histogram_holds_every_number_once() -> None:
    counts = histogram(np.array([0.0, 0.0099, 0.01, 0.5, 0.999, 1.0, 1.7, -0.1, np.nan]))
    assert counts.sum() == 8 and (counts[0], counts[1], counts[50], counts[BINS - 1]) == (3, 1, 1, 3)


def test_record_without_distributions_or_with_few_rows_is_not_compared() -> None:
    full = [0] * (BINS - 1) + [MIN_ROWS]
    record = {
        "counts": {"verdict": {"fake": 30}}, "distributions": {"prob_fake": full, "residual_energy": full}
    }  # fmt: skip
    found = seen(record)
    assert found is not None and (found.scored, found.flagged) == (MIN_ROWS, 30)
    for broken in (
        {}, {"prob_fake": full}, {"prob_fake": full, "residual_energy": full[:-1]},
        {"prob_fake": [0] * (BINS - 1) + [MIN_ROWS - 1], "residual_energy": full},
    ):  # fmt: skip
        assert seen(record | {"distributions": broken}) is None


@pytest.mark.parametrize(
    "damaged",
    [
        {"distributions": []}, {"distributions": None}, {"counts": {"verdict": []}},
        {"counts": {"verdict": {"fake": "x"}}},
        {"distributions": {"prob_fake": [None] * BINS, "residual_energy": [10] * BINS}},
        {"distributions": {"prob_fake": [10] * BINS, "residual_energy": [10**30] * BINS}},
        {"distributions": {"prob_fake": [-10] * BINS, "residual_energy": [10] * BINS}},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_record_is_not_compared(damaged: dict[str, Any]) -> None:
    """Others may write records: one must not end the report of a run that was published."""
    full = {"prob_fake": [10] * BINS, "residual_energy": [10] * BINS}
    assert seen({"distributions": full}) is not None
    assert seen({"counts": {"verdict": {}}, "distributions": full} | damaged) is None


def test_run_is_compared_with_the_latest_earlier_ones_of_its_detector_and_source() -> None:
    full = {"prob_fake": [10] * BINS, "residual_energy": [10] * BINS}

    def record(fake: int, detector: str = "one", source: str = "s3://in", rows: int = 1000) -> dict[str, Any]:
        counts = {"verdict": {"fake": fake}}
        return {"rows": rows, "detector_id": detector, "source": source, "counts": counts, "distributions": full}

    records = [record(1), record(2, rows=0), record(3, detector="two"), record(4, source="s3://other"), record(5)]
    shown = [(now and now.flagged, [one.flagged for one in earlier]) for _, now, earlier in with_earlier(records)]
    assert shown == [(1, []), (3, []), (4, []), (5, [1])]
    *_, (_, _, earlier) = with_earlier(map(record, range(MAX_RUNS + 3)))
    assert [one.flagged for one in earlier] == list(range(2, MAX_RUNS + 2))
