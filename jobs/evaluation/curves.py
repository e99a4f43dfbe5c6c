"""Compute the curves of an evaluation's plots, over all images together, as numbers for its JSON.

Dimensions: n images, d points of a curve, b non-empty bins.
"""

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.evaluation import groups
from jobs.evaluation.groups import FAKE, UNCERTAIN, UNTRANSFORMED, Array, LabelledScores
from nsnet import metrics
from nsnet.calibration import rate_upper
from nsnet.metrics import precision_at

BINS: Final = 10
"""Bins of the reliability diagram; fewer than for the ECE, so that each holds enough images."""
HISTOGRAM_BINS: Final = 40
MIN_FPR: Final = 1e-3
BASE_RATES: Final = np.geomspace(1e-4, 0.5, 60)
"""Shares of fakes at which the precision is computed."""
Z: Final = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


def curves(table: pa.Table) -> dict[str, Any]:
    """JSON-ready curves of the untransformed labelled verdicts of `table`; an undefined curve is None."""
    known = table.filter(pc.is_valid(table.column("label")))
    known = known.filter(pc.equal(groups.transforms_of(known), UNTRANSFORMED))
    rows = groups.join(list(groups.split(known).values()))
    return {
        "roc": _roc(rows),
        "reliability": _reliability(rows),
        "histogram": _histogram(rows),
        "threshold": _threshold(known),
        "uncertain": _band(rows),
        "precision": _precision(rows),
    }


def _roc(rows: LabelledScores) -> dict[str, Any] | None:
    """Points (d,) of the ROC curve, thinned without a visible difference in a plot."""
    curve = metrics.roc_curve(rows.labels, rows.probabilities)
    if curve is None:
        return None
    fpr, tpr = curve
    grid = np.concatenate([[0.0], np.geomspace(MIN_FPR, 1.0, 200)])
    kept = np.unique(np.searchsorted(fpr, grid + 1e-12, side="right") - 1)  # the last point with at most this FPR
    return {"fpr": fpr[kept].tolist(), "tpr": tpr[kept].tolist(), "reals": int((rows.labels == 0).sum())}


def _reliability(rows: LabelledScores) -> dict[str, Any]:
    """Mean probability, share of fakes with its interval, and number of images of each bin, (b,) each."""
    probability, share, images = metrics.reliability(rows.labels, rows.probabilities, BINS)
    low, high = wilson(share, images)
    bins = {"probability": probability, "fakes": share, "low": low, "high": high, "pictures": images}
    return {name: values.tolist() for name, values in bins.items()}


def wilson(share: Array, images: groups.Integers) -> tuple[Array, Array]:
    """95 % score interval of shares (b,) of `images` (b,), each at least 1 (Wilson 1927)."""
    factor = 1.0 / (1.0 + Z**2 / images)
    centre = factor * (share + Z**2 / (2.0 * images))
    half = factor * Z * np.sqrt(share * (1.0 - share) / images + Z**2 / (4.0 * images**2))
    return np.clip(centre - half, 0.0, share), np.clip(centre + half, share, 1.0)  # clips rounding errors only


def _histogram(rows: LabelledScores) -> dict[str, Any]:
    """Images of each class per bin of the probability; the bins have equal width from 0 to 1."""

    def counts(label: int) -> list[int]:
        in_bins, _ = np.histogram(rows.probabilities[rows.labels == label], bins=HISTOGRAM_BINS, range=(0.0, 1.0))
        return [int(count) for count in in_bins]

    return {"real": counts(0), "fake": counts(1)}


def _threshold(table: pa.Table) -> float | None:
    """The threshold of the verdicts; None if they have several or none."""
    if "threshold" not in table.column_names:
        return None
    thresholds = pc.unique(pc.drop_null(table.column("threshold"))).to_pylist()
    return float(thresholds[0]) if len(thresholds) == 1 else None


def _band(rows: LabelledScores) -> list[float] | None:
    """Smallest and largest probability of uncertain verdicts."""
    uncertain = rows.probabilities[rows.said == UNCERTAIN]
    return [float(uncertain.min()), float(uncertain.max())] if len(uncertain) else None


def _precision(rows: LabelledScores) -> dict[str, Any] | None:
    """Precision at each base rate: with the measured FPR, and with the upper bound of the FPR."""
    confusion = rows.confusion()
    reals, fakes = (int(count) for count in confusion.sum(axis=1))
    false_alarms, true_alarms = int(confusion[0, FAKE]), int(confusion[1, FAKE])
    if not reals or not fakes or not true_alarms:
        return None
    upper = rate_upper(false_alarms, reals)
    return {
        "base_rate": BASE_RATES.tolist(),
        "value": precision_at(true_alarms / fakes, false_alarms / reals, BASE_RATES).tolist(),
        "cautious": precision_at(true_alarms / fakes, upper, BASE_RATES).tolist(),
        "fpr": false_alarms / reals,
        "fpr_upper": upper,
    }
