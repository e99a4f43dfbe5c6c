"""Metrics of a detector, in NumPy. Labels: real = 0, fake = 1; scores: higher means fake.

Dimensions: n images. What is not defined (one class only, no image) is None, never 0 and never NaN. Scores that are
not finite are an error: a metric over them would be an invention.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BINS: Final = 15


def check(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], Array]:
    """Labels (n,) in {0, 1} and finite scores (n,), as arrays; `ValueError` otherwise."""
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"labels and scores must be (n,), got {y.shape} and {s.shape}")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("labels must be 0 (real) or 1 (fake)")
    if not np.isfinite(s).all():
        raise ValueError(f"{int((~np.isfinite(s)).sum())} of {len(s)} scores are not finite")
    return y.astype(np.int64), s


def accuracies(
    labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float = 0.5
) -> tuple[float | None, float | None, float | None]:
    """(acc, real_acc, fake_acc) with fake = score ≥ threshold."""
    y, s = check(labels, scores)
    correct = (s >= threshold) == (y == 1)

    def share(of: npt.NDArray[np.bool_]) -> float | None:
        return float(correct[of].mean()) if of.any() else None

    return share(np.ones(len(y), dtype=bool)), share(y == 0), share(y == 1)


def _cumulative(y: npt.NDArray[np.int64], s: Array) -> tuple[Array, Array]:
    """Fakes and reals at or above each distinct score, from the highest score down."""
    order = np.argsort(-s, kind="stable")
    y, s = y[order], s[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(s)), len(s) - 1)
    true_positives = np.cumsum(y)[last_of_tie].astype(np.float64)
    return true_positives, (last_of_tie + 1) - true_positives


def average_precision(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float | None:
    """AP = Σ (recall_k − recall_{k−1}) precision_k over distinct scores; None without both classes."""
    y, s = check(labels, scores)
    if not 0 < y.sum() < len(y):
        return None
    tp, fp = _cumulative(y, s)
    recall = tp / y.sum()
    return float(np.sum(np.diff(recall, prepend=0.0) * tp / (tp + fp)))


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float | None:
    """Area under the ROC curve, ties counted half; None without both classes."""
    y, s = check(labels, scores)
    if not 0 < y.sum() < len(y):
        return None
    tp, fp = _cumulative(y, s)
    tpr = np.concatenate([[0.0], tp / tp[-1]])
    fpr = np.concatenate([[0.0], fp / fp[-1]])
    return float(np.trapezoid(tpr, fpr))


def tpr_at_fpr(labels: npt.ArrayLike, scores: npt.ArrayLike, fpr: float) -> float | None:
    """Largest share of fakes found by a threshold that flags at most this share of reals; None without both classes."""
    y, s = check(labels, scores)
    if not 0 < y.sum() < len(y):
        return None
    tp, fp = _cumulative(y, s)
    allowed = fp <= fpr * (y == 0).sum() + 1e-9
    return float(tp[allowed].max(initial=0.0) / y.sum())


def expected_calibration_error(labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = BINS) -> float | None:
    """ECE: mean |share of fakes − mean probability| over equal-width bins of the probability, weighted by size."""
    y, p = check(labels, probabilities)
    if len(y) == 0:
        return None
    if p.min() < 0.0 or p.max() > 1.0:
        raise ValueError("probabilities must be in [0, 1]")
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    size = np.bincount(index, minlength=bins)
    gap = np.abs(np.bincount(index, weights=y, minlength=bins) - np.bincount(index, weights=p, minlength=bins))
    return float(gap[size > 0].sum() / len(y))


def bootstrap_interval(
    metric: Callable[[Array, Array], float | None],
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of metric(labels, scores), resampled within each class; None where undefined."""
    y, s = check(labels, scores)
    if metric(y.astype(np.float64), s) is None:
        return None
    rng = np.random.default_rng(seed)
    groups = [group for group in (np.flatnonzero(y == 0), np.flatnonzero(y == 1)) if len(group)]
    values = []
    for _ in range(samples):
        chosen = np.concatenate([rng.choice(group, len(group)) for group in groups])
        value = metric(y[chosen].astype(np.float64), s[chosen])
        if value is not None:
            values.append(value)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)
