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
from sklearn.calibration import calibration_curve

from nsnet import metrics
from nsnet.metrics import (
    METRICS,
    auroc,
    average_precision,
    bootstrap,
    check,
    expected_calibration_error,
    intervals,
    mean_defined,
    precision_at_base_rate,
    reliability,
    resamples,
    roc_curve,
    summary,
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
    numbers = summary(y, s, called)
    assert numbers["acc"] == pytest.approx(sklearn_metrics.accuracy_score(y, called), abs=1e-12)
    assert numbers["real_acc"] == pytest.approx(sklearn_metrics.recall_score(y, called, pos_label=0), abs=1e-12)
    assert numbers["fake_acc"] == pytest.approx(sklearn_metrics.recall_score(y, called, pos_label=1), abs=1e-12)


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
    for labels, said_fake, expected in (
        ([], [], (None, None, None)), ([0, 0], [False, True], (0.5, 0.5, None)), ([1], [True], (1.0, None, 1.0)),
    ):  # fmt: skip
        numbers = summary(labels, [0.5] * len(labels), said_fake)
        assert (numbers["acc"], numbers["real_acc"], numbers["fake_acc"]) == expected
    assert expected_calibration_error([], []) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*RANKED, "roc", "reliability", "ece", "summary", "bootstrap", "seeds"])
def test_scores_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    given: dict[str, Callable[[Labels, Array], object]] = {
        **RANKED,
        "roc": roc_curve,
        "reliability": reliability,
        "ece": expected_calibration_error,
        "summary": lambda y, s: summary(y, s, y == 1),
        "bootstrap": lambda y, s: bootstrap(y, s, y == 1),
        "seeds": lambda y, s: bootstrap(y, np.stack([np.full(3, 0.5), s]), np.ones((2, 3), bool)),
    }
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        given[name](np.array([0, 1, 1]), np.array([0.1, bad, 0.3]))


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


# --- the ROC curve and the precision of alarms ------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(len(CASES)))
def test_roc_curve_equals_scikit_learn(case: int) -> None:
    y, s = CASES[case]
    curve = roc_curve(y, s)
    assert curve is not None
    expected_fpr, expected_tpr, _ = sklearn_metrics.roc_curve(y, s, drop_intermediate=False)
    np.testing.assert_allclose(curve[0], expected_fpr, atol=1e-12)
    np.testing.assert_allclose(curve[1], expected_tpr, atol=1e-12)
    assert len(curve[0]) == len(set(s.tolist())) + 1
    assert (curve[0][0], curve[1][0], curve[0][-1], curve[1][-1]) == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("labels", [[], [0], [1, 1]])
def test_roc_curve_without_both_classes_is_undefined(labels: list[int]) -> None:
    assert roc_curve(np.array(labels, np.int64), np.zeros(len(labels))) is None


