"""Computes metrics of a detector and their bootstrap intervals. Labels: real = 0, fake = 1; scores: higher means fake.

Dimensions: n images, S predictions of the same images (by detectors of several seeds), K bootstrap samples, d distinct
scores. An undefined metric (one class only, no image, no alarm) is None, never 0; in arrays of bootstrap values it is
NaN and is ignored. Scores that are not finite raise an error, because a metric over them has no meaning.

Each formula is written once, for weighted images: weights of 1 give the metric, and counts of how often each image was
drawn give the metric of a bootstrap sample. The scores are therefore sorted once for many samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]
Marks = npt.NDArray[np.bool_]

BINS: Final = 15

FPR_LIMITS: Final = {"tpr_at_fpr_1": 0.01, "tpr_at_fpr_01": 0.001}
"""Metric -> largest share of reals that may be flagged as fake."""

BASE_RATES: Final = {"precision_at_10": 0.1, "precision_at_1": 0.01, "precision_at_01": 0.001}
"""Metric -> assumed share of fakes in use."""

METRICS: Final = ("acc", "real_acc", "fake_acc", "ap", "auroc", *FPR_LIMITS, "ece", *BASE_RATES)
"""Metrics of `summary` and `bootstrap`, in this order."""

CHUNK: Final = 2**18
"""Number of weights in memory at a time: 2 MiB fit into the cache (8 MiB take twice as long). Results do not change."""


def check(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Labels, Array]:
    """Return labels (n,) in {0, 1} and finite scores (n,) as arrays; raises `ValueError` otherwise."""
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"labels and scores must be (n,), got {y.shape} and {s.shape}")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("labels must be 0 (real) or 1 (fake)")
    if not np.isfinite(s).all():
        raise ValueError(f"{int((~np.isfinite(s)).sum())} of {len(s)} scores are not finite")
    return y.astype(np.int64), s


def average_precision(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float | None:
    """AP = Σ (recall_k − recall_{k−1}) precision_k over distinct scores; None without both classes."""
    y, s = check(labels, scores)
    return float(_average_precision(*_cumulative(y, s, np.ones(len(y))))) if _both(y) else None


def roc_curve(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Array, Array] | None:
    """(fpr, tpr), each (d + 1,), from (0, 0) to (1, 1), one point per distinct score; None without both classes."""
    y, s = check(labels, scores)
    return _roc(*_cumulative(y, s, np.ones(len(y)))) if _both(y) else None


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float | None:
    """Area under the ROC curve, ties counted half; None without both classes."""
    curve = roc_curve(labels, scores)
    return float(_area(*curve)) if curve is not None else None


def tpr_at_fpr(labels: npt.ArrayLike, scores: npt.ArrayLike, fpr: float) -> float | None:
    """Largest share of fakes found by a threshold that flags at most this share of reals; None without both classes.

    The threshold is chosen on the same reals, so the TPR at this rate on other reals is lower; the difference is small
    with many times 1 / fpr reals. With fewer than 1 / fpr (1000 for 0.1 %) it is the TPR without any false alarm, which
    depends on the single highest-scoring real: for normal scores two deviations apart, 100 reals give 0.33 on average
    where the true value is 0.14.
    """
    y, s = check(labels, scores)
    return float(_tpr_at(*_cumulative(y, s, np.ones(len(y))), fpr)) if _both(y) else None


def precision_at_base_rate(labels: npt.ArrayLike, said_fake: npt.ArrayLike, base_rate: float) -> float | None:
    """Share of correct alarms if the share b of all images is fake: b·TPR / (b·TPR + (1 − b)·FPR).

    `said_fake` (n,), true where the verdict is fake. None without both classes, and without any alarm. If none of R
    reals raised an alarm, the result is 1 for every b: R reals cannot measure an FPR far below 1 / R.
    """
    y, said = _check_said(labels, said_fake)
    if not 0.0 < base_rate < 1.0:
        raise ValueError(f"base_rate must be between 0 and 1, got {base_rate}")
    _, _, tpr, fpr = _rates(y, said, np.ones(len(y)))
    return _number(precision_at(tpr, fpr, base_rate))


def reliability(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = BINS
) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """(mean probability, share of fakes, images) of each non-empty equal-width bin of the probability."""
    y, p = _check_probabilities(labels, probabilities)
    size, total, fakes = (_per_bin(p, values, np.ones(len(y)), bins) for values in (np.ones(len(y)), p, y))
    filled = size > 0
    return total[filled] / size[filled], fakes[filled] / size[filled], size[filled].astype(np.int64)


def expected_calibration_error(labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = BINS) -> float | None:
    """ECE: mean |share of fakes − mean probability| over equal-width bins of the probability, weighted by size."""
    y, p = _check_probabilities(labels, probabilities)
    return _number(_calibration_error(y, p, np.ones(len(y)), bins))


def summary(labels: npt.ArrayLike, probabilities: npt.ArrayLike, said_fake: npt.ArrayLike) -> dict[str, float | None]:
    """Compute all `METRICS`; None where undefined.

    Labels (n,); probabilities and said_fake (n,), or (S, n) for the mean over S predictions of the same images.
    Predictions for which a metric is undefined are left out of its mean. Accuracies and precisions use `said_fake`,
    that is the detector's own threshold; the other metrics use the probabilities.
    """
    y, p, said = _check_predictions(labels, probabilities, said_fake)
    return {name: _number(value) for name, value in _mean_values(y, p, said, np.ones(len(y))).items()}


def bootstrap(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    said_fake: npt.ArrayLike,
    *,
    samples: int = 1000,
    seed: int | Sequence[int] = 0,
) -> dict[str, Array]:
    """`summary` of K = `samples` bootstrap samples: metric -> (K,) values, NaN where it is undefined for a sample.

    Arguments as for `summary`. Each sample draws reals from the reals and fakes from the fakes, the same images for all
    S predictions. Equal labels, seed and samples draw the same images: values of two detectors can be subtracted.
    """
    y, p, said = _check_predictions(labels, probabilities, said_fake)
    parts = [_mean_values(y, p, said, weights) for weights in resamples(y, samples=samples, seed=seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def intervals(values: Mapping[str, Array], confidence: float = 0.95) -> dict[str, tuple[float, float] | None]:
    """Percentile interval (low, high) of each metric of `bootstrap`; None where undefined.

    Zero width means that all samples agree (for example, no real was flagged), not that the metric is known exactly.
    The ECE of a sample tends to be larger than that of all images, because drawing adds noise to each bin: with few
    images its interval is too high.
    """
    tails = [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0]
    bounds: dict[str, tuple[float, float] | None] = {}
    for name, value in values.items():
        defined = value[~np.isnan(value)]
        low, high = np.quantile(defined, tails) if len(defined) else (np.nan, np.nan)
        bounds[name] = (float(low), float(high)) if len(defined) else None
    return bounds


def resamples(labels: npt.ArrayLike, *, samples: int, seed: int | Sequence[int] = 0) -> Iterator[Array]:
    """Yield weights (k, n) of bootstrap samples, `samples` rows in total: how often each image was drawn."""
    y = np.asarray(labels)
    members = [np.flatnonzero(y == label) for label in (0, 1)]
    streams = np.random.default_rng(seed).spawn(2)  # a stream per class: draws do not depend on the chunk size
    size = max(1, CHUNK // max(1, len(y)))
    for start in range(0, samples, size):
        k = min(size, samples - start)
        weights = np.zeros((k, len(y)))
        for member, stream in zip(members, streams, strict=True):
            if m := len(member):
                drawn = stream.integers(m, size=(k, m)) + m * np.arange(k)[:, None]
                weights[:, member] = np.bincount(drawn.ravel(), minlength=k * m).reshape(k, m)
        yield weights


# --- formulas over weights (..., n); results (...,), NaN where undefined ----------------------------------------------


def _mean_values(y: Labels, p: Array, said: Marks, weights: Array) -> dict[str, Array]:
    """Compute every metric as the mean over the S predictions for which it is defined."""
    rows = [_values(y, p_row, said_row, weights) for p_row, said_row in zip(p, said, strict=True)]
    return {name: mean_defined([row[name] for row in rows]) for name in METRICS}


def _values(y: Labels, p: Array, said: Marks, weights: Array) -> dict[str, Array]:
    acc, real_acc, fake_acc, fpr = _rates(y, said, weights)
    values = dict.fromkeys(METRICS, np.full(weights.shape[:-1], np.nan))
    values |= {"acc": acc, "real_acc": real_acc, "fake_acc": fake_acc, "ece": _calibration_error(y, p, weights, BINS)}
    values |= {name: precision_at(fake_acc, fpr, base_rate) for name, base_rate in BASE_RATES.items()}
    if _both(y):
        tp, fp = _cumulative(y, p, weights)
        values |= {"ap": _average_precision(tp, fp), "auroc": _area(*_roc(tp, fp))}
        values |= {name: _tpr_at(tp, fp, limit) for name, limit in FPR_LIMITS.items()}
    return values


def _rates(y: Labels, said: Marks, weights: Array) -> tuple[Array, Array, Array, Array]:
    """(acc, real_acc, fake_acc, fpr); fake_acc is the TPR."""
    reals, fakes = weights @ (y == 0), weights @ (y == 1)
    false_alarms, hits = weights @ ((y == 0) & said), weights @ ((y == 1) & said)
    passed = reals - false_alarms
    return (
        ratio(passed + hits, reals + fakes),
        ratio(passed, reals),
        ratio(hits, fakes),
        ratio(false_alarms, reals),
    )


def precision_at(tpr: Array | float, fpr: Array | float, base_rate: Array | float) -> Array:
    """Precision b·TPR / (b·TPR + (1 − b)·FPR) where a share b of the images is fake; NaN without an alarm."""
    alarms = base_rate * tpr + (1.0 - base_rate) * fpr
    return ratio(base_rate * tpr, alarms)


def _cumulative(y: Labels, s: Array, weights: Array) -> tuple[Array, Array]:
    """Count fakes and reals at or above each distinct score, (..., d) each, from the highest score down; n ≥ 1."""
    order = np.argsort(-s, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(s[order])), len(s) - 1)
    ranked = weights[..., order]
    above = np.cumsum(ranked, axis=-1)[..., last_of_tie]
    true_positives = np.cumsum(ranked * y[order], axis=-1)[..., last_of_tie]
    return true_positives, above - true_positives


def _average_precision(tp: Array, fp: Array) -> Array:
    recall = tp / tp[..., -1:]
    precision = tp / np.maximum(tp + fp, 1.0)  # weights are whole numbers: this changes only 0/0, if no image was drawn
    return np.asarray(np.sum(np.diff(recall, prepend=0.0) * precision, axis=-1))


def _roc(tp: Array, fp: Array) -> tuple[Array, Array]:
    zero = np.zeros((*tp.shape[:-1], 1))
    return np.concatenate([zero, fp / fp[..., -1:]], axis=-1), np.concatenate([zero, tp / tp[..., -1:]], axis=-1)


def _area(fpr: Array, tpr: Array) -> Array:
    return np.asarray(np.trapezoid(tpr, fpr, axis=-1))


def _tpr_at(tp: Array, fp: Array, limit: float) -> Array:
    allowed = fp <= limit * fp[..., -1:] + 1e-9
    return np.asarray(np.where(allowed, tp, 0.0).max(axis=-1) / tp[..., -1])


def _calibration_error(y: Labels, p: Array, weights: Array, bins: int) -> Array:
    return ratio(np.abs(_per_bin(p, y - p, weights, bins)).sum(axis=-1), weights.sum(axis=-1))


def _per_bin(p: Array, values: Labels | Array, weights: Array, bins: int) -> Array:
    """Sum values (n,) over the images of each bin of the probability -> (..., bins)."""
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    inside = [np.flatnonzero(index == k) for k in range(bins)]
    return np.stack([np.asarray(weights[..., members] @ values[members]) for members in inside], axis=-1)


def ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> Array:
    """Divide part by whole; NaN where whole is 0 or NaN."""
    numerator, denominator = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    undefined = np.full(numerator.shape, np.nan)
    return np.asarray(np.divide(numerator, denominator, out=undefined, where=denominator > 0))


def mean_defined(rows: Sequence[Array]) -> Array:
    """Mean over rows of one shape, ignoring NaN; NaN where all rows are NaN, or there is none."""
    values = np.asarray(rows, dtype=np.float64)
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0))


def _number(value: Array) -> float | None:
    return None if np.isnan(value) else float(value)


# --- checks of arguments ----------------------------------------------------------------------------------------------


def _both(y: Labels) -> bool:
    return bool(0 < y.sum() < len(y))


def _check_probabilities(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> tuple[Labels, Array]:
    y, p = check(labels, probabilities)
    if len(p) and (p.min() < 0.0 or p.max() > 1.0):
        raise ValueError("probabilities must be in [0, 1]")
    return y, p


def _check_said(labels: npt.ArrayLike, said_fake: npt.ArrayLike) -> tuple[Labels, Marks]:
    y, said = check(labels, said_fake)
    if not np.isin(said, (0.0, 1.0)).all():
        raise ValueError("said_fake must be true or false")
    return y, said == 1.0


def _check_predictions(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, said_fake: npt.ArrayLike
) -> tuple[Labels, Array, Marks]:
    """Return labels (n,), probabilities (S, n) and said_fake (S, n); raises `ValueError` if they do not fit."""
    rows = [np.atleast_2d(np.asarray(values)) for values in (probabilities, said_fake)]
    if rows[0].shape != rows[1].shape or rows[0].ndim != 2 or not len(rows[0]):
        raise ValueError(
            f"probabilities and said_fake must both be (n,) or (S, n), got {np.shape(probabilities)} and "
            f"{np.shape(said_fake)}"
        )
    p = np.stack([_check_probabilities(labels, row)[1] for row in rows[0]])
    said = np.stack([_check_said(labels, row)[1] for row in rows[1]])
    return check(labels, p[0])[0], p, said
