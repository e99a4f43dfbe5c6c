"""Curves of an evaluation: what is plotted is what was measured."""

import json
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from jobs.evaluation.curves import BASE_RATES, BINS, HISTOGRAM_BINS, Z, curves, wilson
from nsnet import metrics
from nsnet.calibration import rate_upper
from tests.support.tables import verdict_row, verdict_table

Rows = list[dict[str, Any]]


def made_rows(reals: int = 1500, fakes: int = 700, *, digits: int = 4, **values: Any) -> Rows:
    rng = np.random.default_rng(0)
    rows = []
    for label, size in enumerate((reals, fakes)):
        for i, x in enumerate(rng.normal(size=size) + 2.5 * (label - 0.5)):
            uri = f"/{label}/{i}"
            rows.append(verdict_row(uri, round(float(1 / (1 + np.exp(-x))), digits), label=label, **values))
    return rows


def arrays(rows: Rows) -> tuple[Any, Any, Any]:
    return (
        np.array([row["label"] for row in rows]),
        np.array([row["prob_fake"] for row in rows]),
        np.array([row["verdict"] == "fake" for row in rows]),
    )


@pytest.mark.parametrize("digits", [1, 4])
def test_roc_is_thinned_to_points_of_the_whole_curve_that_hold_its_rates(digits: int) -> None:
    rows = made_rows(digits=digits)
    labels, scores, _ = arrays(rows)
    found = curves(verdict_table(*rows))["roc"]
    fpr, tpr, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    whole = {(round(x, 12), round(y, 12)) for x, y in zip(fpr, tpr, strict=True)}
    points = list(zip(found["fpr"], found["tpr"], strict=True))
    assert {(round(x, 12), round(y, 12)) for x, y in points} <= whole
    assert points == sorted(points) and points[-1] == (1.0, 1.0) and len(points) <= 202
    assert found["reals"] == 1500
    for limit in (0.001, 0.01, 1.0):  # on the grid
        best = max(y for x, y in points if x <= limit + 1e-12)
        assert best == pytest.approx(metrics.tpr_at_fpr(labels, scores, limit), abs=1e-12)
    for limit in (0.003, 0.05, 0.5):  # between its points, which are 3.5 % apart
        at_most = metrics.tpr_at_fpr(labels, scores, limit)
        at_least = metrics.tpr_at_fpr(labels, scores, limit / 1.036)
        best = max(y for x, y in points if x <= limit + 1e-12)
        assert at_least is not None and at_most is not None and at_least - 1e-12 <= best <= at_most + 1e-12


def test_reliability_is_the_share_of_fakes_per_bin() -> None:
    rows = made_rows()
    found = curves(verdict_table(*rows))["reliability"]
    bins: dict[int, Rows] = {}
    for row in rows:
        bins.setdefault(min(int(row["prob_fake"] * BINS), BINS - 1), []).append(row)
    for place, own in enumerate(bins[k] for k in sorted(bins)):
        assert found["pictures"][place] == len(own)
        assert found["fakes"][place] == pytest.approx(np.mean([row["label"] for row in own]))
        assert found["probability"][place] == pytest.approx(np.mean([row["prob_fake"] for row in own]))
        assert found["low"][place] <= found["fakes"][place] <= found["high"][place]


def test_wilson_ends_where_the_share_is_just_as_far_as_chance_allows() -> None:
    share, images = np.array([0.0, 0.1, 0.5, 1.0, 0.25]), np.array([1, 10, 30, 7, 10_000])
    for end in wilson(share, images):
        assert ((end >= 0) & (end <= 1)).all()
        spread = Z * np.sqrt(end * (1 - end) / images)
        np.testing.assert_allclose(np.abs(share - end), spread, atol=1e-7)
    low, high = wilson(share, images)
    assert (low <= share).all() and (high >= share).all() and (low < high).all()


def test_histogram_counts_each_image_once() -> None:
    rows = [*made_rows(), verdict_row("/0", 0.0, label=0), verdict_row("/1", 1.0, label=1)]
    found = curves(verdict_table(*rows))["histogram"]
    for label, name in enumerate(("real", "fake")):
        own = [row for row in rows if row["label"] == label]
        assert len(found[name]) == HISTOGRAM_BINS and sum(found[name]) == len(own)
        assert found[name][0] == sum(row["prob_fake"] < 1 / HISTOGRAM_BINS for row in own)


def test_precision_is_that_of_the_metrics_and_the_cautious_one_of_the_largest_rate_that_may_be() -> None:
    rows = made_rows()
    labels, _, said = arrays(rows)
    found = curves(verdict_table(*rows))["precision"]
    expected = [metrics.precision_at_base_rate(labels, said, rate) for rate in BASE_RATES]
    np.testing.assert_allclose(found["value"], expected, rtol=1e-12)
    false_alarms = int(said[labels == 0].sum())
    assert found["fpr"] == false_alarms / 1500 and found["fpr_upper"] == rate_upper(false_alarms, 1500)
    tpr, b = said[labels == 1].mean(), BASE_RATES
    np.testing.assert_allclose(found["cautious"], b * tpr / (b * tpr + (1 - b) * found["fpr_upper"]), rtol=1e-12)


def test_no_false_alarm_is_no_proof_that_there_will_be_none() -> None:
    rows = [verdict_row(f"/{label}/{i}", float(label), label=label) for label in (0, 1) for i in range(100)]
    found = curves(verdict_table(*rows))["precision"]
    assert set(found["value"]) == {1.0}
    assert found["fpr_upper"] == pytest.approx(1 - 0.05 ** (1 / 100))
    assert max(found["cautious"]) < 1.0


def test_curves_that_are_undefined_are_none() -> None:
    only = [row for row in made_rows(20, 20) if row["label"] == 1]
    found = curves(verdict_table(*only))
    assert found["roc"] is None and found["precision"] is None and found["reliability"]["pictures"]
    silent = [{**row, "verdict": "real"} for row in made_rows(20, 20)]
    assert curves(verdict_table(*silent))["precision"] is None
    failed = curves(verdict_table(verdict_row("/a", None, label=1)))
    assert (
        failed["roc"] is None and failed["reliability"]["probability"] == [] and sum(failed["histogram"]["fake"]) == 0
    )


def test_threshold_and_uncertain_band_are_what_the_verdicts_say() -> None:
    rows = made_rows(20, 20, threshold=0.4)
    assert curves(verdict_table(*rows))["threshold"] == 0.4
    assert curves(verdict_table(*rows))["uncertain"] is None
    band = [
        verdict_row("/u", 0.38, label=0, verdict="uncertain"),
        verdict_row("/v", 0.43, label=1, verdict="uncertain"),
    ]
    assert curves(verdict_table(*rows, *band))["uncertain"] == [0.38, 0.43]
    assert curves(verdict_table(*rows, *band))["threshold"] is None  # two of them
    assert curves(verdict_table(*rows).drop_columns(["threshold"]))["threshold"] is None


def test_transformed_and_unlabelled_images_are_on_no_curve() -> None:
    rows = made_rows(20, 20)
    others = [verdict_row("/t", 0.9, label=0, transform="jpeg:75"), verdict_row("/u", 0.9)]
    assert curves(verdict_table(*rows, *others)) == curves(verdict_table(*rows))


def test_curves_are_json() -> None:
    found = curves(verdict_table(*made_rows()))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(json.dumps(found)) < 30_000