@pytest.mark.parametrize("base_rate", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("case", range(0, len(CASES), 5))
def test_precision_equals_scikit_learn_with_images_weighted_to_the_base_rate(case: int, base_rate: float) -> None:
    y, s = CASES[case]
    said = s >= 0.5
    weights = np.where(y == 1, base_rate / np.mean(y == 1), (1 - base_rate) / np.mean(y == 0))
    found = precision_at_base_rate(y, said, base_rate)
    if said.any():
        expected = sklearn_metrics.precision_score(y, said.astype(int), sample_weight=weights)
        assert found == pytest.approx(expected, abs=1e-12)
    else:
        assert found is None


def test_precision_where_1_percent_is_fake_and_14_percent_of_reals_are_flagged() -> None:
    """The numbers of the README: all fakes found, and right in 7 of 100 alarms."""
    y, said = np.repeat([0, 1], 100), np.repeat([True, False, True], [14, 86, 100])
    assert precision_at_base_rate(y, said, 0.01) == pytest.approx(0.0673, abs=1e-4)
    assert precision_at_base_rate(y, said, 0.5) == pytest.approx(100 / 114)


@pytest.mark.parametrize(
    ("labels", "said"), [([], []), ([0, 0], [True, False]), ([1], [True]), ([0, 1, 1], [False, False, False])]
)
def test_precision_without_both_classes_or_without_alarms_is_undefined(labels: list[int], said: list[bool]) -> None:
    assert precision_at_base_rate(np.array(labels, np.int64), np.array(said, bool), 0.1) is None


def test_precision_of_wrong_alarms_only_is_0() -> None:
    assert precision_at_base_rate([0, 1], [True, False], 0.1) == 0.0


@pytest.mark.parametrize("base_rate", [0.0, 1.0, -0.1, math.nan])
def test_base_rate_that_leaves_one_class_is_refused(base_rate: float) -> None:
    with pytest.raises(ValueError, match="base_rate must be between 0 and 1"):
        precision_at_base_rate([0, 1], [True, False], base_rate)


# --- probabilities against what happened ------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("seed", range(10))
def test_reliability_equals_scikit_learn(seed: int, bins: int) -> None:
    """Tied scores as well, none of them on the edge of a bin, where scikit-learn takes the lower one."""
    rng = np.random.default_rng(seed)
    p = rng.random(200)
    p = np.floor(p * 7) / 7 + 0.02 if seed % 2 else p
    y = (rng.random(200) < p).astype(np.int64)
    mean, share, count = reliability(y, p, bins)
    expected_share, expected_mean = calibration_curve(y, p, n_bins=bins)
    np.testing.assert_allclose(mean, expected_mean, atol=1e-12)
    np.testing.assert_allclose(share, expected_share, atol=1e-12)
    assert count.sum() == 200 and count.dtype == np.int64 and (count > 0).all()
    error = expected_calibration_error(y, p, bins)
    assert error == pytest.approx(np.sum(count * np.abs(share - mean)) / 200, abs=1e-12)


def test_reliability_of_known_cases() -> None:
    mean, share, count = reliability([0, 1, 1, 1], [0.1, 0.3, 0.5, 1.0], bins=2)
    np.testing.assert_allclose(mean, [0.2, 0.75])
    assert (share.tolist(), count.tolist()) == ([0.5, 1.0], [2, 2])
    assert [len(values) for values in reliability([], [])] == [0, 0, 0]


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
def test_what_is_no_probability_is_refused(p: float) -> None:
    for refusing in (expected_calibration_error, reliability, lambda y, p: summary(y, p, [True, False])):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            refusing([0, 1], [0.5, p])


# --- all metrics of a group -------------------------------------------------------------------------------------------


def one_by_one(y: Labels, p: Array, said: Labels) -> dict[str, float | None]:
    """Every metric by scikit-learn, where it has it and both classes are there."""
    called, rates = said.astype(int), {"precision_at_10": 0.1, "precision_at_1": 0.01, "precision_at_01": 0.001}
    weights = {name: np.where(y == 1, rate / np.mean(y), (1 - rate) / np.mean(1 - y)) for name, rate in rates.items()}
    return {
        "acc": sklearn_metrics.accuracy_score(y, called),
        "real_acc": sklearn_metrics.recall_score(y, called, pos_label=0),
        "fake_acc": sklearn_metrics.recall_score(y, called),
        "ap": sklearn_metrics.average_precision_score(y, p),
        "auroc": sklearn_metrics.roc_auc_score(y, p),
        "tpr_at_fpr_1": naive_tpr(y, p, 0.01),
        "tpr_at_fpr_01": naive_tpr(y, p, 0.001),
        "ece": expected_calibration_error(y, p),
        **{
            name: sklearn_metrics.precision_score(y, called, sample_weight=weights[name]) if said.any() else None
            for name in rates
        },
    }


def verdicts(y: Labels, p: Array) -> Labels:
    """Verdicts that no single threshold gives, as those with an uncertain band are."""
    return np.asarray((p >= 0.4) & (p != p.max()) | (p < 0.05))


@pytest.mark.parametrize("case", range(0, len(CASES), 2))
def test_summary_equals_every_metric_by_itself(case: int) -> None:
    y, p = CASES[case]
    said = verdicts(y, p)
    found = summary(y, p, said)
    assert tuple(found) == METRICS
    assert found == pytest.approx(one_by_one(y, p, said), abs=1e-12)


def test_summary_tells_the_limits_of_1_and_of_0_1_percent_apart() -> None:
    """2000 reals: 20 and 2 of them may be flagged."""
    rng = np.random.default_rng(8)
    y, p = np.repeat([0, 1], [2000, 500]), rng.random(2500)
    p[2000:] = p[2000:] ** 0.1
    found, ranked = summary(y, p, p > 0.5), np.sort(p[:2000])[::-1]
    assert found["tpr_at_fpr_1"] == np.mean(p[2000:] > ranked[20])
    assert found["tpr_at_fpr_01"] == np.mean(p[2000:] > ranked[2])
    assert np.mean(p[2000:] > ranked[0]) < found["tpr_at_fpr_01"] < np.mean(p[2000:] > ranked[6])


def test_summary_without_images_and_of_one_class_says_what_is_undefined() -> None:
    assert summary([], [], []) == dict.fromkeys(METRICS, None)
    undefined = dict.fromkeys(METRICS, None)
    assert summary([0, 0], [0.0, 1.0], [False, True]) == {**undefined, "acc": 0.5, "real_acc": 0.5, "ece": 0.5}
    assert summary([1], [0.75], [True]) == {**undefined, "acc": 1.0, "fake_acc": 1.0, "ece": 0.25}


def test_summary_of_several_predictions_is_the_mean_of_theirs() -> None:
    rng = np.random.default_rng(5)
    y = np.arange(60) % 2
    p = rng.random((3, 60))
    said = p > 0.6
    said[1] = False
    each = [summary(y, row, called) for row, called in zip(p, said, strict=True)]
    found = summary(y, p, said)
    for name in METRICS:
        defined = [one[name] for one in each if one[name] is not None]
        assert len(defined) == (2 if name.startswith("precision") else 3)
        assert found[name] == pytest.approx(np.mean(defined), abs=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("p", "said"), [([0.1, 0.2], [True]), ([[0.1, 0.2]] * 2, [True, False]), (np.zeros((0, 2)), np.zeros((0, 2)))]
)
def test_predictions_that_do_not_fit_each_other_are_refused(p: Any, said: Any) -> None:
    with pytest.raises(ValueError, match=r"must both be \(n,\) or \(S, n\)"):
        summary([0, 1], p, said)


def test_verdicts_that_are_neither_true_nor_false_are_refused() -> None:
    for refusing in (
        lambda said: summary([0, 1], [0.1, 0.2], said),
        lambda said: precision_at_base_rate([0, 1], said, 0.1),
    ):
        with pytest.raises(ValueError, match="said_fake must be true or false"):
            refusing([0.2, 0.7])


# --- the bootstrap ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(0, len(CASES), 5))
def test_bootstrap_equals_the_summary_of_repeated_rows(case: int) -> None:
    """The dumbest way: write each drawn image as often as it was drawn, and call the metrics."""
    y, p = CASES[case]
    said = verdicts(y, p)
    values = bootstrap(y, p, said, samples=5, seed=case)
    assert tuple(values) == METRICS
    drawn = np.concatenate(list(resamples(y, samples=5, seed=case))).astype(int)
    for i, weights in enumerate(drawn):
        rows = np.repeat(np.arange(len(y)), weights)
        expected = one_by_one(y[rows], p[rows], said[rows])
        found = {name: None if np.isnan(values[name][i]) else values[name][i] for name in METRICS}
        assert found == pytest.approx(expected, abs=1e-12)


def test_resamples_draw_each_class_evenly_and_by_itself() -> None:
    """Each of m images is drawn Binomial(m, 1/m) times: mean 1, variance 1 - 1/m, covariance of two -1/m."""
    y = np.array([0, 1, 0, 0, 1, 0, 0])
    weights = np.concatenate(list(resamples(y, samples=20_000, seed=0)))
    assert weights.shape == (20_000, 7) and (weights == np.round(weights)).all() and weights.min() == 0
    expected = np.zeros((7, 7))
    for label, m in ((0, 5), (1, 2)):
        members = np.flatnonzero(y == label)
        assert (weights[:, members].sum(axis=1) == m).all()
        expected[np.ix_(members, members)] = np.eye(m) - 1 / m
    np.testing.assert_allclose(weights.mean(axis=0), 1.0, atol=0.03)
    np.testing.assert_allclose(np.cov(weights.T), expected, atol=0.03)


def test_chunks_bound_the_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    y, p = CASES[-1]
    whole = bootstrap(y, p, p > 0.5, samples=50, seed=3)
    for chunk, rows in ((1, 1), (len(y) * 7, 7), (len(y) * 64, 50)):
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        shapes = [weights.shape for weights in resamples(y, samples=50, seed=3)]
        assert max(shapes) == (rows, len(y)) and sum(k for k, _ in shapes) == 50
        for name, values in bootstrap(y, p, p > 0.5, samples=50, seed=3).items():
            np.testing.assert_allclose(values, whole[name], rtol=1e-12)


def test_bootstrap_repeats_for_its_seed_only() -> None:
    y, p = CASES[-1]
    one, same, other = (bootstrap(y, p, p > 0.5, samples=20, seed=seed)["ap"] for seed in (1, 1, (1, 2)))
    assert (one == same).all() and (one != other).all()


def test_interval_holds_the_point_and_narrows_with_confidence_and_images() -> None:
    rng = np.random.default_rng(3)
    y = (rng.random(2000) < 0.4).astype(np.int64)
    p = 1 / (1 + np.exp(-rng.normal(size=2000) - 2 * y + 1))
    values, fewer = (bootstrap(y[:n], p[:n], p[:n] > 0.5, samples=300) for n in (2000, 200))
    found, inner, wide = intervals(values), intervals(values, 0.5), intervals(fewer)
    for name, point in summary(y, p, p > 0.5).items():
        (low, high), (inner_low, inner_high), (wide_low, wide_high) = found[name], inner[name], wide[name]  # type: ignore[misc]
        assert 0 < high - low < wide_high - wide_low and inner_high - inner_low < high - low
        if name != "ece":  # of a sample it is larger
            assert point is not None and low <= inner_low <= point <= inner_high <= high


def test_interval_has_the_ends_of_the_textbook() -> None:
    """For an accuracy of p the standard error is √(p(1 − p)/n): the ends lie 1.96 of them from it."""
    n, share = 2500, 0.8
    said = np.arange(n) >= n * share
    found = intervals(bootstrap(np.zeros(n, np.int64), np.full(n, 0.5), said, samples=2000))
    error = math.sqrt(share * (1 - share) / n)
    for name in ("acc", "real_acc"):
        interval = found[name]
        assert interval is not None
        assert (share - interval[0]) / error == pytest.approx(1.96, abs=0.12)
        assert (interval[1] - share) / error == pytest.approx(1.96, abs=0.12)
    assert found["fake_acc"] is found["ap"] is found["precision_at_1"] is None


def test_interval_of_quantiles_of_known_values() -> None:
    values = {"a": np.arange(101.0), "b": np.array([np.nan, 3.0]), "c": np.array([np.nan]), "d": np.empty(0)}
    found = intervals(values, 0.9)
    assert found.pop("a") == pytest.approx((5.0, 95.0))
    assert found == {"b": (3.0, 3.0), "c": None, "d": None}


def test_one_fake_among_fifty_is_in_every_sample() -> None:
    """Drawn over all images, a third of the samples would lack it."""
    y, p = np.array([1] + [0] * 50), np.linspace(1, 0, 51)
    values = bootstrap(y, p, p > 0.9, samples=100)
    assert (values["auroc"] == 1.0).all() and (values["fake_acc"] == 1.0).all()
    assert len(set(values["real_acc"].tolist())) > 3


def test_samples_without_an_alarm_are_left_out() -> None:
    """One of three reals raises the only alarm: (2/3)³ of the samples lack it, and have no precision."""
    y, said = np.array([0, 0, 0, 1]), np.array([True, False, False, False])
    values = bootstrap(y, np.full(4, 0.5), said, samples=2000)
    for name in ("precision_at_10", "precision_at_1", "precision_at_01"):
        assert np.isnan(values[name]).mean() == pytest.approx(8 / 27, abs=0.04)
        assert intervals(values)[name] == (0.0, 0.0)
    assert not np.isnan(values["acc"]).any()


def test_samples_of_several_predictions_draw_the_same_images() -> None:
    rng = np.random.default_rng(7)
    y = np.arange(80) % 2
    p = np.clip(y * 0.4 + 0.6 * rng.random((3, 80)), 0, 1)
    joint = bootstrap(y, p, p > 0.5, samples=40, seed=9)
    each = [bootstrap(y, row, row > 0.5, samples=40, seed=9) for row in p]
    for name in METRICS:
        np.testing.assert_allclose(joint[name], np.mean([one[name] for one in each], axis=0), rtol=1e-12)
    one, copies = bootstrap(y, p[0], p[0] > 0.5), bootstrap(y, p[[0, 0, 0]], p[[0, 0, 0]] > 0.5)
    np.testing.assert_allclose(copies["ap"], one["ap"], rtol=1e-12)


def test_mean_of_groups_leaves_out_what_is_undefined_sample_by_sample() -> None:
    rng = np.random.default_rng(11)
    groups = []
    for number, (n, fakes) in enumerate([(40, 20), (90, 3), (30, 0)]):
        y, p = (np.arange(n) < fakes).astype(np.int64), rng.random(n)
        groups.append(bootstrap(y, p, p > 0.97, samples=60, seed=(0, number)))
    found = {name: mean_defined([group[name] for group in groups]) for name in METRICS}
    for name in METRICS:
        for i in range(60):
            defined = [group[name][i] for group in groups if not math.isnan(group[name][i])]
            expected = math.fsum(defined) / len(defined) if defined else math.nan
            assert found[name][i] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(groups[2]["ap"]).all() and not np.isnan(found["ap"]).any()
    assert np.isnan(found["precision_at_1"]).any() and not np.isnan(found["precision_at_1"]).all()
    assert np.isnan(mean_defined([]))
