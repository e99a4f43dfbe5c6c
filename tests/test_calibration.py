"""Temperature and threshold: recovered where they are known, best by brute force where they are not."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nsnet.calibration import Calibration, fit
from nsnet.errors import ConfigError

Labels = NDArray[np.int64]
Array = NDArray[np.float64]


def drawn(n: int, temperature: float, seed: int = 0, spread: float = 2.0) -> tuple[Labels, Array]:
    """Labels drawn from P(fake) = σ(z), and logits that are z times the temperature: so overconfident by it."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, spread, n)
    return (rng.random(n) < 1 / (1 + np.exp(-z))).astype(np.int64), z * temperature


def sets(count: int = 40) -> list[tuple[Labels, Array]]:
    rng = np.random.default_rng(1)
    found = []
    for i in range(count):
        n = int(rng.integers(2, 60))
        y = (rng.random(n) < rng.uniform(0.2, 0.8)).astype(np.int64)
        y[:2] = 0, 1
        s = rng.normal(0, 3, n) + rng.uniform(-1, 3) * y + rng.uniform(-2, 2)
        found.append((y, np.round(s) if i % 2 else s))
    return found


SETS = sets()


def correct_at(y: Labels, p: Array, threshold: float) -> int:
    return sum((probability >= threshold) == (label == 1) for label, probability in zip(y, p, strict=True))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0, 20.0])
def test_fit_recovers_a_known_temperature(temperature: float) -> None:
    y, logits = drawn(20_000, temperature)
    calibration = fit(y, logits)
    assert calibration.temperature == pytest.approx(temperature, rel=0.05)
    assert calibration.fitted_on == 20_000


@pytest.mark.parametrize("case", range(0, len(SETS), 3))
def test_temperature_is_the_best_of_a_fine_grid(case: int) -> None:
    """Cross-entropy with Platt's targets, written out."""
    y, logits = SETS[case]
    fakes, reals = int(y.sum()), int((1 - y).sum())

    def cross_entropy(temperature: float) -> float:
        terms = []
        for label, logit in zip(y, logits, strict=True):
            target = (fakes + 1) / (fakes + 2) if label else 1 / (reals + 2)
            fake, real = (1 / (1 + math.exp(sign * logit / temperature)) for sign in (-1, 1))
            terms.append(-target * math.log(fake) - (1 - target) * math.log(real))
        return math.fsum(terms) / len(terms)

    grid = min(cross_entropy(math.exp(t)) for t in np.linspace(-2, 4, 200))
    assert cross_entropy(fit(y, logits).temperature) <= grid + 1e-6


@pytest.mark.parametrize("case", range(len(SETS)))
def test_threshold_has_the_most_correct_verdicts(case: int) -> None:
    y, logits = SETS[case]
    calibration = fit(y, logits)
    p = calibration.probability(logits)
    candidates = [1e-6, *p, *np.nextafter(p, 1), 1 - 1e-6]
    assert correct_at(y, p, calibration.threshold) == max(correct_at(y, p, t) for t in candidates)


@pytest.mark.parametrize("case", range(len(SETS)))
def test_threshold_is_the_middle_of_the_widest_of_the_best_gaps(case: int) -> None:
    y, logits = SETS[case]
    calibration = fit(y, logits)
    p = calibration.probability(logits)
    marks = [0.0, *sorted(set(p.tolist())), 1.0]
    gaps = [(low, high) for low, high in zip(marks, marks[1:], strict=False) if high > low]
    best = max(correct_at(y, p, (low + high) / 2) for low, high in gaps)
    widest = max(high - low for low, high in gaps if correct_at(y, p, (low + high) / 2) == best)
    around = [(low, high) for low, high in gaps if low < calibration.threshold < high]
    assert len(around) == 1
    (low, high), = around  # fmt: skip
    assert high - low == pytest.approx(widest, abs=1e-12)
    assert calibration.threshold == pytest.approx((low + high) / 2, abs=1e-12)


@pytest.mark.parametrize("labels", [[], [0], [1, 1, 1], [0, 0]])
def test_without_both_classes_the_default_comes_back(labels: list[int]) -> None:
    assert fit(labels, np.arange(len(labels), dtype=float)) == Calibration()
    assert Calibration().fitted_on == 0 and Calibration().threshold == 0.5 and Calibration().temperature == 1.0


