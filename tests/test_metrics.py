"""Metrics against scikit-learn and against counting by hand, with ties, and undefined where nothing is defined."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sklearn_metrics

from nsnet.metrics import (
    accuracies,
    auroc,
    average_precision,
    bootstrap_interval,
    check,
    expected_calibration_error,
    tpr_at_fpr,
)

Labels = NDArray[Any]
Array = NDArray[np.float64]

RANKED: dict[str, Callable[[Labels, Array], float | None]] = {
    "ap": average_precision,
    "auroc": auroc,
    "tpr at 1 %": lambda y, s: tpr_at_fpr(y, s, 0.01),
}


def cases() -> list[tuple[Labels, Array]]:
    """Random and heavily tied scores in [0, 1], balanced and not, with both classes."""
    found = []
    rng = np.random.default_rng(0)
    for n in (2, 3, 10, 57, 400):
        for levels in (1, 2, 5, 0):
            for share in (0.1, 0.5, 0.9):
                y = (rng.random(n) < share).astype(np.int64)
                y[:2] = 0, 1
                s = np.clip(rng.random(n) + 0.3 * y * rng.random(), 0, 1)
                found.append((y, np.floor(s * levels) / levels if levels else s))
    return found


CASES = cases()

# At most 60 examples of up to 40 images; no example database is kept.
examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)
scored = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([-1.5, 0.0, 0.1, 0.1 + 1e-16, 0.5, 7.0])), min_size=1,
                  max_size=40)  # fmt: skip


def naive_tpr(y: Labels, s: Array, fpr: float) -> float:
    """Every threshold, one after the other."""
    best = 0.0
    for threshold in [*s, math.inf]:
        flagged = s >= threshold
        if np.mean(flagged[y == 0]) <= fpr + 1e-12:
            best = max(best, float(np.mean(flagged[y == 1])))
    return best


def naive_auroc(y: Labels, s: Array) -> float:
    wins = [float(fake > real) + 0.5 * float(fake == real) for fake in s[y == 1] for real in s[y == 0]]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_accuracies_equal_scikit_learn(case: int, threshold: float) -> None:
    y, s = CASES[case]
    called = (s >= threshold).astype(int)
    acc, real_acc, fake_acc = accuracies(y, s, threshold)
    assert acc == pytest.approx(sklearn_metrics.accuracy_score(y, called), abs=1e-12)
    assert real_acc == pytest.approx(sklearn_metrics.recall_score(y, called, pos_label=0), abs=1e-12)
    assert fake_acc == pytest.approx(sklearn_metrics.recall_score(y, called, pos_label=1), abs=1e-12)


def test_score_at_the_threshold_is_fake() -> None:
    assert accuracies([1, 0], [0.5, 0.5], 0.5) == (0.5, 0.0, 1.0)
    assert accuracies([1, 0], [0.5, 0.5], np.nextafter(0.5, 1)) == (0.5, 1.0, 0.0)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_ranking_metrics_equal_scikit_learn(case: int) -> None:
    y, s = CASES[case]
    assert average_precision(y, s) == pytest.approx(sklearn_metrics.average_precision_score(y, s), abs=1e-12)
    assert auroc(y, s) == pytest.approx(sklearn_metrics.roc_auc_score(y, s), abs=1e-12)
    fpr, tpr, _ = sklearn_metrics.roc_curve(y, s, drop_intermediate=False)
    for limit in (0.0, 0.001, 0.01, 0.1, 0.5, 1.0):
        expected = tpr[fpr <= limit + 1e-12].max()
        assert tpr_at_fpr(y, s, limit) == pytest.approx(expected, abs=1e-12)


@examples
@given(scored)
def test_ranking_metrics_equal_counting_by_hand(pairs: list[tuple[int, float]]) -> None:
    y, s = np.array([label for label, _ in pairs]), np.array([score for _, score in pairs])
    if len(set(y.tolist())) < 2:
        assert average_precision(y, s) is auroc(y, s) is tpr_at_fpr(y, s, 0.1) is None
        return
    assert auroc(y, s) == pytest.approx(naive_auroc(y, s), abs=1e-12)
    for limit in (0.0, 0.1, 1 / 3, 1.0):
        assert tpr_at_fpr(y, s, limit) == pytest.approx(naive_tpr(y, s, limit), abs=1e-12)


@examples
@given(scored, st.randoms(use_true_random=False))
def test_order_of_the_images_changes_nothing(pairs: list[tuple[int, float]], random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    (y, s), (other_y, other_s) = (zip(*rows, strict=True) for rows in (pairs, shuffled))
    for metric in RANKED.values():
        assert metric(np.array(y), np.array(s)) == pytest.approx(
            metric(np.array(other_y), np.array(other_s)), abs=1e-12
        )


@pytest.mark.parametrize("case", range(0, len(CASES), 5))
def test_ranking_metrics_depend_on_the_order_of_scores_only(case: int) -> None:
    y, s = CASES[case]
    for metric in RANKED.values():
        assert metric(y, s) == metric(y, np.exp(3 * s) - 7)
    assert auroc(1 - y, -s) == pytest.approx(auroc(y, s), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "ap", "area", "tpr"),
    [([0.9, 0.8, 0.2, 0.1], 1.0, 1.0, 1.0), ([0.1, 0.2, 0.8, 0.9], 5 / 12, 0.0, 0.0), ([0.5] * 4, 0.5, 0.5, 0.0)],
)
def test_perfect_inverted_and_constant_scores(scores: list[float], ap: float, area: float, tpr: float) -> None:
    y = [1, 1, 0, 0]
    assert average_precision(y, scores) == pytest.approx(ap)
    assert auroc(y, scores) == area
    assert tpr_at_fpr(y, scores, 0.01) == tpr


def test_tpr_allows_a_share_of_reals_that_is_exactly_the_limit() -> None:
    """29 of 100 reals at 0.29: in binary 0.29 · 100 is a little under 29, and must still allow 29."""
    assert 0.29 * 100 < 29
    y = np.array([0] * 100 + [1] * 2)
    s = np.array([9.0] * 29 + [1.0] * 71 + [9.0, 0.5])
    assert tpr_at_fpr(y, s, 0.29) == 0.5
    assert tpr_at_fpr(y, s, 0.28) == 0.0


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("labels", [[], [0], [1, 1, 1], [0, 0]])
def test_ranking_without_both_classes_is_undefined(name: str, labels: list[int]) -> None:
    assert RANKED[name](np.array(labels, np.int64), np.linspace(0, 1, len(labels))) is None


def test_accuracy_of_a_class_without_images_is_undefined() -> None:
    assert accuracies([], []) == (None, None, None)
    assert accuracies([0, 0], [0.1, 0.9]) == (0.5, 0.5, None)
    assert accuracies([1], [0.9]) == (1.0, None, 1.0)
    assert expected_calibration_error([], []) is None
    assert bootstrap_interval(auroc, [1, 1], [0.1, 0.2]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*RANKED, "accuracies", "ece", "bootstrap"])
def test_scores_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    metrics: dict[str, Callable[[Labels, Array], object]] = {
        **RANKED,
        "accuracies": accuracies,
        "ece": expected_calibration_error,
        "bootstrap": lambda y, s: bootstrap_interval(auroc, y, s),
    }
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        metrics[name](np.array([0, 1, 1]), np.array([0.1, bad, 0.3]))


@pytest.mark.parametrize(
    ("labels", "scores"), [([0, 1], [0.5]), ([[0, 1]], [[0.5, 0.5]]), ([0, 2], [0.1, 0.2]), ([0.5, 1], [0.1, 0.2])]
)
def test_labels_that_do_not_fit_are_refused(labels: list[float], scores: list[float]) -> None:
    with pytest.raises(ValueError, match="labels"):
        check(labels, scores)


@pytest.mark.parametrize("labels", [[False, True], [0.0, 1.0], np.array([0, 1], np.uint8)])
def test_labels_of_any_type_with_values_0_and_1_pass(labels: list[float]) -> None:
    y, s = check(labels, [1, 2])
    assert y.tolist() == [0, 1] and y.dtype == np.int64 and s.dtype == np.float64


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("case", range(0, len(CASES), 3))
def test_calibration_error_equals_a_naive_loop(case: int, bins: int) -> None:
    y, p = CASES[case]
    error: Any = 0.0
    for k in range(bins):
        inside = [i for i in range(len(y)) if k <= p[i] * bins < k + 1 or (k == bins - 1 and p[i] == 1)]
        if inside:
            error += len(inside) / len(y) * abs(np.mean(y[inside]) - np.mean(p[inside]))
    assert expected_calibration_error(y, p, bins) == pytest.approx(error, abs=1e-12)


def test_calibration_error_of_known_cases() -> None:
    assert expected_calibration_error([0, 1], [0.0, 1.0]) == 0.0
    assert expected_calibration_error([1, 0], [0.0, 1.0]) == 1.0
    assert expected_calibration_error([1, 0, 1, 0], [0.5] * 4) == 0.0
    assert expected_calibration_error([1, 1, 1, 0], [0.5] * 4) == 0.25


@pytest.mark.parametrize("p", [-0.01, 1.01])
def test_calibration_error_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        expected_calibration_error([0, 1], [0.5, p])


@pytest.mark.parametrize("name", ["ap", "auroc"])
def test_bootstrap_interval_holds_the_point_and_repeats_for_its_seed(name: str) -> None:
    rng = np.random.default_rng(3)
    y = (rng.random(300) < 0.4).astype(np.int64)
    s = rng.normal(size=300) + y
    metric = RANKED[name]
    interval = bootstrap_interval(metric, y, s, samples=200, seed=1)
    assert interval is not None
    low, high = interval
    point = metric(y, s)
    assert point is not None and low < point < high < low + 0.25
    assert bootstrap_interval(metric, y, s, samples=200, seed=1) == interval
    assert bootstrap_interval(metric, y, s, samples=200, seed=2) != interval
    narrower = bootstrap_interval(metric, y, s, samples=200, seed=1, confidence=0.5)
    assert narrower is not None and low < narrower[0] < narrower[1] < high


def test_bootstrap_resamples_within_each_class() -> None:
    """One fake among fifty reals: drawn over all images, a third of the samples would lack it."""
    y, s = np.array([1] + [0] * 50), np.linspace(1, 0, 51)
    seen = []

    def counting(labels: Array, scores: Array) -> float:
        seen.append((int(labels.sum()), len(labels)))
        return float(np.mean(scores[labels == 0]))

    interval = bootstrap_interval(counting, y, s, samples=50)
    assert set(seen) == {(1, 51)} and len(seen) == 51
    assert interval is not None and interval[0] < interval[1]


def test_bootstrap_interval_has_the_ends_of_the_textbook() -> None:
    """For an accuracy of p the standard error is √(p(1 − p)/n): the ends lie 1.96 of them from it."""
    n, p = 2500, 0.8
    s = (np.arange(n) < n * (1 - p)).astype(float)
    interval = bootstrap_interval(lambda y, s: accuracies(y, s)[0], np.zeros(n, np.int64), s, samples=2000)
    assert interval is not None
    error = math.sqrt(p * (1 - p) / n)
    assert (p - interval[0]) / error == pytest.approx(1.96, abs=0.12)
    assert (interval[1] - p) / error == pytest.approx(1.96, abs=0.12)
