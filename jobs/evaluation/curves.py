"""What the plots of an evaluation show, of all images together, as numbers of its JSON.

Dimensions: n images, d points of a curve, b bins that hold an image.
"""

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.evaluation import groups
from jobs.evaluation.groups import FAKE, UNCERTAIN, UNTRANSFORMED, Array, LabelledScores
from nsnet import metrics
from nsnet.calibration import rate_upper

BINS: Final = 10
"""Of the reliability diagram: fewer than the ECE has, for each is to hold enough images to be read."""
HISTOGRAM_BINS: Final = 40
MIN_FPR: Final = 1e-3
BASE_RATES: Final = np.geomspace(1e-4, 0.5, 60)
"""Shares of fakes for which the worth of an alarm is shown."""
Z: Final = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


def curves(table: pa.Table) -> dict[str, Any]:
    """Curves of the untransformed labelled verdicts of `table`, JSON-ready; a curve that is undefined is None."""
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
    """Points (d,) of the ROC curve, thinned: those at which a plot could tell it from the whole curve."""
    curve = metrics.roc_curve(rows.labels, rows.probabilities)
    if curve is None:
        return None
    fpr, tpr = curve
    grid = np.concatenate([[0.0], np.geomspace(MIN_FPR, 1.0, 200)])
    kept = np.unique(np.searchsorted(fpr, grid + 1e-12, side="right") - 1)  # the last point with at most this FPR
    return {"fpr": fpr[kept].tolist(), "tpr": tpr[kept].tolist(), "reals": int((rows.labels == 0).sum())}


def _reliability(rows: LabelledScores) -> dict[str, Any]:
    """(b,) mean probability, share of fakes with its interval, and images."""
    probability, share, images = metrics.reliability(rows.labels, rows.probabilities, BINS)
    low, high = wilson(share, images)
    found = {"probability": probability, "fakes": share, "low": low, "high": high, "pictures": images}
    return {name: values.tolist() for name, values in found.items()}


def wilson(share: Array, images: groups.Integers) -> tuple[Array, Array]:
    """95 % score interval of shares (b,) of so many images (b,), each at least 1 (Wilson 1927)."""
    factor = 1.0 / (1.0 + Z**2 / images)
    centre = factor * (share + Z**2 / (2.0 * images))
    half = factor * Z * np.sqrt(share * (1.0 - share) / images + Z**2 / (4.0 * images**2))
    return np.clip(centre - half, 0.0, share), np.clip(centre + half, share, 1.0)  # equal, but for rounding


def _histogram(rows: LabelledScores) -> dict[str, Any]:
    """Images of each class per bin of the probability; edges are equally far apart from 0 to 1."""

    def counts(label: int) -> list[int]:
        found, _ = np.histogram(rows.probabilities[rows.labels == label], bins=HISTOGRAM_BINS, range=(0.0, 1.0))
        return [int(count) for count in found]

    return {"real": counts(0), "fake": counts(1)}


def _threshold(table: pa.Table) -> float | None:
    """The threshold of the verdicts; None where they have several, or say none."""
    if "threshold" not in table.column_names:
        return None
    found = pc.unique(pc.drop_null(table.column("threshold"))).to_pylist()
    return float(found[0]) if len(found) == 1 else None


def _band(rows: LabelledScores) -> list[float] | None:
    """Least and largest probability that was called uncertain."""
    found = rows.probabilities[rows.said == UNCERTAIN]
    return [float(found.min()), float(found.max())] if len(found) else None


def _precision(rows: LabelledScores) -> dict[str, Any] | None:
    """Share of right alarms at each base rate: as measured, and at the upper end of what the FPR may be."""
    confusion = rows.confusion()
    reals, fakes = (int(count) for count in confusion.sum(axis=1))
    false_alarms, found = int(confusion[0, FAKE]), int(confusion[1, FAKE])
    if not reals or not fakes or not found:
        return None
    upper = rate_upper(false_alarms, reals)
    return {
        "base_rate": BASE_RATES.tolist(),
        "value": _precision_at(found / fakes, false_alarms / reals).tolist(),
        "cautious": _precision_at(found / fakes, upper).tolist(),
        "fpr": false_alarms / reals,
        "fpr_upper": upper,
    }


def _precision_at(tpr: float, fpr: float) -> Array:
    """b·TPR / (b·TPR + (1 − b)·FPR) at each base rate b; TPR > 0."""
    alarms = BASE_RATES * tpr + (1.0 - BASE_RATES) * fpr
    return np.asarray(BASE_RATES * tpr / alarms)