@pytest.mark.parametrize("size", [10.0, 100.0, 1e4])
@pytest.mark.parametrize("n", [2, 20, 200])
def test_separated_and_saturated_logits_give_a_threshold_between_them(n: int, size: float) -> None:
    y = np.arange(n) % 2
    calibration = fit(y, np.where(y == 1, size, -size))
    assert math.isfinite(calibration.temperature)
    assert calibration.threshold == pytest.approx(0.5, abs=0.05)
    verdicts = [calibration.verdict(float(p)) for p in calibration.probability([-size, size])]
    assert verdicts == ["real", "fake"]


def test_separated_set_does_not_make_the_detector_certain() -> None:
    y = np.arange(100) % 2
    calibration = fit(y, np.where(y == 1, 4.0, -4.0))
    assert calibration.probability(4.0) == pytest.approx(51 / 52, abs=1e-3)


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_logits_far_to_one_side_are_still_told_apart(shift: float) -> None:
    y = np.arange(40) % 2
    logits = shift + np.where(y == 1, 1.0, -1.0)
    calibration = fit(y, logits)
    assert correct_at(y, calibration.probability(logits), calibration.threshold) == 40


@pytest.mark.parametrize(("logit", "common"), [(-1e6, 1), (1e6, 0)])
def test_logits_that_are_all_saturated_to_the_wrong_side_give_a_valid_calibration(logit: float, common: int) -> None:
    y = np.full(20, common)
    y[0] = 1 - common
    calibration = fit(y, np.full(20, logit))
    assert 0 < calibration.threshold < 1 and calibration.fitted_on == 20


def test_useless_logits_give_a_valid_calibration() -> None:
    calibration = fit([0, 1] * 10, np.zeros(20))
    assert 0 < calibration.threshold < 1 and calibration.temperature > 0
    assert calibration.probability(0.0) == 0.5


def test_fit_refuses_logits_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        fit([0, 1], [0.0, math.nan])


def test_fit_does_not_depend_on_the_order() -> None:
    y, logits = drawn(300, 2.0)
    order = np.random.default_rng(0).permutation(300)
    one, other = fit(y, logits), fit(y[order], logits[order])
    assert one.temperature == pytest.approx(other.temperature, rel=1e-5)
    assert one.threshold == pytest.approx(other.threshold, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 8.0])
def test_probability_is_the_sigmoid_of_the_divided_logit(temperature: float) -> None:
    logits = np.array([[-3.0, -0.1, 0.0], [0.1, 2.0, 30.0]])
    calibration = Calibration(temperature=temperature)
    expected = [[1 / (1 + math.exp(-logit / temperature)) for logit in row] for row in logits]
    np.testing.assert_allclose(calibration.probability(logits), expected, rtol=1e-14)
    assert calibration.probability(np.float32(0.5)).dtype == np.float64


@pytest.mark.parametrize(("logit", "expected"), [(1e300, 1.0), (-1e300, 0.0), (800.0, 1.0), (-800.0, 0.0)])
def test_probability_of_a_saturated_logit_neither_warns_nor_is_nan(logit: float, expected: float) -> None:
    assert Calibration(temperature=0.5).probability(logit) == expected


@pytest.mark.parametrize(
    ("prob_fake", "margin", "expected"),
    [
        (0.39, 0.0, "real"), (0.4, 0.0, "fake"), (0.41, 0.0, "fake"), (0.0, 0.0, "real"), (1.0, 0.0, "fake"),
        (0.31, 0.1, "uncertain"), (0.4, 0.1, "uncertain"), (0.49, 0.1, "uncertain"),
        (0.29, 0.1, "real"), (0.51, 0.1, "fake"),
    ],
)  # fmt: skip
def test_verdict_is_uncertain_within_the_margin_only(prob_fake: float, margin: float, expected: str) -> None:
    assert Calibration(threshold=0.4, uncertain_margin=margin).verdict(prob_fake) == expected


def test_margin_itself_is_outside() -> None:
    calibration = Calibration(threshold=0.5, uncertain_margin=0.25)
    assert [calibration.verdict(p) for p in (0.25, 0.75)] == ["real", "fake"]


@pytest.mark.parametrize("temperature", [0.5, 2.0, 10.0])
def test_temperature_never_changes_the_order(temperature: float) -> None:
    logits = np.sort(np.random.default_rng(0).normal(0, 3, 100))
    assert (np.diff(Calibration(temperature=temperature).probability(logits)) > 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": math.nan}, {"threshold": 0.0}, {"threshold": 1.0},
        {"threshold": math.nan}, {"uncertain_margin": -0.1}, {"uncertain_margin": 1.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(settings.values())))):
        replace(Calibration(), **settings)
